"""The report of a comparison, in Markdown and as a page, with its table as CSV and LaTeX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mpjax.errors import ConfigError, listed
from mpjax.files import write_text
from mpjax.report.comparison_table import COLUMNS, csv_table, latex_table, markdown_table, rows
from mpjax.report.html.page import html_report
from mpjax.report.results import Outcome
from mpjax.report.runs import arms_of, begun

MEASURES = (
    "Loss in nats a token on held-out files, judged in float32. ± is the 95 % confidence"
    " interval over seeds (Student's t); the gap is paired: same initial weights, same"
    " batches. Skipped steps are listed seed by seed."
)
_DRAWN = ("loss.png", "loss_scale.png", "monitor.png")  # the page draws these itself


def write_report(
    out: str | Path,
    title: str,
    outcomes: Sequence[Outcome],
    notes: Sequence[str],
    plots: Sequence[str],
) -> Path:
    """Writes `report.md` with the table, notes and plots, and returns its path.

    Beside it: `report.html`, the page of `html_report`, with the settings of the runs that lie as
    `LABEL/seed0` ... in the folder; `results.csv` and `results.tex`, the table.

    Args:
      out: folder; it is made if it is not there.
      title: heading.
      outcomes: rows of the table.
      notes: paragraphs below it.
      plots: files of pictures in the folder.
    """
    parts = [f"# {title}", markdown_table(outcomes)]
    parts.append(MEASURES)
    parts += notes
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    path = Path(out) / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n\n".join(parts) + "\n")
    write_text(path.with_name("results.csv"), csv_table(outcomes))
    write_text(path.with_name("results.tex"), latex_table(outcomes, title) + "\n")
    others = (path.with_name(plot) for plot in plots if plot not in _DRAWN)
    page = html_report(
        outcomes, title, tables=[("Comparison", COLUMNS, rows(outcomes))],
        notes=[MEASURES, *notes], pictures=[other for other in others if other.is_file()],
        out=path.parent,
    )  # fmt: skip
    write_text(path.with_name("report.html"), page)
    return path


def page_of_runs(
    folders: str | Path | Sequence[str | Path],
    title: str = "",
    *,
    reference: str = "",
    window: int = 20,
) -> str:
    """Returns the page of finished runs: of one its own, of several their comparison.

    Args:
      folders: of runs, of arms (`seed0`, `seed1` ...) or of whole comparisons.
      title: heading; by default the names of the arms.
      reference: label that the others are compared with; by default the first.
      window: records of the running mean.

    Raises:
      ConfigError: as `Outcome.from_run`; a reference or folder that is not there.
    """
    if isinstance(folders, str | Path):
        folders = [folders]
    # The arms of a comparison in the order in which they were trained, the reference first.
    arms = [arm for one in folders for arm in sorted(arms_of(Path(one)), key=begun)]
    outcomes = [Outcome.from_run(arm) for arm in arms]
    labels = [o.label for o in outcomes]
    if len(set(labels)) < len(labels):  # runs/a/fp32 and runs/b/fp32
        labels = [arm.as_posix() for arm in arms]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"report: a folder is named twice among {listed(labels)}; name each once")
    reference = reference or (labels[0] if labels else "")
    if reference not in labels:
        raise ConfigError(f"reference: {reference!r} is none of {listed(labels)}; name one of them")
    outcomes = [
        dataclasses.replace(o, label=label, reference=reference)
        for o, label in zip(outcomes, labels, strict=True)
    ]
    title = title or (labels[0] if len(labels) == 1 else f"{len(labels)} arms")
    several = [("Comparison", COLUMNS, rows(outcomes))] if len(outcomes) > 1 else []
    note = (
        "± is the 95 % confidence interval over seeds (Student's t); the n-th seed of an arm is"
        " paired with the n-th of its reference."
    )
    return html_report(
        outcomes, title, tables=several, notes=[note] * len(several), unit="nats", window=window
    )
