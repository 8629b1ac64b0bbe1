"""Named columns of a user's examples: of a file, a data set, a frame, arrays or dicts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpjax.data.tables.cells import header_of, read_cells
from mpjax.data.tables.readers import TYPED, load_hub, parquet_names, read_records
from mpjax.data.tables.rows import text_of, whole_names
from mpjax.errors import ConfigError, brief, listed
from mpjax.json_text import parse_json

MISSING = ("error", "drop", "empty")
KINDS = ("text", "class", "number", "messages", "turns", "tools")
CONVERSATIONS = ("messages", "conversations")  # columns that data sets have them in
TOOLS = "tools"  # that of the functions that a conversation may call
# Turns of ShareGPT have `from` and `value`.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "tool_response": "tool"}
Row = tuple[str, Mapping[str, Any]]  # where it stands, column -> value


class Columns(NamedTuple):
    """What was read.

    Args:
        values: field -> one entry a row that was kept: a text, or a float of numbers.
        read: rows of the source that are not blank.
        blank: rows whose cells are all empty.
        missing: rows that were left out, because a field of theirs is missing.
    """

    values: dict[str, list[Any]]
    read: int
    blank: int
    missing: int


def read_columns(
    source: Any,
    kinds: Mapping[str, str],
    columns: Mapping[str, str] | None = None,
    *,
    missing: str = "error",
) -> Columns:
    """Reads the fields of examples, each from a column.

    Args:
        source: a text table with a header, or without one if its columns are the fields in their
            order; ``.jsonl``, ``.ndjson``, ``.json`` or ``.parquet``; ``hf:NAME[:config]``; a data
            set of Hugging Face; a data frame; a dict of columns; or an iterable of dicts.
        kinds: field -> ``text``; ``class``: a text, a whole number, or true and false, but not all
            of these; ``number``; ``messages``, a list of turns with an answer, which is returned
            as JSON (``role`` and ``content``, or ``from`` and ``value``); ``turns``, perhaps
            without one; or ``tools``, JSON schemas of functions or their JSON, ``[]`` without.
        columns: field -> name of its column, where another.
        missing: of an empty cell, null or NaN: ``error``; ``drop`` leaves the row out; ``empty``
            makes it an empty text, where it is no class and no number.

    Returns:
        The fields; ``read`` is the rows that were kept and those that were left out.

    Raises:
        ConfigError: a source that cannot be read, a column that is not there, a value of another
            kind, a missing one, or no row is left; with the place.

    Example:
        >>> rows = [{"review": "good", "stars": 5}, {"review": None, "stars": 1}]
        >>> kinds = {"text": "text", "label": "class"}
        >>> read_columns(rows, kinds, {"text": "review", "label": "stars"}, missing="drop")
        Columns(values={'text': ['good'], 'label': ['5']}, read=2, blank=0, missing=1)
    """
    if missing not in MISSING:
        raise ConfigError(f"missing={brief(missing)}: unknown; known: {' '.join(MISSING)}")
    named = {field: (columns or {}).get(field) or field for field in kinds}
    if len(set(named.values())) < len(named):
        raise ConfigError(f"columns: {named} names one twice; give each field its own")
    where = f"data {brief(str(source))}" if isinstance(source, str | Path) else "data"
    rows, blank = _rows(source, named, set(columns or ()), where)
    values: dict[str, list[Any]] = {field: [] for field in kinds}
    typed: dict[str, dict[str, str]] = {field: {} for field in kinds}
    read = left = 0
    for place, row in rows:
        read += 1
        found = {}
        for field, kind in kinds.items():
            at = f"{place}: {named[field]!r}"
            value = _value(row.get(named[field]), kind, at, typed[field])
            if value is None and missing == "empty" and kind == "text":
                value = ""
            if value is None and missing != "drop":
                if named[field] not in row:
                    _require(list(map(str, row)), {field: named[field]}, place)
                raise ConfigError(
                    f"{place}: no {named[field]!r}; fill it in, or leave such rows out"
                    " (missing='drop')"
                )
            found[field] = value
        if None in found.values():
            left += 1
            continue
        for field, value in found.items():
            values[field].append(value)
    if read == left:
        raise ConfigError(f"{where}: no row is left of {read}; name another column or source")
    for field, kind in kinds.items():
        if kind == "class":
            values[field] = whole_names(values[field])
    return Columns(values, read, blank, left)


def _value(value: object, kind: str, where: str, earlier: dict[str, str]) -> Any:
    """A value as its kind has it; None if it is missing."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    if _is_missing(value):
        return "[]" if kind == "tools" else None
    if kind == "tools":
        return _tools(value, where)
    if kind in ("messages", "turns"):
        return _messages(value, where, kind == "messages")
    if kind != "number":
        own, text = text_of(value, where, kind == "class")
        if kind == "class" and earlier.setdefault(own, where) and len(earlier) > 1:
            (one, first), (other, second) = earlier.items()
            raise ConfigError(f"{first} is {one}, and {second} {other}; write all alike")
        return text or None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where} is {brief(value)}; expected a finite number, write 0.5")
    return number


