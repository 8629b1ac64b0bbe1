"""Elements of a page: tables, folded parts, pieces of lines."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mpjax.report.html.chart import style
from mpjax.report.tabular import numeric

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, head, rows
MOST_ROWS = 300  # of a table
_LONGEST = 600  # characters of a cell


def table(content: Table, most: int = MOST_ROWS) -> str:
    """Returns a table: its first column heads the rows, columns of numbers are to the right."""
    title, head, rows = content
    right = numeric(rows, len(head))
    lines = []
    for row in rows[:most]:
        cells = [
            f'<t{"hd"[i > 0]}{" scope=row" * (i == 0)}'
            f"{' class=n' * right[i] or ' class=w' * (len(str(value)) > 40)}>{cell(value)}"
            f'</t{"hd"[i > 0]}>'
            for i, value in enumerate(row)
        ]  # fmt: skip
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(
        f"<th scope=col{' class=n' * right[i]}>{escape(str(name))}</th>"
        for i, name in enumerate(head)
    )
    more = len(rows) - most
    said = f"<p class=note>The first {most} of {len(rows)} rows.</p>" if more > 0 else ""
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="{escape(title)}"><table>'
        f"<caption>{escape(title)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>{said}"
    )


def cell(value: object) -> str:
    """Returns the text of a cell, cut where it is very long."""
    text = str(value)
    return escape(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def folded(summary: str, content: str) -> str:
    """Returns a part that opens at a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def swatch(number: int) -> str:
    """Returns a piece of an arm's line, for a legend."""
    return (
        f'<svg class="{style(number)}" viewBox="0 0 28 8" aria-hidden=true>'
        '<path class=line d="M1 4H27"/></svg>'
    )
