"""Tables for a terminal, and the files that a report has beside its Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from mpjax.files import write_text
from mpjax.report import Outcome, csv_text, html_report, latex_text

Found = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, head, rows


def terminal(
    title: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    justify: Literal["left", "right"] = "right",
) -> Table:
    """Returns a table for a terminal; `justify` is of all columns but the first."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(head):
        table.add_column(column, justify=justify if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def write_page(
    out: Path, outcomes: Sequence[Outcome], found: Sequence[Found], notes: Sequence[str], unit: str
) -> None:
    """Writes report.html, and the first table as results.csv and results.tex.

    Args:
      out: folder of the report and of the runs.
      outcomes: whose curves are drawn.
      found: (title, head, rows) of the tables.
      notes: paragraphs below the first.
      unit: of the training loss.
    """
    title, head, rows = found[0]
    page = html_report(outcomes, title, tables=found, notes=notes, unit=unit, out=out)
    write_text(out / "report.html", page)
    write_text(out / "results.csv", csv_text(head, rows))
    write_text(out / "results.tex", latex_text(head, rows, title) + "\n")
