"""The table of a comparison: where it is written, and what it refuses."""

from __future__ import annotations

import pytest

from mpjax.errors import ConfigError
from mpjax.report import Outcome, markdown_table, plot_loss, rich_table, write_report


def outcome(label: str, reference: str, loss: float) -> Outcome:
    records = ([{"step": 1, "loss": loss, "loss_scale": 1.0, "skipped": 0}],)
    return Outcome(label, reference, (loss,), 10.0, 12.0, (0,), (1.0,), records)


ARMS = [outcome("a", "a", 2.0), outcome("b", "a", 1.0)]


def test_a_report_goes_where_a_text_says(tmp_path):
    path = write_report(f"{tmp_path}/new/folder", "Title", ARMS, ["A note."], ["loss.png"])
    text = path.read_text()
    assert path == tmp_path / "new" / "folder" / "report.md"
    assert "-50.00" in text and "A note." in text and "![loss](loss.png)" in text


@pytest.mark.parametrize("show", [markdown_table, plot_loss, lambda arms: rich_table(arms, "t")])
@pytest.mark.parametrize(
    ("arms", "parts"),
    [
        ([], ("no outcomes", "at least one")),
        ([ARMS[0], ARMS[0], outcome("a", "a", 3.0)], ("two arms", "'a'")),
        ([ARMS[1]], ("b is compared with 'a'", "add it")),
    ],
    ids=["none", "twice", "no reference"],
)
def test_outcomes_that_make_no_comparison_are_one_line(show, arms, parts):
    with pytest.raises(ConfigError) as found:
        show(arms)
    assert all(part in str(found.value) for part in parts), found.value
