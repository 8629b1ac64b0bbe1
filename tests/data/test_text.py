"""Sources of text: what is read, in which order, and what is refused in one line."""

import json
import logging
import os
import stat
import sys

import pytest

from mpjax.data import Document, read_documents
from mpjax.errors import ConfigError


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def test_stdlib_is_large_deterministic_and_free_of_tests():
    documents = read_documents("stdlib")
    names = [document.name for document in documents]
    assert names == sorted(names) == [document.name for document in read_documents("stdlib")]
    assert len(documents) > 400
    assert sum(len(document.text) for document in documents) > 8_000_000
    assert {"json/decoder.py", "asyncio/events.py", "abc.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "lib2to3", "site-packages", "__pycache__"}


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    write(tmp_path, {"a.txt": "one\r\ntwo\u2028\ufeffé\n"})
    assert read_documents(str(tmp_path / "a.txt")) == [
        Document("a.txt", "one\r\ntwo\u2028\ufeffé\n")
    ]


def test_a_directory_is_read_sorted_without_hidden_and_binary_files(tmp_path, caplog):
    write(
        tmp_path,
        {
            "b.txt": "b",
            "a/z.md": "z",
            "a/deep/y": "y",
            "picture.png": b"\x89PNG\0\1",
            "late.bin": b"x" * 10_000 + b"\0",
            "latin1.txt": b"caf\xe9",
            "empty.txt": "",
            ".hidden/x.txt": "x",
            ".hidden.txt": "x",
            "rows.jsonl": '{"text": "first"}\n\n{"text": "second"}\n',
        },
    )
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    with caplog.at_level(logging.WARNING, "mpjax.data"):
        documents = read_documents(str(tmp_path))
    assert [(d.name, d.text) for d in documents] == [
        ("a/deep/y", "y"),
        ("a/z.md", "z"),
        ("b.txt", "b"),
        ("rows.jsonl:1", "first"),
        ("rows.jsonl:3", "second"),
    ]
    assert len(caplog.messages) == 2
    assert "3 binary file(s) skipped" in caplog.messages[0]
    assert "1 empty document(s) dropped" in caplog.messages[1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("how", ["default", "path", "argument"])
def test_tables_give_a_document_a_row(tmp_path, suffix, how):
    rows = [{"text": "first", "body": "B1"}, {"text": "line\u2028two", "body": "é"}]
    path = tmp_path / f"t.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
    source, column = {
        "default": (str(path), None),
        "path": (f"{path}:body", None),
        "argument": (str(path), "body"),
    }[how]
    key = "text" if how == "default" else "body"
    texts = [document.text for document in read_documents(source, column=column)]
    assert texts == [row[key] for row in rows]


def test_a_path_with_a_colon_that_exists_is_taken_whole(tmp_path):
    write(tmp_path, {"a": "wrong", "a:b": "right"})
    assert read_documents(str(tmp_path / "a:b"))[0].text == "right"


BAD = {
    "missing": ("nothing.txt", {}, ["nothing.txt", "no such file", "stdlib"]),
    "empty name": ("", {}, ["no such file"]),
    "name too long": ("x" * 5000, {}, ["cannot be read"]),
    "empty file": ("a.txt", {"a.txt": ""}, ["a.txt", "no text"]),
    "empty directory": ("d", {"d/e/.keep": "x"}, ["d", "no text"]),
    "binary file": ("a.bin", {"a.bin": b"ab\0cd"}, ["a.bin", "binary", "UTF-8"]),
    "not UTF-8": ("a.txt", {"a.txt": "é".encode("latin1")}, ["a.txt", "UTF-8", "convert"]),
    "UTF-16": ("a.txt", {"a.txt": "text".encode("utf-16")}, ["a.txt", "binary"]),
    "only binary files": ("d", {"d/x": b"\0"}, ["d", "no text"]),
    "not JSON": ("a.jsonl", {"a.jsonl": '{"text": "x"}\n{"text'}, ["line 2", "not JSON"]),
    "JSON list": ("a.jsonl", {"a.jsonl": "[1]"}, ["line 1", "list", "object"]),
    "binary JSONL": ("a.jsonl", {"a.jsonl": b"\xff"}, ["a.jsonl", "UTF-8"]),
    "missing column": ("a.jsonl:b", {"a.jsonl": '{"c": "x"}'}, ["'b'", "there: c", "SOURCE:c"]),
    "default column": ("a.jsonl", {"a.jsonl": '{"c": "x"}'}, ["'text'", "there: c"]),
    "column of numbers": ("a.jsonl:b", {"a.jsonl": '{"b": 1}'}, ["a.jsonl:1", "int", "text"]),
    "NUL in a row": ("a.jsonl", {"a.jsonl": '{"text": "a\\u0000"}'}, ["a.jsonl:1", "NUL"]),
    "half a surrogate": ("a.jsonl", {"a.jsonl": '{"text": "\\ud800"}'}, ["surrogate"]),
    "only nulls": ("a.jsonl", {"a.jsonl": '{"text": null}'}, ["no text"]),
    "deep JSON": ("a.jsonl", {"a.jsonl": "[" * 100_000}, ["line 1", "not JSON"]),
    "torn parquet": ("a.parquet", {"a.parquet": b"PAR1 torn"}, ["a.parquet", "parquet"]),
    "column of a text file": ("a.txt:b", {"a.txt": "x"}, ["'b'", "drop the column"]),
    "column of a text folder": ("d:b", {"d/a.txt": "x"}, ["'b'", "drop the column"]),
    "not a regular file": ("/dev/null", {}, ["/dev/null", "regular file"]),
    "hub without a name": ("hf:", {}, ["hf:NAME"]),
    "hub with too much": ("hf:a:b:c:d", {}, ["malformed"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_with_name_and_remedy(tmp_path, monkeypatch, case):
    if case == "torn parquet":
        pytest.importorskip("pyarrow")
    source, files, words = BAD[case]
    write(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_documents(source)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_two_columns_conflict(tmp_path):
    write(tmp_path, {"a.jsonl": '{"a": "x", "b": "y"}'})
    with pytest.raises(ConfigError, match="drop one of the two"):
        read_documents(f"{tmp_path}/a.jsonl:a", column="b")
    assert read_documents(f"{tmp_path}/a.jsonl:a", column="a")[0].text == "x"
    with pytest.raises(ConfigError, match="drop the column"):
        read_documents("stdlib", column="a")
    with pytest.raises(ConfigError, match="drop one of the two"):
        read_documents("hf:name:config:a", column="b")


@pytest.mark.parametrize(
    ("closed", "mode", "named"),
    [("d/a.txt", 0, "d/a.txt"), ("d/e", 0, "d/e"), ("d/e", 0o400, "d/e/b.txt")],
)
def test_unreadable_data_is_named(tmp_path, closed, mode, named):
    write(tmp_path, {"d/a.txt": "x", "d/e/b.txt": "y"})
    path = tmp_path / closed
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    try:
        if os.access(path, os.X_OK if mode else os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(ConfigError, match=f"{named}: cannot be read .*permissions"):
            read_documents(str(tmp_path / "d"))
    finally:
        path.chmod(before)


def test_hub_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import fails
    with pytest.raises(ConfigError, match=r"hf:imdb: .*pip install .*\[hub\]'"):
        read_documents("hf:imdb")


def test_parquet_without_the_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path, {"a.parquet": b"PAR1"})
    with pytest.raises(ConfigError, match=r"a.parquet: .*pip install .*\[parquet\]'"):
        read_documents(str(tmp_path / "a.parquet"))


def test_hub_reads_columns_and_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # both are read when the package is imported
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    rows = '{"text": "a", "body": "b"}\n{"text": "c", "body": "d"}\n'
    write(tmp_path / "data", {"rows.jsonl": rows})
    source = f"hf:{tmp_path}/data"
    assert [d.text for d in read_documents(source)] == ["a", "c"]
    assert [d.text for d in read_documents(f"{source}::body")] == ["b", "d"]
    with pytest.raises(ConfigError, match="no column 'x' .*there: text, body"):
        read_documents(f"{source}::x")
    with pytest.raises(ConfigError, match="check the name and the network"):
        read_documents("hf:no-such-user/no-such-data")
