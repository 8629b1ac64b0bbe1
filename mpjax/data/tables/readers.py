"""Rows of tables with types: JSON lines, parquet, Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpjax.errors import ConfigError, listed, need, printable
from mpjax.json_text import parse_json
from mpjax.typing import Settings

SUFFIXES = (".jsonl", ".parquet")  # of files whose rows are documents
TYPED = (*SUFFIXES, ".ndjson", ".json")  # of files whose values have types
# Bounds on a parquet file, whose encodings can repeat a value any number of times.
_LEAST_ROWS, _ROW_BYTES, _LEAST_BYTES, _MOST_GROWN, _BATCH = 100_000, 4, 2**24, 16, 1024
Row = tuple[str, object]  # name of the row, what its text column holds


class Record(NamedTuple):
    """One row of a table.

    Args:
        number: of its line, from 1, or in parquet of its row, from 0.
        where: the same in words, from 1.
        fields: column -> value, as typed in the file; of parquet only what was asked for.
    """

    number: int
    where: str
    fields: Settings


def read_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Reads the rows of a file of JSON lines, of a JSON list of objects, or of parquet.

    Args:
        path: the file; its suffix says which, in any case.
        columns: what is read of parquet, where it is there.

    Raises:
        ConfigError: a file that cannot be read or parsed, or a key twice in one object.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    return _read_json(path, whole=suffix == ".json")


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
    key, rows = column or "text", []
    for record in read_records(path, (key,)):
        if key not in record.fields:
            _check_column(f"{path}: {record.where}", key, record.fields)
        rows.append((f"{name}:{record.number}", record.fields[key]))
    return rows


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
    rows = load_hub(source, name, config)
    key = named or column or "text"
    _check_column(source, key, rows.column_names)
    return ((f"{name}:{row}", value) for row, value in enumerate(rows[key]))


def load_hub(source: str, name: str, config: str) -> Any:
    """Returns the ``train`` split of a Hugging Face data set.

    Args:
        source: as the user wrote it, for errors.
        name: of the data set.
        config: of it; empty is its default one.

    Raises:
        ConfigError: the package absent, no network, or no such data.
    """
    datasets = need("datasets", "hub", source)
    try:
        return datasets.load_dataset(name, config or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:  # not there, no network, no such config
        raise ConfigError(
            f"{source}: cannot be loaded ({_first_line(error)}); check the name and the network, "
            "or download it once and name its files"
        ) from None


def _read_json(path: Path, whole: bool) -> Iterator[Record]:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # drops a byte order mark
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8, found binary data; convert it") from None
    if whole and text.lstrip().startswith("["):
        found = parse_json(text, f"{path}", "expected a list of objects")
        parts = ((number, f"object {number}", one) for number, one in enumerate(found, 1))
    else:
        parts = (
            (number, f"line {number}", parse_json(line, f"{path}: line {number}", _LINES))
            for number, line in enumerate(
                text.split("\n"), 1
            )  # splitlines would also cut at U+2028
            if line.strip()
        )
    for number, where, row in parts:
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: {where}: {type(row).__name__}; {_LINES}")
        yield Record(number, where, row)


_LINES = "expected one JSON object a line"


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    pyarrow, parquet = (need(m, "parquet", str(path)) for m in ("pyarrow", "pyarrow.parquet"))
    number = 0
    try:
        metadata = parquet.read_metadata(path)
        leaves = map(metadata.schema.column, range(metadata.num_columns))
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        # As dictionaries, so that a value that the file holds once is unpacked once.
        with parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts) as file:
            names = file.schema_arrow.names
            if twice := [name for name in columns if names.count(name) > 1]:
                raise ConfigError(f"{path}: the column {twice[0]!r} twice; rename one")
            there = [name for name in columns if name in names]
            if not there:
                _check_column(str(path), columns[0], names)
            size = path.stat().st_size
            rows, most = file.metadata.num_rows, _LEAST_ROWS + size // _ROW_BYTES
            if rows > most:
                raise ConfigError(
                    f"{path}: {rows} rows in {size} bytes, more than {most}; no texts are so short,"
                    " write it again"
                )
            left = _LEAST_BYTES + _MOST_GROWN * size
            # Of all columns: pyarrow aborts on one column's size if its statistics are damaged.
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            if sum(group.total_byte_size for group in groups) > left:
                raise ConfigError(
                    f"{path}: more than {left} bytes once unpacked, from {size}; drop what repeats,"
                    " or write it as JSON lines"
                )
            for batch in file.iter_batches(_BATCH, columns=there):
                if (left := left - sum(map(_text_bytes, batch.columns))) < 0:
                    raise ConfigError(
                        f"{path}: row {number + 1}: more than {_MOST_GROWN} times the file's bytes"
                        " once unpacked; drop what repeats, or write it as JSON lines"
                    )
                for row in batch.to_pylist():
                    yield Record(number, f"row {number + 1}", row)
                    number += 1
    except ConfigError:
        raise
    # Invalid UTF-8 and dates beyond Python's range raise when a row is converted.
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise ConfigError(
            f"{path}: not a readable parquet file ({_first_line(error)}); write it again"
        ) from None


def parquet_names(path: Path) -> list[str]:
    """Returns the columns of a parquet file.

    Raises:
        ConfigError: pyarrow is absent, or the file cannot be read.
    """
    pyarrow, parquet = (need(m, "parquet", str(path)) for m in ("pyarrow", "pyarrow.parquet"))
    try:
        return list(parquet.read_schema(path).names)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ConfigError(
            f"{path}: not a readable parquet file ({_first_line(error)}); write it again"
        ) from None


def _text_bytes(column: Any) -> int:
    """Bytes of a column once each row has its own value, which in Arrow may be one for all."""
    if not hasattr(column, "dictionary"):
        if hasattr(column, "items"):  # a map, whose keys and items may be those of more rows
            first, last = column.offsets[0].as_py(), column.offsets[-1].as_py()
            parts = [x.slice(first, last - first) for x in (column.keys, column.items)]
        else:
            parts = column.flatten() if hasattr(column, "flatten") else []
            parts = parts if isinstance(parts, list) else [parts]
        return int(column.nbytes) + sum(map(_text_bytes, parts))
    compute = need("pyarrow.compute", "parquet", "a column of repeated values")
    lengths = compute.binary_length(column.dictionary).take(column.indices)
    return int(compute.sum(lengths).as_py() or 0)


def _check_column(where: str, column: str, columns: Iterable[str]) -> None:
    found = list(columns)
    if column not in found:
        raise ConfigError(
            f"{where}: no column {column!r} (there: {listed(found) or 'none'}); "
            "name one as SOURCE:column"
        )


def _first_line(error: BaseException) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0], 200)
