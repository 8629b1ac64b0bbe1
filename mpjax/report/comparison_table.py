"""The table of a comparison: for the terminal, in Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from mpjax import markdown
from mpjax.report.results import Outcome, check_outcomes, gap, interval
from mpjax.report.tabular import csv_text, latex_text

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


def _measured(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


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
                _measured(o.tokens_per_s, ",.0f"),
                _measured(o.bytes_per_parameter, ".2f"),
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


def csv_table(outcomes: Sequence[Outcome]) -> str:
    """Returns the table as CSV: numbers in full, half-widths in columns of their own.

    A cell is empty where the table has a dash.
    """
    by_label = check_outcomes(outcomes)
    head = (
        "arm", "reference", "seeds", "validation_loss", "validation_loss_half", "gap_percent",
        "gap_percent_half", "tokens_per_s", "bytes_per_parameter", "skipped", "final_scale",
    )  # fmt: skip
    cells, none = [], (math.nan, math.nan)
    for o in outcomes:
        own = o.reference == o.label
        numbers = [
            *interval(o.validation_loss), *(none if own else gap(o, by_label[o.reference])),
            o.tokens_per_s, o.bytes_per_parameter,
        ]  # fmt: skip
        listed = (" ".join(map(str, each)) for each in (o.skipped, o.loss_scale))
        shown = ("" if math.isnan(number) else repr(number) for number in numbers)
        cells.append((o.label, o.reference, str(len(o.records)), *shown, *listed))
    return csv_text(head, cells)


def latex_table(outcomes: Sequence[Outcome], caption: str = "") -> str:
    """Returns the table in LaTeX, for `\\usepackage{booktabs}`; see `latex_text`."""
    return latex_text(COLUMNS, rows(outcomes), caption)
