"""Text tables: their rows, cells in quotes and headers, by Python's `csv`."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpjax.errors import ConfigError, listed, printable

logger = logging.getLogger("mpjax.data")


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


def read_text_file(path: Path, what: str) -> str:
    """Reads a UTF-8 file; every end of a line becomes ``\\n``.

    Raises:
        ConfigError: absent, unreadable, not UTF-8, with NUL characters, or without text.
    """
    where = f"data {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")  # drops the byte order mark that Excel writes
    except FileNotFoundError:
        raise ConfigError(f"{where}: no such file; expected {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: cannot be read ({printable(str(error), 200)}); expected UTF-8 text, save it"
            " as such"
        ) from None
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
        # If a quoted cell spans rows, quotes are text in the whole file.
        crossed = any("\n" in cell and "\t" in cell for _, cells in rows for cell in cells)
        if delimiter != "\t" or not crossed:
            if swallowed := [row.line for row in rows if _holds_rows(row, delimiter)]:
                logger.warning(
                    "data %r: line %d: a cell in quotes holds lines that look like rows; is its"
                    " quote closed?", str(path), swallowed[0],
                )  # fmt: skip
            return rows
    except csv.Error as error:
        if delimiter != "\t":
            raise ConfigError(
                f"data {str(path)!r}, {error}; put a cell with quotes in quotes, and double those"
                " in it"
            ) from None
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
    """Yields rows; consecutive empty lines give one, since a row takes 100 times their memory."""
    reader = csv.reader(io.StringIO(text), **dialect)
    empty = False
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
            if cells or not empty:
                yield Cells(line, cells)
            empty = not cells
        except StopIteration:
            return
        except csv.Error as error:
            raise csv.Error(f"line {line}: {error}") from error


def _holds_rows(row: Cells, delimiter: str) -> bool:
    inner = [line for cell in row.cells for line in cell.split("\n")[1:-1]]
    return len(inner) > 1 and {line.count(delimiter) for line in inner} == {len(row.cells) - 1}


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
    logger.info("%s is a header; unused columns: %s", where, listed(others, 20) or "none")
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
