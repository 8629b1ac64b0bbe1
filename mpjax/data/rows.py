"""Rows of a user's own file of examples, with the types that the file has.

Text tables are read by Python's `csv`: comma-separated ``.csv``, and tab-separated any other file.
JSON lines, a JSON list of objects and parquet are read by `mpjax.data.table`.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpjax.data.table import TYPED, read_records
from mpjax.errors import ConfigError, brief

logger = logging.getLogger("mpjax.data")

_DELIMITERS = {"\t": "<TAB>", ",": ",", ";": ";"}
_WHOLE = re.compile(r"(-?)(0|[1-9][0-9]*)(\.0*)?")  # 007 is a name, and no number


class Cells(NamedTuple):
    """One row of a text table.

    Args:
        line: where it begins, from 1.
        cells: their texts.
    """

    line: int
    cells: list[str]

    @property
    def blank(self) -> bool:
        """Whether no cell holds text."""
        return not any(cell.strip() for cell in self.cells)


class Rows(NamedTuple):
    """The rows of a file.

    Args:
        rows: the fields' texts of each.
        blank: how many others have empty cells only; an empty line is no row.
    """

    rows: list[list[str]]
    blank: int


def read_text_file(path: Path, what: str) -> str:
    """Reads a UTF-8 file; every end of a line becomes ``\\n``.

    Raises:
        ConfigError: absent, unreadable, not UTF-8, with NUL characters, or without text.
    """
    where = f"data {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins with a mark
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no such file; expected {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: cannot be read ({error}); expected UTF-8 text, save it as such"
        ) from error
    if not text.strip():
        raise ConfigError(f"{where}: empty; expected {what}")
    if "\0" in text:
        raise ConfigError(f"{where}: NUL characters, as of UTF-16; save it as UTF-8")
    return text


def read_cells(path: Path, fields: Sequence[str]) -> list[Cells]:
    """Reads a text table, its blank rows and a header among them.

    A cell in quotes is read as spreadsheets write it: it may hold the delimiter, line ends and
    doubled quotes. A tab-separated file whose quotes are not all of that form has them as text.

    Args:
        path: the file; ``.csv`` is separated by commas, or by tabs or semicolons where its first
            row has too few commas, any other file by tabs.
        fields: what a row holds at least.

    Raises:
        ConfigError: as `read_text_file`, or quotes in ``.csv`` that are not closed.
    """
    text = read_text_file(path, f"{layout(path, fields)} on each line")
    delimiter = "\t"
    if path.suffix.lower() == ".csv":
        first = next(line for line in text.split("\n") if line.strip())
        wide = (d for d in ",\t;" if len(next(csv.reader([first], delimiter=d))) >= len(fields))
        delimiter = next(wide, ",")
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        rows = list(_cells(text, delimiter=delimiter, strict=True))
        # A quote that only a later row's quote closes is text, and so are all others.
        crossed = any("\n" in cell and "\t" in cell for _, cells in rows for cell in cells)
        if delimiter != "\t" or not crossed:
            return rows
    except csv.Error as error:
        if delimiter != "\t":
            raise ConfigError(
                f"data {str(path)!r}, {error}; put a cell with quotes in quotes, and double those"
                " in it"
            ) from error
    finally:
        csv.field_size_limit(limit)
    rows = list(_cells(text, delimiter=delimiter, quoting=csv.QUOTE_NONE))
    quoted = [row.line for row in rows if any(map(_is_spreadsheets, row.cells))]
    if quoted:
        logger.warning(
            "data %r: quotes are read as text, because not all are closed; line %d may hold a"
            " spreadsheet's", str(path), quoted[0],
        )  # fmt: skip
    return rows


def _cells(text: str, **dialect: Any) -> Iterator[Cells]:
    reader = csv.reader(io.StringIO(text), **dialect)
    while True:
        line = reader.line_num + 1
        try:
            yield Cells(line, next(reader))
        except StopIteration:
            return
        except csv.Error as error:
            raise csv.Error(f"line {line}: {error}") from error


def _is_spreadsheets(cell: str) -> bool:
    return len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1]


def layout(path: Path, fields: Sequence[str]) -> str:
    """Returns what a row of a text table looks like."""
    return ("," if path.suffix.lower() == ".csv" else "<TAB>").join(fields)


def header_of(
    row: Cells, fields: Sequence[str], optional: Sequence[str], where: str
) -> dict[str, int]:
    """Returns name -> place of the columns that a header names; nothing if the row is none.

    Args:
        row: the first that is not blank.
        fields: names that a header holds, in any order and case, perhaps among others.
        optional: names that it may hold.
        where: the file, for errors.

    Raises:
        ConfigError: some of the names only, or one twice.
    """
    names = [cell.strip().casefold() for cell in row.cells]
    known = [name for name in names if name in (*fields, *optional)]
    if not set(known) & set(fields):
        return {}
    where = f"{where}, line {row.line}"
    if lacking := [name for name in fields if name not in known]:
        raise ConfigError(
            f"{where}: a column {known[0]!r} and none {lacking[0]!r}; if this is a header, name"
            f" its columns {' '.join(fields)}, else put a line with these names above it"
        )
    if len(set(known)) < len(known):
        raise ConfigError(f"{where}: a header with a name twice ({' '.join(known)}); rename one")
    others = [
        cell.strip() for cell, name in zip(row.cells, names, strict=True) if name not in known
    ]
    logger.info("%s is a header; columns not read: %s", where, " ".join(others) or "none")
    return {name: names.index(name) for name in (*fields, *optional) if name in names}


def check_first(values: Sequence[str], what: str, names: Sequence[str], where: str) -> None:
    """Checks that a table without a known header does not begin with another one.

    Args:
        values: of the column of classes.
        what: one of its values.
        names: that a header would have.
        where: the file and the first row's line.

    Raises:
        ConfigError: the first value is the only one that is there once.
    """
    counts = Counter(values)
    if len(counts) > 1 and [value for value, n in counts.items() if n == 1] == [values[0]]:
        raise ConfigError(
            f"{where}: the {what} {values[0]!r} is in no other row; if this is a header, name its"
            f" columns {' '.join(names)}, else put a line with these names above it"
        )


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
        found = [_WHOLE.fullmatch(row[place]) for row in rows.rows]
        if all(found):
            for row, match in zip(rows.rows, found, strict=True):
                assert match is not None
                row[place] = match[2] if match[2] == "0" else match[1] + match[2]
    return rows


def _typed_rows(
    path: Path, fields: Sequence[str], optional: Sequence[str], classes: str, expected: str
) -> Iterator[list[str]]:
    kinds: dict[str, str] = {}  # kind of class -> where it was first
    wanted: list[str] = []
    for record in read_records(path, (*fields, *optional)):
        where = f"data {str(path)!r}, {record.where}"
        held = {n: x for n, x in record.fields.items() if x is not None}  # null is not there
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
            kind, text = _value(held[name], f"{where}: {name!r}", name == classes)
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


def _value(value: Any, where: str, is_class: bool) -> tuple[str, str]:
    """The kind of a value, and its text."""
    if isinstance(value, str):
        if "\0" in value or re.search("[\ud800-\udfff]", value):
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
        f"{where} is of type {type(value).__name__} ({brief(value)}); expected {allowed}, convert it"
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


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts)
