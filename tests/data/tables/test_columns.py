"""Columns of odd tables: what pandas reads of them, or one line; counts add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mpjax.data.split import stratified
from mpjax.data.tables.columns import read_columns
from mpjax.errors import ConfigError

KINDS = {"text": "text", "label": "class"}
LONG = "x" * 1_000_000

# name -> content of a .csv, of which pandas reads `text` and `label`
RIGHT = {
    "plain": "text,label\na b,1\nc,0\n",
    "other order": "label,text\n1,a b\n0,c\n",
    "more columns": "id,text,x,label\n7,a b,,1\n8,c,,0\n",
    "CRLF": "text,label\r\na b,1\r\nc,0\r\n",
    "old Mac": "text,label\ra b,1\rc,0\r",
    "BOM": "\ufefftext,label\na b,1\nc,0\n",
    "quotes": 'text,label\n"a, b",1\n"say ""hi""",0\n',
    "lines in a cell": 'text,label\n"a\nb",1\nc,0\n',
    "no last newline": "text,label\na b,1\nc,0",
    "emoji": "text,label\n👍🏽 fine,1\n日本語 é,0\n",
    "right to left": "text,label\nשלום,1\nمرحبا,0\n",
    "blank lines": "text,label\na b,1\n\n\nc,0\n",
    "spaces around": "text,label\n  a b ,1\nc, 0\n",
    "a megabyte": f"text,label\n{LONG},1\nc,0\n",
    "repeats": "text,label\na,1\na,1\na,0\n",
    "one class": "text,label\na,1\nb,1\n",
    "words as labels": "text,label\na,good\nb,bad\n",
    "float labels": "text,label\na,1.0\nb,0.0\n",
    "leading zeros": "text,label\na,007\nb,7\n",
    "a tab in a cell": 'text,label\n"a\tb",1\nc,0\n',
    "semicolon in a cell": 'text,label\n"a;b",1\nc,0\n',
    "numbers as texts": "text,label\n12,1\n3.5,0\n",
    "NA is a word": "text,label\nNA,1\nnull,0\n",
    "a header alone twice far": "text,label\ntext and label,1\nc,0\n",
}


def clean(values: list[str]) -> list[str]:
    """As read: without spaces around; whole numbers without their zeros, if all are."""
    texts = [str(v).strip() for v in values]
    whole = [t.removesuffix(".0") for t in texts]
    return whole if all(w.isdecimal() and str(int(w)) == w for w in whole) else texts


@pytest.mark.parametrize("name", RIGHT)
def test_tables_are_what_pandas_reads(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(RIGHT[name].encode())
    found = read_columns(path, KINDS)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=True)
    texts = [text.strip().replace("\r\n", "\n") for text in frame["text"]]
    assert found.values == {"text": texts, "label": clean(list(frame["label"]))}
    assert found.read == len(frame) and not found.missing


