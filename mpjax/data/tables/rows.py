"""Rows of a user's own file of examples, with the types that the file has.

Text tables are read by `mpjax.data.tables.cells`; JSON lines, a JSON list of objects and parquet by
`mpjax.data.tables.readers`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mpjax.data.tables.cells import check_first, header_of, layout, read_cells
from mpjax.data.tables.readers import TYPED, read_records
from mpjax.errors import ConfigError, brief

logger = logging.getLogger("mpjax.data")

_WHOLE = re.compile(r"(-?)(0|[1-9][0-9]*)(\.0*)?")  # 007 is a name


class Rows(NamedTuple):
    """The rows of a file.

    Args:
        rows: the fields' texts of each.
        blank: how many others have empty cells only; an empty line is no row.
    """

    rows: list[list[str]]
    blank: int


def read_rows(
    path: Path, fields: Sequence[str], optional: Sequence[str] = (), *, classes: str = ""
) -> Rows:
    """Reads the named fields of each row.

    A text table has them in this order, or in the order of a header that names them; other columns
    of a header, and other keys of objects, are left out. A field is text. One of classes may also
    hold whole numbers, of which 0 and 0.0 are the same, or true and false, but not all of these.

    Args:
        path: the file: ``.jsonl``, ``.ndjson``, ``.json`` or ``.parquet`` with these keys, or a
            text table as `read_cells` reads it.
        fields: names of the fields, none of which may be empty.
        optional: fields that may follow them, in all rows or in none.
        classes: the field that holds classes, or none.

    Raises:
        ConfigError: a row that lacks a field, or holds something else in it, with its line.
    """
    where = f"data {str(path)!r}"
    expected = f"{layout(path, fields)} on each line, or JSON lines with {' and '.join(fields)}"
    if path.suffix.lower() in TYPED:
        rows = Rows(list(_typed_rows(path, fields, optional, classes, expected)), 0)
    else:
        rows = _text_rows(path, fields, optional, classes, expected)
    if not rows.rows:
        raise ConfigError(f"{where}: no rows; expected {expected}")
    if classes:
        place = tuple(fields).index(classes)
        named = whole_names([row[place] for row in rows.rows])
        for row, name in zip(rows.rows, named, strict=True):
            row[place] = name
    return rows


def whole_names(names: Sequence[str]) -> list[str]:
    """Returns names of classes, of which 0 and 0.0 are one if all are whole numbers.

    Example:
        >>> whole_names(["0", "1.0", "-0"]), whole_names(["0", "0.0", "a"])
        (['0', '1', '0'], ['0', '0.0', 'a'])
    """
    found = [_WHOLE.fullmatch(name) for name in names]
    if not all(found):
        return list(names)
    return [m[2] if m[2] == "0" else m[1] + m[2] for m in found if m is not None]


def _typed_rows(
    path: Path, fields: Sequence[str], optional: Sequence[str], classes: str, expected: str
) -> Iterator[list[str]]:
    kinds: dict[str, str] = {}  # kind of class -> where it was first
    wanted: list[str] = []
    for record in read_records(path, (*fields, *optional)):
        where = f"data {str(path)!r}, {record.where}"
        held = {n: x for n, x in record.fields.items() if x is not None}  # null counts as absent
        if lacking := [name for name in fields if name not in held]:
            raise ConfigError(
                f"{where}: no {lacking[0]!r}; expected the keys {' '.join(fields)}, drop the row"
            )
        names = [name for name in (*fields, *optional) if name in held]
        wanted = wanted or names
        if names != wanted:
            raise ConfigError(
                f"{where}: {len(names)} field(s); expected {' '.join(wanted)} as above"
            )
        row = []
        for name in names:
            kind, text = text_of(held[name], f"{where}: {name!r}", name == classes)
            if not text:
                raise ConfigError(f"{where}: empty field; every example needs a text, drop the row")
            row.append(text)
            if name == classes and kinds.setdefault(kind, record.where) and len(kinds) > 1:
                (one, first), (other, second) = kinds.items()
                raise ConfigError(
                    f"data {str(path)!r}: {name!r} is {one} in {first} and {other} in {second};"
                    " write all alike"
                )
        yield row


def text_of(value: object, where: str, is_class: bool) -> tuple[str, str]:
    """Returns the kind of a value, and its text.

    Args:
        value: as typed in its file.
        where: it stands, for errors.
        is_class: whether whole numbers, true and false are texts too.

    Raises:
        ConfigError: it is no text.
    """
    if isinstance(value, str):
        if re.search("[\0\ud800-\udfff]", value):
            raise ConfigError(f"{where} holds a NUL character or half a surrogate pair; clean it")
        return "text", value.strip()
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{where} is NaN, a missing value; fill it in or drop the row")
    if is_class and isinstance(value, bool):
        return "true or false", str(value)
    if is_class and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        return "a number", str(int(value))
    allowed = "one text or whole number" if is_class else "text"
    raise ConfigError(
        f"{where} is of type {type(value).__name__} ({brief(value)}); expected {allowed}, convert"
        " it"
    )


def _text_rows(
    path: Path, fields: Sequence[str], optional: Sequence[str], classes: str, expected: str
) -> Rows:
    where = f"data {str(path)!r}"
    table = read_cells(path, fields)
    filled = [row for row in table if not row.blank]
    blank = sum(row.blank and len(row.cells) > 1 for row in table)
    first = filled[0]
    header = header_of(first, fields, optional, where)
    if header:
        places, width = list(header.values()), len(first.cells)
    else:
        width = len(first.cells)
        places = list(range(width))
    rows = []
    for line, cells in filled[bool(header) :]:
        at = f"{where}, line {line}"
        if len(cells) != width or not (
            header or len(fields) <= width <= len(fields) + len(optional)
        ):
            raise ConfigError(f"{at}: {len(cells)} field(s); expected {expected}")
        if header and cells == first.cells:
            raise ConfigError(f"{at}: the header of line {first.line} again; drop the line")
        row = [cells[place].strip() for place in places]
        if "" in row:
            raise ConfigError(f"{at}: empty field; every example needs a text, drop the line")
        rows.append(row)
    if classes and rows and not header:
        values = [row[tuple(fields).index(classes)] for row in rows]
        check_first(values, "class", fields, f"{where}, line {first.line}")
    return Rows(rows, blank)


def say_counts(source: str, unit: str, used: Mapping[str, int], dropped: Mapping[str, int]) -> None:
    """Logs how many rows were read, used and left out; a warning if any was.

    Args:
        source: the data.
        unit: what is counted.
        used: kind -> count.
        dropped: reason -> count.
    """
    lost = {reason: n for reason, n in dropped.items() if n}
    total = sum(used.values()) + sum(lost.values())
    text = f"data {source!r}: {total} {unit} read: {_listed(used.items())}"
    if lost:
        logger.warning("%s; left out: %s", text, _listed(lost.items()))
    else:
        logger.info("%s", text)


def one_of_sources(sources: Iterable[str], else_a: str) -> str:
    """Returns what data was expected to be: one of these names, or something else."""
    return f"expected {' or '.join(filter(None, [' '.join(sources), else_a]))}"


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts)
