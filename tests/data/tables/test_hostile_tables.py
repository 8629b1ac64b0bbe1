"""Hostile tables: refused in one line, before what they say is made."""

from __future__ import annotations

import io
import json
import lzma
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.datasets.frame import read_frame
from mpjax.data.tables.cells import read_cells
from mpjax.data.tables.readers import read_table
from mpjax.data.tables.rows import read_rows
from tests.bounds import bounded, refused
from tests.models.hf.torch_writer import Call, Name, Writer

ROW = '{"text": "a", "label": "b"}'
JSON = {
    "deep": ("[" * 10**5, "not JSON .100000 levels"),
    "deep in a row": ('{"text": ' * 900 + "1" + "}" * 900, "not JSON .900 levels"),
    "a key twice of 10^5": (
        '{"x": 1, "x": 2, ' + ", ".join(f'"{i}": 1' for i in range(50_000)) + "}",
        "the key 'x' twice in one object",
    ),
    "a number of 10^5 digits": ('{"text": ' + "1" * 10**5 + "}", "not JSON .Exceeds the limit"),
    "a long word": ("x" * 10**6, "not JSON"),
    "an escape as a key": ('{"\\u001b[2J": 1}', "no 'text'; expected"),
    "an escape as a text": ('{"text": "a", "label": ["\\u001b[2J"]}', r"'\\x1b\[2J'"),
    "a long value": ('{"text": "a", "label": [' + "1, " * 10**5 + "1]}", r"\[1, 1.* [.]{3}\)"),
    "a large number": ('{"text": "a", "label": 1e400}', "type float .inf."),
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_that_is_none_or_endless(name: str, suffix: str, tmp_path: Path) -> None:
    text, message = JSON[name]
    path = tmp_path / f"t{suffix}"
    path.write_text(text if suffix == ".jsonl" else f"[{text}]")
    with refused(path, message if "levels" not in message else "levels deep"):
        read_rows(path, ("text", "label"), classes="label")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_byte_order_mark_and_brackets_in_texts_are_no_mistake(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"t{suffix}"
    text = json.dumps({"text": '[{"\\' * 500, "label": "b"})
    path.write_text(text if suffix == ".jsonl" else f"[{text}]", encoding="utf-8-sig")
    with bounded(path):
        rows = read_rows(path, ("text", "label"))
    assert rows.rows == [['[{"\\' * 500, "b"]]


def test_a_table_of_many_columns_names_a_few(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({f"c{i}\x1b[2J": 1 for i in range(40_000)}))
    with refused(path, r"no column 'text' .*c0\\x1b\[2J, .* and 39992 more"):
        read_table(path, "t", None)


def test_a_million_empty_lines_take_little(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\n" + "\n" * 10**6 + "c\td\n")
    with bounded(path):
        rows = read_cells(path, ("one", "other"))
    assert [(row.line, row.cells) for row in rows] == [
        (1, ["a", "b"]), (2, []), (1_000_002, ["c", "d"]),
    ]  # fmt: skip


@pytest.fixture
def system_pool() -> Iterator[None]:
    """Arrow keeps no memory of an earlier test, which would hide what a file takes."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    usual = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    yield
    pyarrow.set_memory_pool(usual)


@pytest.mark.usefixtures("system_pool")
def test_parquet_files_that_grow(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "t.parquet"

    def write(texts: Any, **options: Any) -> None:
        parquet.write_table(pyarrow.table({"text": pyarrow.array(texts)}), path, **options)

    write(["a"] * 200_000)
    with refused(path, "200000 rows in .* bytes, more than 100"):
        read_table(path, "t", None)
    write(["a" * 3 * 10**7], compression="zstd", use_dictionary=False)
    with refused(path, "more than .* bytes once unpacked, from"):
        read_table(path, "t", None)
    write(["a" * 10**5] * 1000)  # one in the dictionary, so that the file declares little
    with refused(path, "row .*: more than 16 times the file's bytes once unpacked"):
        read_table(path, "t", None)
    write(pyarrow.array(["a" * 10**5] * 1000).dictionary_encode())  # and one in memory
    with refused(path, "row .*: more than 16 times the file's bytes once unpacked"):
        read_table(path, "t", None)
    texts, pairs = pyarrow.string(), pyarrow.map_(pyarrow.string(), pyarrow.string())
    for cell, kind in (
        (["a" * 10**5], pyarrow.list_(texts)),
        ({"k": "a" * 10**5}, pyarrow.struct({"k": texts})),
        ([("k", "a" * 10**5)], pairs),
    ):
        write(pyarrow.array([cell] * 1000, kind))
        with refused(path, "row .*: more than 16 times the file's bytes once unpacked"):
            read_table(path, "t", None)
    write(pyarrow.array(["a", "b", None] * 10).dictionary_encode())
    assert [value for _, value in read_table(path, "t", None)] == ["a", "b", None] * 10
    write([f"text {i}" for i in range(1000)], compression="none", use_dictionary=False)
    assert len(read_table(path, "t", None)) == 1000
    whole = path.read_bytes()
    assert b"text 777" in whole
    path.write_bytes(whole.replace(b"text 777", b"text \xff77"))
    with refused(path, "not a readable parquet file"):
        read_table(path, "t", None)


class Built(Call):
    """Pickled as a call of a global whose result then takes a state."""

    def __init__(self, state: Any, function: Name, *args: Any) -> None:
        super().__init__(function, *args)
        self.state = state

    def __reduce__(self) -> Any:
        return self.function, self.args, self.state


INDEXES = "pandas.core.indexes."


def array(data: Any, *shape: Any, kind: str = "O8", order: str = "|") -> Any:
    dtype = Built(
        (3, order, None, None, None, -1, -1, 63), Name("numpy", "dtype"), kind, False, True
    )
    rebuild = Name("numpy.core.multiarray", "_reconstruct")
    return Built((1, shape, dtype, False, data), rebuild, Name("numpy", "ndarray"), (0,), b"b")


def counted(n: int) -> Any:
    names = Name(f"{INDEXES}base", "_new_Index"), Name(f"{INDEXES}range", "RangeIndex")
    return Call(*names, {"name": None, "start": 0, "stop": n, "step": 1})


def index(values: Any) -> Any:
    names = Name(f"{INDEXES}base", "_new_Index"), Name(f"{INDEXES}base", "Index")
    return Call(*names, {"name": None, "data": values})


def block(values: Any, *places: int) -> Any:
    where = Call(Name("builtins", "slice"), *places)
    return Call(Name("pandas._libs.internals", "_unpickle_block"), values, where, 2)


def frame(blocks: Any, names: Any) -> bytes:
    manager = Name("pandas.core.internals.managers", "BlockManager")
    state = {"_mgr": Call(manager, blocks, [names, counted(2)]), "_typ": "dataframe"}
    file = io.BytesIO()
    Writer(file, protocol=4).dump(Built(state, Name("pandas.core.frame", "DataFrame")))
    return lzma.compress(file.getvalue())


CELLS, NAMES = array(["a", "b", "c", "d"], 2, 2), index(array(["text", "label"], 2))
GOOD = frame((block(CELLS, 0, 2, 1),), NAMES)
FRAMES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "10^10 names": (frame((block(CELLS, 0, 2, 1),), counted(10**10)), "another number of names"),
    "2^62 rows": (frame((block(array(["a"], 2**62, 2), 0, 2, 1),), NAMES), "of another length"),
    "a shape of text": (frame((block(array(["a"], "2", 2), 0, 2, 1),), NAMES), "without a shape"),
    "bytes as objects": (frame((block(array(b"abcd", 2, 2), 0, 2, 1),), NAMES), "another length"),
    "lists as cells": (
        frame((block(array([[1]] * 4, 2, 2), 0, 2, 1),), NAMES), "neither text nor number",
    ),
    "a dtype of records": (
        frame((block(array(b"abcd", 2, 2, kind="V8"), 0, 2, 1),), NAMES), "neither numbers nor",
    ),
    "big-endian": (
        frame((block(array(b"\0" * 32, 2, 2, kind="i8", order=">"), 0, 2, 1),), NAMES),
        "big-endian",
    ),
    "a memo of 2^30": (lzma.compress(b"\x80\x02}r\0\0\0\x40."), "memo 1073741824 behind 0"),
    "a bomb": (lambda: lzma.compress(b"\0" * 10**8), "more than .* bytes once unpacked"),
    "a dictionary of 512 MB": (
        lambda: lzma.compress(
            b"\0" * 9, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**29}]
        ),
        "limit",
    ),
    "what sets an attribute": (
        lzma.compress(b"\x80\x02cbuiltins\nslice\n}X\1\0\0\0aK\1sb."), "what has none",
    ),
    "no frame": (lzma.compress(pickle.dumps([1])), "no pickled table"),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_frames_that_say_what_is_not_so(name: str, tmp_path: Path) -> None:
    data, message = FRAMES[name]
    path = tmp_path / "t.xz"
    path.write_bytes(GOOD)
    assert {n: list(column) for n, column in read_frame(path).items()} == {
        "text": ["a", "b"], "label": ["c", "d"],
    }  # fmt: skip
    path.write_bytes(data if isinstance(data, bytes) else data())
    with refused(path, message):
        read_frame(path)
