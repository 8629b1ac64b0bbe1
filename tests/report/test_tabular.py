"""CSV and LaTeX: what is read back is what was written, whatever the cells hold."""

from __future__ import annotations

import csv
import io
import re

import pytest

from mpjax.errors import ConfigError
from mpjax.report import Outcome, csv_table, csv_text, gap, interval, latex_table, latex_text

HOSTILE = [
    r"\input{x}", "50 % & more", "a_b^c", "$x$ #1 ~", "<b> \"quoted\" | ' `", "{open", "}close",
    "[opt]", "line\nfeed", r"\\", "C:\\dir",
]  # fmt: skip
NAMED = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
    r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", r"\{": "{", r"\}": "}",
    r"\$": "$", r"\&": "&", r"\#": "#", r"\%": "%", r"\_": "_", "{[}": "[", r"$\pm$": "±",
}  # fmt: skip
TOKEN = re.compile("|".join(map(re.escape, sorted(NAMED, key=len, reverse=True))))


def cells_of(latex: str) -> list[list[str]]:
    """The rows of a tabular: a small reader that knows no command but those of a table."""
    body = latex.split(r"\toprule")[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
    found = []
    for line in body.strip().splitlines():
        assert line.endswith(r" \\") or not line
        if line:
            # a bare special character is one that no token covers
            assert not re.search(r"[\\{}$#%_~^]", TOKEN.sub("", line.removesuffix(r" \\")))
            cells = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
            found.append([TOKEN.sub(lambda token: NAMED[token[0]], cell) for cell in cells])
    return found


def test_latex_holds_what_the_cells_hold():
    rows = [[text, "1.0 ± 0.5"] for text in HOSTILE]
    read = cells_of(latex_text(["arm", "x & y"], rows))
    assert read[0] == ["arm", "x & y"]
    assert read[1:] == [[" ".join(text.split()), "1.0 ± 0.5"] for text in HOSTILE]


def test_the_reader_of_latex_sees_what_is_not_escaped():
    with pytest.raises(AssertionError):
        cells_of("\\toprule\na_b & c \\\\\n\\bottomrule")


def test_csv_holds_what_the_cells_hold():
    rows = [[text, "1,000.5 ± 0.5", "+2.00 %", "–"] for text in [*HOSTILE, "a, b", "c;d"]]
    read = list(csv.reader(io.StringIO(csv_text(["arm", "score", "gap", "none"], rows))))
    assert read[0] == ["arm", "score", "half of score", "gap", "none"]
    assert [row[0] for row in read[1:]] == [row[0] for row in rows]
    assert all(row[1:] == ["1000.5", "0.5", "2.00", ""] for row in read[1:])


@pytest.mark.parametrize("text", ["1,5", "1.2.3", "12,34", "0 0 1", "2^16", "1-2", "+", "a ± b"])
def test_what_is_no_number_stays_as_it_is(text):
    (_, row) = csv.reader(io.StringIO(csv_text(["arm", "x"], [["a", text]])))
    assert row == ["a", text]


@pytest.mark.parametrize("write", [csv_text, latex_text])
def test_a_row_of_another_length_is_one_line(write):
    with pytest.raises(ConfigError, match="has 1 cells, the head 2"):
        write(["a", "b"], [["x", "y"], ["x"]])


def test_the_csv_of_a_comparison_has_all_digits():
    def made(label: str, losses: list[float]) -> Outcome:
        runs = [[{"step": 1, "loss": 1.0}] for _ in losses]
        return Outcome.from_records(label, runs, reference="a, b", validation_loss=losses)

    arms = [made("a, b", [1 / 3, 0.5]), made("c", [0.5, 0.75])]
    own, other = csv.DictReader(io.StringIO(csv_table(arms)))
    assert own["arm"] == "a, b" and own["gap_percent"] == own["tokens_per_s"] == ""
    assert float(own["validation_loss"]) == interval([1 / 3, 0.5])[0]
    pair = float(other["gap_percent"]), float(other["gap_percent_half"])
    assert pair == gap(arms[1], arms[0])
    assert latex_table(arms, "50 %").count(r"50 \%") == 1