WRONG = {
    "empty": ("", "empty; expected"),
    "header alone": ("text,label\n", "no row is left of 0"),
    "a column twice": ("text,text,label\na,b,1\n", "twice|name twice"),
    "too many cells": ("text,label\na,b,1\n", "3 field\\(s\\), 2 in line 1"),
    "too few cells": ("text,label\na\n", "1 field\\(s\\), 2 in line 1"),
    "an open quote": ('text,label\n"a,1\nb,0\n', "own.csv"),
    "the header again": ("text,label\na,1\ntext,label\n", "the header of line 1 again"),
    "no such column": ("body,label\na,1\n", "and none 'text'"),
    "an empty text": ("text,label\n,1\nb,0\n", "line 2: no 'text'; fill it in"),
    "an empty label": ("text,label\na,\nb,0\n", "line 2: no 'label'; fill it in"),
    "UTF-16": ("text,label\na,1\n".encode("utf-16"), "own.csv"),
    "Latin-1": ("text,label\ncafé,1\n".encode("latin-1"), "expected UTF-8"),
    "NUL": ("text,label\na\0,1\n", "NUL"),
    "an image": (bytes(range(256)) * 4, "own.csv"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    content, said = WRONG[name]
    path = tmp_path / "own.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=said) as error:
        read_columns(path, KINDS)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


ROWS = [{"t": "a b", "y": 1}, {"t": "c", "y": 0}, {"t": "d", "y": 1}]
COLUMNS = {"text": "t", "label": "y"}


def sources(folder: Path) -> dict[str, Any]:
    """One table in every form."""
    frame = pd.DataFrame(ROWS)
    frame.to_parquet(folder / "a.parquet")
    frame.to_csv(folder / "a.csv", index=False)
    frame.to_csv(folder / "a.tsv", index=False, sep="\t")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps(ROWS))
    files = {name: folder / f"a.{name}" for name in ("parquet", "csv", "tsv", "jsonl", "json")}
    arrays = {"t": np.array([r["t"] for r in ROWS]), "y": np.array([r["y"] for r in ROWS])}
    return files | {"dicts": ROWS, "iterator": iter(ROWS), "frame": frame, "arrays": arrays}


FORMS = ("parquet", "csv", "tsv", "jsonl", "json", "dicts", "iterator", "frame", "arrays")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_table(form: str, tmp_path: Path) -> None:
    source = sources(tmp_path)[form]
    found = read_columns(source, KINDS, COLUMNS)
    assert found.values == {"text": ["a b", "c", "d"], "label": ["1", "0", "1"]}
    assert (found.read, found.missing) == (3, 0)
    with pytest.raises(ConfigError, match=r"no column 'x' \(there: .*t.*\); name the one of the t"):
        read_columns(sources(tmp_path)[form], KINDS, COLUMNS | {"text": "x"})


@pytest.mark.parametrize("hole", [None, float("nan"), "", "  ", pd.NA, pd.NaT])
def test_missing_values(hole: Any) -> None:
    rows = [*ROWS, {"t": hole, "y": 1}, {"t": "e", "y": hole}]
    with pytest.raises(ConfigError, match="data, row 4: no 't'; fill it in"):
        read_columns(rows, KINDS, COLUMNS)
    found = read_columns(rows, KINDS, COLUMNS, missing="drop")
    assert found.read == 5 and found.missing == 2 and found.values["text"] == ["a b", "c", "d"]
    empty = read_columns(rows[:4], KINDS, COLUMNS, missing="empty")
    assert empty.values["text"][3] == "" and not empty.missing
    with pytest.raises(ConfigError, match="row 5: no 'y'"):  # no label can be empty
        read_columns(rows, KINDS, COLUMNS, missing="empty")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"t": ["a"], "y": 1}], "'t' is of type list"),
        ([{"t": "a", "y": {"b": 1}}], "'y' is of type dict"),
        ([{"t": "a", "y": 1.5}], "'y' is of type float"),
        ([{"t": "a", "y": 1}, {"t": "b", "y": "x"}], "is a number, and .* text; write all alike"),
        ([{"t": 3, "y": 1}], "'t' is of type int"),
        (["a"], "data, row 1 is 'a'; give a dict"),
        ([], "no rows|no row is left"),
        (3, "3 is no data"),
        (None, "None is no data"),
        (b"text", "is no data"),
        ({"t": ["a"], "y": [1, 2]}, "columns of .* rows"),
        ("no/such.csv", "no such file"),
        ("hf:", "malformed"),
    ],
)
def test_odd_sources_are_one_line(rows: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        read_columns(rows, KINDS, COLUMNS)
    assert "\n" not in str(error.value)


def test_numbers() -> None:
    kinds = {"text": "text", "label": "number"}
    rows = [{"text": "a", "label": x} for x in (1, 2.5, "3e-1", np.float32(0.5))]
    assert read_columns(rows, kinds).values["label"] == [1.0, 2.5, 0.3, 0.5]
    for bad in (True, "x", float("inf"), [1]):
        with pytest.raises(ConfigError, match="expected a finite number"):
            read_columns([{"text": "a", "label": bad}], kinds)


def test_a_table_without_a_header_has_the_columns_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a b\tgood\nc\tbad\nd\tgood\n")
    assert read_columns(path, KINDS).values["label"] == ["good", "bad", "good"]
    with pytest.raises(ConfigError, match="no column 'body'"):
        read_columns(path, KINDS, {"text": "body"})


@pytest.mark.parametrize("seed", range(5))
def test_a_stratified_split_has_each_class_and_keeps_equal_texts_together(seed: int) -> None:
    draw = np.random.default_rng(seed)
    contents = [f"text {n}" for n in draw.integers(0, 120, 300)]
    classes = [("a", "b", "c")[int(draw.choice(3, p=(0.7, 0.25, 0.05)))] for _ in contents]
    out = stratified(contents, classes, 0.2, seed=seed)
    assert not {c for c, o in zip(contents, out, strict=True) if o} & {
        c for c, o in zip(contents, out, strict=True) if not o
    }
    # Of distinct texts the share of a class is exact to one text.
    distinct = list(dict.fromkeys(contents))
    kind = {c: k for c, k in reversed(list(zip(contents, classes, strict=True)))}
    out = stratified(distinct, [kind[c] for c in distinct], 0.2, seed=seed)
    for name in "abc":
        mine = [o for c, o in zip(distinct, out, strict=True) if kind[c] == name]
        assert abs(sum(mine) - 0.2 * len(mine)) <= 1 and 0 < sum(mine) < len(mine)
    assert (stratified(distinct, [kind[c] for c in distinct], 0.2, seed=seed + 9) != out).any()
