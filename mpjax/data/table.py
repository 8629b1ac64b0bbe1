"""Rows of text: JSONL, parquet, Hugging Face data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpjax.errors import ConfigError, need

SUFFIXES = (".jsonl", ".parquet")
Row = tuple[str, Any]  # name of the row, what its text column holds


def read_table(path: Path, name: str, column: str | None) -> list[Row]:
    """Reads one column of a .jsonl or .parquet file.

    Args:
        path: the file.
        name: what to call it in the names of the rows.
        column: the column; ``text`` when None.

    Returns:
        (name of the row, value) for every row; values are not checked.

    Raises:
        ConfigError: a file that cannot be read or parsed, or has no such column.
    """
    read = _read_jsonl if path.suffix == ".jsonl" else _read_parquet
    return [(f"{name}:{row}", value) for row, value in read(path, column or "text")]


def read_hub(source: str, column: str | None) -> Iterator[Row]:
    """Reads one column of the ``train`` split of a Hugging Face data set.

    Args:
        source: ``hf:NAME[:config][:column]``; an empty config is the data set's default one.
        column: the column, unless `source` names it; ``text`` when neither does.

    Returns:
        (name of the row, value) for every row; values are not checked.

    Raises:
        ConfigError: a malformed source, the package absent, no network, no such data or column.
    """
    name, config, named = (*source.removeprefix("hf:").split(":"), "", "")[:3]
    if not name or source.count(":") > 3:
        raise ConfigError(f"data {source!r}: malformed; expected hf:NAME[:config][:column]")
    if named and column not in (None, named):
        raise ConfigError(
            f"{source}: names column {named!r}, but the column setting is {column!r}; "
            "drop one of the two"
        )
    datasets = need("datasets", "hub", source)
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:  # not there, no network, no such config
        raise ConfigError(
            f"{source}: cannot be loaded ({_first_line(error)}); check the name and the network, "
            "or download it once and name its files"
        ) from error
    key = named or column or "text"
    _check_column(source, key, rows.column_names)
    return ((f"{name}:{row}", value) for row, value in enumerate(rows[key]))


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_bytes().decode().split("\n")  # not splitlines: it cuts at U+2028 too
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8, found binary data; convert it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}: line {number} is not JSON ({_first_line(error)}); "
                "expected one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}: line {number} holds {type(row).__name__}; expected one JSON object a line"
            )
        _check_column(f"{path}: line {number}", column, row)
        yield number, row[column]


def _read_parquet(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    pyarrow, parquet = (need(m, "parquet", str(path)) for m in ("pyarrow", "pyarrow.parquet"))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield number, value
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(
            f"{path}: not a readable parquet file ({_first_line(error)}); write it again"
        ) from error


def _check_column(where: str, column: str, columns: Iterable[str]) -> None:
    found = list(columns)
    if column not in found:
        raise ConfigError(
            f"{where}: no column {column!r} (there: {', '.join(found) or 'none'}); "
            "name one as SOURCE:column"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
