"""Sections of rows as plain text and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 150


class Section(NamedTuple):
    """A table with a title.

    Args:
      title: what it lists.
      columns: their names.
      rows: their cells.
      shown: how many rows are printed; 0 for all.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    shown: int = 0

    @property
    def visible(self) -> Sequence[tuple[str, ...]]:
        """The rows that are printed."""
        return self.rows[: self.shown] if self.shown else self.rows

    @property
    def caption(self) -> str:
        """The title, with how many rows are not printed."""
        hidden = len(self.rows) - len(self.visible)
        return f"{self.title} (the first {self.shown}, {hidden} more)" if hidden else self.title


def as_text(sections: Sequence[Section], head: Sequence[str]) -> str:
    """Returns the sections for a terminal, without colour codes."""
    # Plain text wherever it is printed: no HTML in a notebook, no colour codes in a file.
    console = Console(
        file=io.StringIO(), width=WIDTH, force_jupyter=False, force_terminal=False, markup=False,
        highlight=False,
    )  # fmt: skip
    for section in sections:
        table = Table(box=box.SIMPLE, title=section.caption, title_justify="left")
        for column in section.columns:
            table.add_column(column, overflow="fold")
        for row in section.visible:
            table.add_row(*row)
        console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join([*head, *(line.rstrip() for line in lines if line.strip())])


def as_markdown(sections: Sequence[Section], head: Sequence[str]) -> str:
    """Returns the sections in Markdown."""
    parts = list(head)
    for section in sections:
        cells = [section.columns, ("---",) * len(section.columns), *section.visible]
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
        parts.append(f"## {section.caption}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)
