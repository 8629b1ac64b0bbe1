"""The table of a comparison, for the terminal and as a report in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from mpjax import markdown
from mpjax.files import write_text
from mpjax.report.results import Outcome, check_outcomes, gap, interval

COLUMNS = (
    "arm",
    "validation loss",
    "gap to reference",
    "reference",
    "tokens/s",
    "bytes/param",
    "skipped",
    "final scale",
)


def _plus_minus(mean: float, half: float, digits: int) -> str:
    width = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    return f"{mean:.{digits}f}{width}"


def _scale(values: Sequence[float]) -> str:
    if all(value == 1 for value in values):
        return "–"
    low, high = (math.log2(value) for value in (min(values), max(values)))
    text = [f"2^{power:.3g}" for power in (low, high)]
    return text[0] if low == high else " .. ".join(text)


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Returns the cells of the table, one row an arm."""
    by_label = check_outcomes(outcomes)
    cells: list[tuple[str, ...]] = []
    for o in outcomes:
        own = o.reference == o.label
        difference = gap(o, by_label[o.reference])
        cells.append(
            (
                o.label,
                _plus_minus(*interval(o.validation_loss), 4),
                "–" if own else f"{difference[0]:+.2f} ± {difference[1]:.2f} %",
                "–" if own else o.reference,
                f"{o.tokens_per_s:,.0f}",
                f"{o.bytes_per_parameter:.2f}",
                " ".join(str(n) for n in o.skipped),
                _scale(o.loss_scale),
            )
        )
    return cells


def rich_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """Returns the table for a terminal."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number in (0, 3) else "right")
    for row in rows(outcomes):
        table.add_row(*row)
    return table


def markdown_table(outcomes: Sequence[Outcome]) -> str:
    """Returns the table in Markdown."""
    return markdown.table(COLUMNS, rows(outcomes))


def write_report(
    out: str | Path,
    title: str,
    outcomes: Sequence[Outcome],
    notes: Sequence[str],
    plots: Sequence[str],
) -> Path:
    """Writes `report.md` with the table, notes and plots, and returns its path.

    Args:
      out: folder; it is made if it is not there.
      title: heading.
      outcomes: rows of the table.
      notes: paragraphs below it.
      plots: files of pictures in the folder.
    """
    parts = [f"# {title}", markdown_table(outcomes)]
    parts.append(
        "Loss in nats a token on held-out files, judged in float32. ± is the 95 % confidence"
        " interval over seeds (Student's t); the gap is paired: same initial weights, same"
        " batches. Skipped steps are listed seed by seed."
    )
    parts += notes
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    path = Path(out) / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n\n".join(parts) + "\n")
    return path
