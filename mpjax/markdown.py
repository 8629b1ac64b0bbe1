"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown; a `|` in a cell stays in it.

    Args:
      head: names of the columns.
      rows: cells of each row.

    Example:
      >>> print(table(["a", "b"], [[1, "x | y"]]))
      | a | b |
      | --- | --- |
      | 1 | x \\| y |
    """
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
