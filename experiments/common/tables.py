"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.table import Table


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