def _is_missing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    none = value is None or (isinstance(value, float) and math.isnan(value))
    return none or type(value).__name__ in ("NAType", "NaTType")  # pandas'


def _tools(value: object, where: str) -> str:
    """The functions that a conversation may call, as JSON."""
    remedy = "give a list of JSON schemas of functions"
    found = parse_json(value, where, remedy) if isinstance(value, str) else value
    tools: list[Any] = list(found) if isinstance(found, list | tuple | np.ndarray) else [found]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(f"{where} is {brief(value)}; {remedy}")
    return _to_json([dict(tool) for tool in tools], where)


def _to_json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} is no plain data ({error}); give texts") from None


def _turn(turn: Any) -> Any:
    """A turn with a role and content, if it has both by these names or by those of ShareGPT."""
    if isinstance(turn, Mapping) and "role" not in turn and isinstance(turn.get("from"), str):
        rest = {name: x for name, x in turn.items() if name not in ("from", "value")}
        role = turn["from"]
        return {"role": _ROLES.get(role, role), "content": turn.get("value")} | rest
    return turn


def _messages(value: object, where: str, answered: bool) -> str:
    """A conversation as JSON."""
    turns = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    turns = list(map(_turn, turns))
    if not turns or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str)
                            for m in turns):  # fmt: skip
        raise ConfigError(
            f'{where} is {brief(value)}; expected messages, such as [{{"role": "user", "content":'
            ' "hello"}, {"role": "assistant", "content": "hi"}]'
        )
    if answered and all(m["role"] != "assistant" for m in turns):
        raise ConfigError(f"{where} has no message of the role 'assistant'; drop it or add one")
    return _to_json([dict(m) for m in turns], where)


def conversation_column(names: Sequence[str]) -> str | None:
    """Returns the column of conversations among those of a source, None if it has none."""
    return next((name for name in CONVERSATIONS if name in names), None)


def column_names(source: Any) -> list[str]:
    """Returns the columns of a source, as `read_columns` takes it: those of the first row.

    Of an iterator, which can be read once, and of what is no source there are none.

    Example:
        >>> column_names([{"prompt": "a", "completion": "b"}])
        ['prompt', 'completion']
    """
    if isinstance(source, str) and source.startswith("hf:"):
        name, _, config = source.removeprefix("hf:").partition(":")
        source = load_hub(source, name, config)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            return []
        if path.suffix.lower() == ".parquet":
            return parquet_names(path)
        if path.suffix.lower() in TYPED:
            source = [dict(r.fields) for r in itertools.islice(read_records(path, ()), 1)]
        else:
            rows = (row.cells for row in read_cells(path, ()) if not row.blank)
            return [cell.strip() for cell in next(rows, [])]
    there = getattr(source, "column_names", None)  # of a data set; a frame has the other
    there = getattr(source, "columns", None) if there is None else there
    if there is not None:
        return list(map(str, there))
    if isinstance(source, Sequence) and source and isinstance(source[0], Mapping):
        source = source[0]
    return list(map(str, source)) if isinstance(source, Mapping) else []


