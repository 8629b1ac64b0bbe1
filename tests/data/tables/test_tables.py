"""Users' tables: each file has its right result, written by hand, or one line; counts add up."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mpjax.data.labelled import load_labelled
from mpjax.data.pairs import load_pairs
from mpjax.data.tables.rows import read_rows
from mpjax.data.tagged import load_tagged
from mpjax.data.text import read_documents
from mpjax.errors import ConfigError

ROWS = [("pos" if i % 2 else "neg", f"text {i}") for i in range(40)]
TSV = "".join(f"{label}\t{text}\n" for label, text in ROWS)
CSV = TSV.replace("\t", ",")
OBJECTS = [{"label": label, "text": text} for label, text in ROWS]


def lines(objects: list[Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def labelled(values: list[Any]) -> str:
    """JSON lines of these labels by turns."""
    return lines([{"label": values[i % len(values)], "text": f"text {i}"} for i in range(40)])


class Table(NamedTuple):
    """A file of labelled texts.

    Args:
        name: of the file.
        content: what is in it.
        more: (label, text) beyond `ROWS`, or all where `only`.
        only: whether `ROWS` are not in it.
        left: words and numbers of the logged line of what is left out.
        error: what its one line says; then there is no result.
    """

    name: str
    content: str | bytes
    more: tuple[tuple[str, str], ...] = ()
    only: bool = False
    left: tuple[str, ...] = ()
    error: str = ""


def own(labels: list[str]) -> tuple[tuple[str, str], ...]:
    return tuple((labels[i % len(labels)], f"text {i}") for i in range(40))


HUGE = "word " * 60_000 + "end"
TABLES = {
    # separators, ends of lines, encodings
    "tsv": Table("a.tsv", TSV),
    "any suffix is tabs": Table("a.txt", TSV),
    "no suffix": Table("a", TSV),
    "csv": Table("a.csv", CSV),
    "csv in capitals": Table("a.CSV", CSV),
    "csv of tabs": Table("a.csv", TSV),
    "csv of semicolons": Table("a.csv", TSV.replace("\t", ";")),
    "tsv of commas": Table("a.tsv", CSV, error="line 1: 1 field.s.; expected label<TAB>text"),
    "crlf": Table("a.tsv", TSV.replace("\n", "\r\n")),
    "csv crlf": Table("a.csv", CSV.replace("\n", "\r\n")),
    "cr": Table("a.tsv", TSV.replace("\n", "\r")),
    "no last end": Table("a.tsv", TSV.rstrip()),
    "mark": Table("a.tsv", TSV.encode("utf-8-sig")),
    "mark and header": Table("a.csv", ("label,text\n" + CSV).encode("utf-8-sig")),
    "mark, jsonl": Table("a.jsonl", lines(OBJECTS).encode("utf-8-sig")),
    "utf-16": Table("a.tsv", TSV.encode("utf-16"), error="cannot be read .*UTF-8"),
    "utf-16 without a mark": Table("a.tsv", TSV.encode("utf-16-le"), error="NUL .*as of UTF-16"),
    "latin-1": Table("a.tsv", (TSV + "pos\tcafé\n").encode("latin-1"), error="expected UTF-8"),
    "latin-1, jsonl": Table("a.jsonl", b'{"label": "a", "text": "caf\xe9"}', error="UTF-8"),
    "unicode separators": Table(
        "a.tsv", TSV + "pos\ta\u2028b\x85c\x0bd\u2029e\n", (("pos", "a\u2028b\x85c\x0bd\u2029e"),)
    ),
    "unicode separators, csv": Table(
        "a.csv", CSV + "pos,a\u2028b\x1ec\n", (("pos", "a\u2028b\x1ec"),)
    ),
    "unicode separators, jsonl": Table(
        "a.jsonl",
        lines(OBJECTS) + json.dumps({"label": "pos", "text": "a\u2028b"}, ensure_ascii=False),
        (("pos", "a\u2028b"),),
    ),
    "other scripts": Table("a.csv", CSV + "pos,汉字 و हिन्दी 🙂\n", (("pos", "汉字 و हिन्दी 🙂"),)),
    # headers
    "header": Table("a.tsv", "label\ttext\n" + TSV),
    "header in capitals": Table("a.tsv", " Label\tTEXT \n" + TSV),
    "header behind empty lines": Table("a.tsv", "\n\nlabel\ttext\n" + TSV),
    "header in quotes": Table("a.csv", '"label","text"\n' + CSV),
    "header, other order": Table("a.csv", "text,label\n" + "".join(f"{b},{a}\n" for a, b in ROWS)),
    "header, more columns": Table(
        "a.csv",
        ",id,text,label\n" + "".join(f"{i},x{i},{b},{a}\n" for i, (a, b) in enumerate(ROWS)),
    ),
    "header of other names": Table(
        "a.csv", "sentiment,review\n" + CSV, error="'sentiment' is in no other"
    ),
    "header of one name": Table("a.csv", "sentence,label\n" + CSV, error="'label' and none 'text'"),
    "header with a name twice": Table("a.csv", "label,text,text\n" + CSV, error="name twice"),
    "header again": Table(
        "a.tsv", ("label\ttext\n" + TSV) * 2, error="line 42: the header of line 1"
    ),
    "header only": Table("a.tsv", "label\ttext\n", error="no rows"),
    # quotes
    "doubled quotes": Table(
        "a.tsv",
        TSV + 'pos\t"He said ""wow"" to me"\nneg\t"a, b"\n',
        (("pos", 'He said "wow" to me'), ("neg", "a, b")),
    ),
    "doubled quotes, csv": Table(
        "a.csv", CSV + 'pos,"He said ""wow"", to me"\n', (("pos", 'He said "wow", to me'),)
    ),
    "all in quotes": Table("a.csv", "".join(f'"{a}","{b}"\n' for a, b in ROWS)),
    "line ends in a cell": Table(
        "a.csv", CSV + 'pos,"one\ntwo\r\nthree"\n', (("pos", "one\ntwo\nthree"),)
    ),
    "line end in a cell, tsv": Table("a.tsv", TSV + 'pos\t"one\ntwo"\n', (("pos", "one\ntwo"),)),
    "tab in a cell": Table("a.tsv", TSV + 'pos\t"left\tright"\n', (("pos", "left\tright"),)),
    "quotes that are text": Table(
        "a.tsv",
        TSV + 'pos\t"Great" film\nneg\tsaid "no"\n',
        (("pos", '"Great" film'), ("neg", 'said "no"')),
    ),
    "a quote that stays open": Table("a.tsv", 'pos\t"open\n' + TSV, (("pos", '"open'),)),
    "quotes that cross rows": Table(
        "a.tsv", 'pos\t"open\n' + TSV + 'neg\tclosed"\n', (("pos", '"open'), ("neg", 'closed"'))
    ),
    "a quote that stays open, csv": Table(
        "a.csv", CSV + 'pos,"open\n', error="line 41: unexpected end"
    ),
    "text behind quotes, csv": Table("a.csv", CSV + 'pos,"a" b\n', error="line 41: .*double those"),
    # cells and rows
    "ragged": Table("a.csv", CSV + "pos,one, two\n", error="line 41: 3 field"),
    "ragged under a header": Table(
        "a.csv", "label,text\n" + CSV + "pos\n", error="line 42: 1 field"
    ),
    "ragged behind a cell of two lines": Table(
        "a.csv", CSV + 'pos,"a\nb"\npos\n', error="line 43: 1 field"
    ),
    "empty cell": Table("a.csv", CSV + "pos,\n", error="line 41: empty field"),
    "cell of spaces": Table("a.tsv", TSV + "pos\t  \n", error="line 41: empty field"),
    "empty lines": Table("a.tsv", "\n" + TSV.replace("\n", "\n\n  \n")),
    "rows of empty cells": Table(
        "a.csv", CSV + ",\n,\n" + "pos,last\n", (("pos", "last"),), left=("2 blank",)
    ),
    "spaces around": Table("a.csv", CSV + " pos , last \n", (("pos", "last"),)),
    "label with spaces": Table(
        "a.csv",
        CSV + "very good,x\nvery good,y\nvery good,z\nvery good,w\nvery good,v\n",
        tuple(("very good", c) for c in "xyzwv"),
    ),
    "huge cell": Table("a.csv", CSV + f"pos,{HUGE}\n", (("pos", HUGE),)),
    "huge cell in quotes": Table("a.tsv", TSV + f'pos\t"{HUGE}"\n', (("pos", HUGE),)),
    "duplicates": Table(
        "a.tsv", TSV + TSV[: TSV.index("text 3")] + "text 3\n", left=("4 equal to an earlier",)
    ),
    "duplicates of another label": Table(
        "a.tsv",
        TSV + "neg\ttext 1\npos\ttext 1\n",
        left=("1 equal to an earlier", "1 equal but for the label"),
    ),
    "columns swapped": Table("a.tsv", "".join(f"{b}\t{a}\n" for a, b in ROWS), error="swapped"),
    "one class": Table("a.tsv", TSV.replace("neg", "pos"), error="one class, 'pos'"),
    "empty": Table("a.csv", "", error="empty; expected label,text"),
    "text of missing values": Table(
        "a.csv",
        CSV + "pos,nan\npos,None\npos,null\npos,NA\n",
        tuple(("pos", t) for t in ("nan", "None", "null", "NA")),
    ),
    # classes that are numbers
    "numbers": Table(
        "a.csv", "".join(f"{i % 3},text {i}\n" for i in range(40)), own(["0", "1", "2"]), True
    ),
    "0 and 0.0": Table(
        "a.csv",
        "".join(f"{['0', '1', '0.0', '1.0'][i % 4]},text {i}\n" for i in range(40)),
        own(["0", "1"]),
        True,
    ),
    "leading zeros": Table(
        "a.csv",
        "".join(f"{['007', '7', '07'][i % 3]},text {i}\n" for i in range(60)),
        tuple((["007", "7", "07"][i % 3], f"text {i}") for i in range(60)),
        True,
    ),
    "jsonl numbers": Table("a.jsonl", labelled([0, 1, 0.0, 1.0]), own(["0", "1"]), True),
    "jsonl negative zero": Table(
        "a.jsonl", labelled([-1, 0, -0.0, 1]), own(["-1", "0", "0", "1"]), True
    ),
    "jsonl true and false": Table("a.jsonl", labelled([True, False]), own(["True", "False"]), True),
    "jsonl bool and number": Table(
        "a.jsonl", labelled([True, 1]), error="true or false in line 1 and a number in line 2"
    ),
    "jsonl number and text": Table(
        "a.jsonl", labelled([0, "0"]), error="a number in line 1 and text in line 2"
    ),
    "jsonl scores": Table(
        "a.jsonl",
        labelled([1, 0.37]),
        error="line 2: 'label' is of type float .0.37.; expected one",
    ),
    "jsonl infinity": Table(
        "a.jsonl", labelled([1, float("inf")]), error="line 2: 'label' is of type float"
    ),
    # JSON
    "jsonl": Table("a.jsonl", lines(OBJECTS)),
    "jsonl in capitals": Table("a.JSONL", lines(OBJECTS)),
    "ndjson crlf": Table("a.ndjson", lines(OBJECTS).replace("\n", "\r\n")),
    "jsonl empty lines": Table("a.jsonl", lines(OBJECTS).replace("\n", "\n\n \n")),
    "jsonl more keys": Table("a.jsonl", lines([one | {"id": [1], "x": None} for one in OBJECTS])),
    "json list": Table("a.json", json.dumps(OBJECTS, indent=1)),
    "json of lines": Table("a.json", lines(OBJECTS)),
    "jsonl NaN text": Table(
        "a.jsonl",
        lines([*OBJECTS, {"label": "a", "text": float("nan")}]),
        error="line 41: 'text' is NaN",
    ),
    "jsonl NaN label": Table(
        "a.jsonl",
        lines([*OBJECTS, {"label": float("nan"), "text": "a"}]),
        error="line 41: 'label' is NaN",
    ),
    "jsonl null": Table(
        "a.jsonl", lines([*OBJECTS, {"label": "a", "text": None}]), error="line 41: no 'text'"
    ),
    "jsonl list text": Table(
        "a.jsonl",
        lines([*OBJECTS, {"label": "a", "text": ["b"]}]),
        error="line 41: 'text' is of type list",
    ),
    "jsonl dict text": Table(
        "a.jsonl",
        lines([{"label": "a", "text": {"en": "b"}}]),
        error="line 1: 'text' is of type dict",
    ),
    "jsonl number text": Table(
        "a.jsonl", lines([{"label": "a", "text": 3}]), error="line 1: 'text' is of type int"
    ),
    "jsonl list label": Table(
        "a.jsonl", lines([{"label": ["a", "b"], "text": "c"}]), error="'label' is of type list"
    ),
    "jsonl key twice": Table(
        "a.jsonl", '{"label": "a", "label": "b", "text": "c"}', error="'label' twice"
    ),
    "jsonl surrogate": Table(
        "a.jsonl", '{"label": "a", "text": "\\ud800"}', error="half a surrogate"
    ),
    "jsonl NUL": Table("a.jsonl", '{"label": "a", "text": "b\\u0000"}', error="NUL"),
    "jsonl indented": Table("a.jsonl", json.dumps(OBJECTS, indent=1), error="line 1: not JSON"),
    "jsonl second in some": Table(
        "a.jsonl", lines([*OBJECTS, OBJECTS[0] | {"second": "b"}]), error="line 41: 3 field"
    ),
    "json list of lists": Table("a.json", '[["a", "b"]]', error="object 1: list"),
    "json object of columns": Table(
        "a.json", '{"label": ["a"], "text": ["b"]}', error="'label' is of type list"
    ),
}


def rows_of(path: Path) -> set[tuple[str, str]]:
    sides = load_labelled(str(path))
    assert not set(sides[0].texts) & set(sides[1].texts)
    return {
        (side.classes[y], text)
        for side in sides
        for y, text in zip(side.labels, side.texts, strict=True)
    }


def counted(log: str) -> tuple[int, int]:
    """What was read, and what was used and left out, of the logged line."""
    line = next(line for line in log.splitlines() if " read: " in line)
    read, rest = re.search(r": (\d+) \w+ read: (.*)", line).groups()  # type: ignore[union-attr]
    return int(read), sum(int(n) for n in re.findall(r"(?:^|[,:] )(\d+) ", rest))


@pytest.mark.parametrize("case", TABLES)
def test_a_table_is_read_right_or_refused_in_one_line(case, tmp_path, caplog):
    table = TABLES[case]
    path = tmp_path / table.name
    content = table.content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    caplog.set_level(logging.INFO, "mpjax.data")
    if table.error:
        with pytest.raises(ConfigError, match=table.error) as caught:
            load_labelled(str(path))
        assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)
        return
    assert rows_of(path) == {*(() if table.only else ROWS), *table.more}
    read, together = counted(caplog.text)
    used = (0 if table.only else 40) + len(table.more)
    dropped = sum(int(left.split()[0]) for left in table.left)
    assert read == together == used + dropped
    for words in table.left:
        assert words in caplog.text
    assert bool(table.left) == any("left out: " in r.getMessage() for r in caplog.records
                                   if r.levelno == logging.WARNING)  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"label": [a for a, _ in ROWS], "text": [b for _, b in ROWS], "id": list(range(40))}, ""),
        (
            {"label": [a for a, _ in ROWS] + ["a"], "text": [b for _, b in ROWS] + [None]},
            "row 41: no 'text'",
        ),
        ({"label": [0.0, 1.5], "text": ["a", "b"]}, "row 2: 'label' is of type float"),
        ({"label": ["a"], "body": ["b"]}, "no 'text'"),
        ({"x": ["a"]}, "no column 'label'"),
        ({"label": ["a"], "text": [b"b"]}, "'text' is of type bytes"),
    ],
)
def test_parquet_is_read_by_its_types(columns, error, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table(columns)
    if not error:
        at = table.column_names.index("label")
        table = table.set_column(at, "label", table["label"].dictionary_encode())
    parquet.write_table(table, path)
    if error:
        with pytest.raises(ConfigError, match=error):
            load_labelled(str(path))
    else:
        assert rows_of(path) == set(ROWS)


PAIRS = [(f"hallo {i}", f"hello {i}") for i in range(60)]
PAIR_LINES = "".join(f"{a}\t{b}\n" for a, b in PAIRS)
PAIR_FILES = {
    "plain": ("a.tsv", PAIR_LINES, 0),
    "header": ("a.tsv", "source\ttarget\n" + PAIR_LINES, 0),
    "header, other order": (
        "a.csv",
        "target,source\n" + "".join(f"{b},{a}\n" for a, b in PAIRS),
        0,
    ),
    "header of one name": (
        "a.csv",
        "source,translation\n" + PAIR_LINES,
        "'source' and none 'target'",
    ),
    "duplicates": ("a.tsv", PAIR_LINES + PAIR_LINES, 60),
    "jsonl": ("a.jsonl", lines([{"source": a, "target": b} for a, b in PAIRS]), 0),
    "number": ("a.jsonl", lines([{"source": "1+1", "target": 2}]), "'target' is of type int"),
    "list": ("a.jsonl", lines([{"source": "a", "target": ["b"]}]), "'target' is of type list"),
    "three columns": ("a.tsv", "a\tb\tc\n", "line 1: 3 field"),
}


@pytest.mark.parametrize("case", PAIR_FILES)
def test_pairs_are_read_right_or_refused_in_one_line(case, tmp_path, caplog):
    name, content, wanted = PAIR_FILES[case]
    (tmp_path / name).write_text(content)
    caplog.set_level(logging.INFO, "mpjax.data")
    if isinstance(wanted, str):
        with pytest.raises(ConfigError, match=wanted):
            load_pairs(str(tmp_path / name))
        return
    train, test = load_pairs(str(tmp_path / name))
    assert sorted(train + test) == sorted(PAIRS)
    assert counted(caplog.text) == (60 + wanted, 60 + wanted)
    assert ("left out: " in caplog.text) == bool(wanted)


SENTENCES = [tuple((f"w{i}{j}", "B-PER" if j == 1 else "O") for j in range(4)) for i in range(60)]
CONLL = "\n".join("".join(f"{w}\t{t}\n" for w, t in s) for s in SENTENCES)
QUOTED = (('"', "O"), ("a", "O"), ('"', "O"))
TAG_FILES = {
    "plain": ("a.txt", CONLL, (), 0),
    "header": ("a.tsv", "word\ttag\n" + CONLL, (), 0),
    "header, other order": (
        "a.csv",
        "tag,id,word\n" + "\n".join("".join(f"{t},1,{w}\n" for w, t in s) for s in SENTENCES),
        (),
        0,
    ),
    "header of other names": (
        "a.txt",
        "token\tner\n" + CONLL,
        (),
        "the tag 'ner' is in no other row",
    ),
    "header of one name": ("a.txt", "token\ttag\n" + CONLL, (), "'tag' and none 'word'"),
    "docstart": ("a.txt", "-DOCSTART-\tO\n\n" + CONLL, (), 1),
    "crlf": ("a.txt", CONLL.replace("\n", "\r\n"), (), 0),
    "mark": ("a.txt", "\ufeff" + CONLL, (), 0),
    "line of a tab": ("a.txt", CONLL.replace("\n\n", "\n\t\n"), (), 0),
    "words that are quotes": ("a.txt", CONLL + '\n"\tO\na\tO\n"\tO\n', (QUOTED,), 0),
    "quotes of a spreadsheet": (
        "a.csv",
        CONLL.replace("\t", ",") + '\n"""",O\na,O\n"""",O\n',
        (QUOTED,),
        0,
    ),
    "words of commas": ("a.txt", CONLL + "\n,\tO\n1,000\tO\n", (((",", "O"), ("1,000", "O")),), 0),
    "duplicates": ("a.txt", CONLL + "\n" + CONLL, (), 60),
    "four columns": (
        "a.txt",
        CONLL.replace("\t", "\tX\tX\t"),
        (),
        "line 1: 'w00 X X O'; expected word",
    ),
    "spaces": ("a.txt", CONLL.replace("\t", " "), (), "line 1: 'w00 O'; expected word"),
    "a word without a tag": ("a.txt", CONLL + "x\n", (), "expected word"),
    "header only": ("a.txt", "word\ttag\n", (), "no sentence"),
}


@pytest.mark.parametrize("case", TAG_FILES)
def test_tagged_sentences_are_read_right_or_refused_in_one_line(case, tmp_path, caplog):
    name, content, more, wanted = TAG_FILES[case]
    (tmp_path / name).write_bytes(content.encode())
    caplog.set_level(logging.INFO, "mpjax.data")
    if isinstance(wanted, str):
        with pytest.raises(ConfigError, match=wanted):
            load_tagged(str(tmp_path / name))
        return
    sides = load_tagged(str(tmp_path / name))
    found = [
        tuple((w, side.names[t]) for w, t in zip(words, tags, strict=True))
        for side in sides
        for words, tags in zip(side.words, side.tags, strict=True)
    ]
    assert sorted(found) == sorted([*SENTENCES, *more])
    count = 60 + len(more) + wanted
    assert counted(caplog.text) == (count, count)


def test_the_order_of_rows_and_their_second_texts_stay(tmp_path):
    (tmp_path / "a.csv").write_text('second,label,text\nc,x,"a\nb"\nf,y,d\n')
    rows = read_rows(tmp_path / "a.csv", ("label", "text"), ("second",), classes="label")
    assert rows.rows == [["x", "a\nb", "c"], ["y", "d", "f"]] and not rows.blank


def test_classes_that_differ_in_case_only_are_named(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text(TSV + "".join(f"Pos\tmore {i}\n" for i in range(9)))
    load_labelled(str(tmp_path / "a.tsv"))
    assert "'Pos' and 'pos' differ in case only" in caplog.text


def test_a_mixture_of_quotes_is_said(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text(TSV + 'pos\t"Great" film\nneg\t"a ""b"""\n')
    assert ("neg", '"a ""b"""') in rows_of(tmp_path / "a.tsv")
    assert "quotes are read as text" in caplog.text and "line 42" in caplog.text


def test_rows_inside_quotes_are_said(tmp_path, caplog):
    (tmp_path / "a.csv").write_text(CSV + 'pos,"one, two\nthree\nfour, five"\n')
    load_labelled(str(tmp_path / "a.csv"))
    assert "look like rows" not in caplog.text
    (tmp_path / "a.csv").write_text(
        CSV + 'pos,"open\n' + CSV.replace("text", "more") + 'neg,closed"\n'
    )
    load_labelled(str(tmp_path / "a.csv"))
    assert "line 41: a cell in quotes holds lines that look like rows" in caplog.text


def test_documents_have_no_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    (tmp_path / "a.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [d.text for d in read_documents(str(tmp_path / "a.txt"))] == ["hello\r\n"]
    found = read_documents(str(tmp_path / "a.JSONL"))
    assert [(d.name, d.text) for d in found] == [("a.JSONL:1", "a"), ("a.JSONL:3", "b")]
    (tmp_path / "b.jsonl").write_text('{"text": "a", "text": "b"}')
    with pytest.raises(ConfigError, match="'text' twice"):
        read_documents(str(tmp_path / "b.jsonl"))
