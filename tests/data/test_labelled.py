"""Labelled texts: distinct, split without leaks, every mistake one line."""

import numpy as np
import pytest

from mpjax.data.labelled import load_labelled
from mpjax.errors import ConfigError


def write(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return str(path)


ROWS = [("good", f"fine thing {i % 90}") for i in range(100)] + [
    ("bad", f"awful thing {i}") for i in range(100)
]


def test_a_file_is_split_without_a_text_on_both_sides(tmp_path):
    train, test = load_labelled(write(tmp_path / "a.tsv", ROWS))
    assert train.classes == test.classes == ("bad", "good")
    assert len(train) + len(test) == 190, "equal texts are kept once"
    assert not set(train.texts) & set(test.texts)
    assert 20 < len(test) < 60 and set(test.labels.tolist()) == {0, 1}
    assert all(
        (text[0] == "f") == bool(y) for text, y in zip(train.texts, train.labels, strict=True)
    )
    again = load_labelled(write(tmp_path / "b.tsv", ROWS[::-1]))
    assert set(again[1].texts) == set(test.texts), "the split is by content"
    other = load_labelled(str(tmp_path / "a.tsv"), seed=1)
    assert set(other[1].texts) != set(test.texts)


def test_a_byte_order_mark_is_no_part_of_the_first_label(tmp_path):
    text = "".join(f"{y}\ttext {y}{i}\n" for y in "xy" for i in range(40))
    (tmp_path / "a.tsv").write_text(text, encoding="utf-8-sig")
    assert load_labelled(str(tmp_path / "a.tsv"))[0].classes == ("x", "y")


def test_json_lines_and_pairs_are_read_too(tmp_path):
    lines = [f'{{"label": "{y}", "text": "a {y}{i}", "second": "b {y}{i}"}}\n' for y in "xy"
             for i in range(40)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(lines).replace('"a ', '"é '))
    train, _ = load_labelled(str(tmp_path / "a.jsonl"))
    assert all(
        a[2:] == b[2:] and a[0] == "é" for a, b in zip(train.texts, train.seconds, strict=True)
    )
    chosen = train.take(np.array([2, 0]))
    assert chosen.texts == (train.texts[2], train.texts[0]) and len(chosen.seconds) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("good\tfine\nbad\n", r"line 2: 1 field\(s\); expected label<TAB>text"),
        ("good\tfine\nbad\t \n", "line 2: empty field"),
        ("good\tfine\tmore\nbad\tthing\n", "line 2: 2 field"),
        ("", "empty; expected label<TAB>text"),
        ("".join(f"one\ttext {i}\n" for i in range(50)), "one class, 'one'"),
        ("".join(f"{i}\ttext {i}\n" for i in range(50)), "class '.*' is only held out"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, content, said):
    path = tmp_path / "a.tsv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_labelled(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: list"),
        ("{}", "line 1: no 'label'; expected the keys label text"),
        ('{"label": "a", "text": null}', "no 'text'"),
        ('{"label": "a", "second": "b"}', "no 'text'"),
    ],
)
def test_json_lines_that_are_wrong_are_one_line(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=said):
        load_labelled(str(tmp_path / "a.jsonl"))


def test_an_unknown_source_lists_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="no such source or file; expected a file of label"):
        load_labelled("review")
    (tmp_path / "a.tsv").write_bytes(b"good\t\xff\xfe\n")
    with pytest.raises(ConfigError, match="expected UTF-8"):
        load_labelled(str(tmp_path / "a.tsv"))