def _rows(
    source: Any, named: Mapping[str, str], chosen: set[str], where: str
) -> tuple[Iterator[Row], int]:
    """The rows of a source that are not blank, and how many are."""
    if isinstance(source, str) and source.startswith("hf:"):
        name, _, config = source.removeprefix("hf:").partition(":")
        if not name or ":" in config:
            raise ConfigError(f"{where}: malformed; expected hf:NAME[:config]")
        source = load_hub(source, name, config)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"{where}: no such file; expected .csv .tsv .jsonl .parquet or hf:NAME"
            )
        if path.suffix.lower() not in TYPED:
            return _text_rows(path, named, chosen, where)
        there = parquet_names(path) if path.suffix.lower() == ".parquet" else None
        records = read_records(path, tuple(named.values()))
        return _checked(
            ((f"{where}, {r.where}", r.fields) for r in records), there, named, where
        ), 0
    if hasattr(source, "column_names") and hasattr(source, "features"):  # datasets.Dataset
        if isinstance(source, Mapping):  # of splits
            raise ConfigError(f"{where}: a data set of splits {listed(source)}; give one of them")
        there = list(source.column_names)
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):  # a data frame
        there = list(map(str, source.columns))
        source = {name: source[name].tolist() for name in named.values() if name in there}
        _require(there, named, where)
    else:
        there = list(source) if isinstance(source, Mapping) else []
    if isinstance(source, Mapping):
        _require(there, named, where)
        sizes = {name: len(source[name]) for name in named.values()}
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"{where}: columns of {sizes} rows; give an entry a row in each")
        source = (
            dict(zip(named.values(), row, strict=True))
            for row in zip(*(source[name] for name in named.values()), strict=True)
        )
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise ConfigError(
            f"{where}: {brief(source)} is no data; give a file, a data set, a frame, a dict of"
            " columns or dicts"
        )
    numbered = ((f"{where}, row {n}", row) for n, row in enumerate(source, 1))
    return _checked(numbered, there or None, named, where), 0


def _checked(
    rows: Iterable[Row], there: Sequence[str] | None, named: Mapping[str, str], where: str
) -> Iterator[Row]:
    """The rows, of which some row has each of the columns."""
    if there is not None:
        _require(there, named, where)
    lacking, names = set(named.values()), dict[str, None]()
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise ConfigError(f"{place} is {brief(row)}; give a dict of column -> value")
        if lacking:
            lacking -= row.keys()
            names |= dict.fromkeys(map(str, row))
        yield place, row
    if not names and lacking:
        raise ConfigError(f"{where}: no rows; name other data")
    if lacking:
        _require(list(names), named, where)


def _require(there: Sequence[str], named: Mapping[str, str], where: str) -> None:
    for field, name in named.items():
        if name not in there:
            raise ConfigError(
                f"{where}: no column {name!r} (there: {listed(there) or 'none'}); name the one of"
                f" the {field}: {field}=COLUMN"
            )


def _text_rows(
    path: Path, named: Mapping[str, str], chosen: set[str], where: str
) -> tuple[Iterator[Row], int]:
    names = list(named.values())
    table = read_cells(path, names)
    filled = [row for row in table if not row.blank]
    blank = sum(row.blank and len(row.cells) > 1 for row in table)
    first, header = filled[0], [cell.strip() for cell in filled[0].cells]
    if all(name in header for name in names):
        if twice := [name for name in names if header.count(name) > 1]:
            raise ConfigError(f"{where}: the column {twice[0]!r} twice; rename one")
        places = {name: header.index(name) for name in names}
    elif chosen:
        _require(header, named, where)
    else:
        folded = header_of(first, names, (), where)
        places = folded or {name: place for place, name in enumerate(names)}
        header = header if folded else []
    width = len(first.cells)
    if not header and width != len(names):
        raise ConfigError(
            f"{where}, line {first.line}: {listed(first.cells, 9)}; if this is a header, say which"
            f" column is which ({' '.join(f'{name}=COLUMN' for name in names)}), else put a line"
            f" with the names {' '.join(names)} above it"
        )

    def rows() -> Iterator[Row]:
        for line, cells in filled[bool(header) :]:
            at = f"{where}, line {line}"
            if len(cells) != width:
                raise ConfigError(
                    f"{at}: {len(cells)} field(s), {width} in line {first.line}; put a cell that"
                    " holds the delimiter in quotes"
                )
            if header and cells == first.cells:
                raise ConfigError(f"{at}: the header of line {first.line} again; drop the line")
            yield at, {name: cells[place] for name, place in places.items()}

    return rows(), blank
