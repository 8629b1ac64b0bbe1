"""Rows of a user's own file of examples: tab-separated text or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mpjax.errors import ConfigError


def read_text_file(path: Path, what: str) -> str:
    """Reads a UTF-8 file.

    Raises:
        ConfigError: absent, unreadable, not UTF-8, or without text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins with a mark
    except FileNotFoundError as error:
        raise ConfigError(f"data {str(path)!r}: no such file; expected {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data {str(path)!r}: cannot be read ({error}); expected UTF-8 text"
        ) from error
    if not text.strip():
        raise ConfigError(f"data {str(path)!r}: empty; expected {what}")
    return text


def read_rows(path: Path, fields: Sequence[str], optional: Sequence[str] = ()) -> list[list[str]]:
    """Reads the named fields of each row.

    A ``.jsonl`` file has an object a line with these keys; any other file has them separated by
    tabs, in this order.

    Args:
        path: the file.
        fields: names of the fields, none of which may be empty.
        optional: fields that may follow them, in all rows or in none.

    Returns:
        A list of the fields' texts for each row that is not blank.

    Raises:
        ConfigError: a row that lacks a field, with its line.
    """
    layout = f"{'<TAB>'.join(fields)} on each line, or JSON lines with {' and '.join(fields)}"
    rows: list[list[str]] = []
    width = 0
    for number, line in enumerate(read_text_file(path, layout).split("\n"), 1):
        if not line.strip():
            continue
        where = f"data {str(path)!r}, line {number}"
        if path.suffix == ".jsonl":
            row = _json_row(line, fields, optional, where)
        else:
            row = [part.strip() for part in line.rstrip("\r").split("\t")]
        width = width or len(row)
        if len(row) != width or not len(fields) <= width <= len(fields) + len(optional):
            raise ConfigError(f"{where}: {len(row)} field(s); expected {layout}")
        if "" in row:
            raise ConfigError(f"{where}: empty field; every example needs a text, drop the line")
        rows.append(row)
    return rows


def _json_row(line: str, fields: Sequence[str], optional: Sequence[str], where: str) -> list[str]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {type(found).__name__}; expected an object a line")
    held = {name: value for name, value in found.items() if value is not None}
    if lacking := [name for name in fields if name not in held]:
        raise ConfigError(f"{where}: no {lacking[0]!r}; expected the keys {' '.join(fields)}")
    return [str(held[name]).strip() for name in (*fields, *optional) if name in held]
