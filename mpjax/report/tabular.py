"""Tables as CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from mpjax.errors import ConfigError, brief

# One pass, so that what an escape writes is not escaped again.
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "×": r"$\times$", "–": "--", "≤": r"$\leq$", "≥": r"$\geq$", "−": "$-$",
}  # fmt: skip
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?|nan|inf"  # 1,5 and 1.2.3 are none
_NUMBER = re.compile(rf"[+-]?(?:{_PLAIN})(?: ± (?:{_PLAIN}))?(?: %)?|–|")


def numeric(rows: Sequence[Sequence[object]], count: int) -> list[bool]:
    """Returns which columns hold numbers, which a table has to the right; never the first.

    Args:
      rows: cells of each row.
      count: of columns.

    Example:
      >>> numeric([["a", "+1.0 %", "b", "2^16"], ["b", "–", "–", "–"]], 4)
      [False, True, False, True]
    """
    cells = [[str(row[i]) for row in rows] for i in range(count)]
    return [
        i > 0 and all(cell[:1] in "+-−–0123456789" for cell in column)
        for i, column in enumerate(cells)
    ]


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table as CSV (RFC 4180, with line feeds).

    A column of `mean ± half` becomes two, the second named `half of NAME`, and numbers lose
    plus signs, commas and units, so that a reader of CSV sees numbers.

    Args:
      head: names of the columns.
      rows: cells of each row.

    Raises:
      ConfigError: a row of another length than the head.

    Example:
      >>> print(csv_text(["arm", "loss"], [["a, b", "2.50 ± 0.25"], ["c", "–"]]), end="")
      arm,loss,half of loss
      "a, b",2.50,0.25
      c,,
    """
    cells = _cells(head, rows)
    number = [
        all(_NUMBER.fullmatch(cell) for cell in column) for column in zip(*cells, strict=True)
    ]
    wide = [any(" ± " in row[i] for row in cells) and number[i] for i in range(len(number))]
    names: list[str] = []
    for name, two in zip(head, wide or [False] * len(head), strict=True):
        names += [name, f"half of {name}"] if two else [name]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in cells:
        line: list[str] = []
        for cell, plain, two in zip(row, number, wide, strict=True):
            if plain:
                mean, _, half = cell.strip("–").rstrip(" %").replace(",", "").partition(" ± ")
                line += [mean.removeprefix("+"), half] if two else [mean.removeprefix("+")]
            else:
                line.append(cell)
        writer.writerow(line)
    return out.getvalue()


def latex_text(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """Returns a table in LaTeX with the rules of booktabs; every character is escaped.

    Args:
      head: names of the columns.
      rows: cells of each row.
      caption: below it; without one it is a bare `tabular`.

    Raises:
      ConfigError: as `csv_text`.

    Example:
      >>> print(latex_text(["arm", "gap"], [["a_1", "+2 %"]]))
      % needs \\usepackage{booktabs}
      \\begin{tabular}{lr}
      \\toprule
      arm & gap \\\\
      \\midrule
      a\\_1 & +2 \\% \\\\
      \\bottomrule
      \\end{tabular}
    """
    cells = _cells(head, rows)
    body = [" & ".join(map(_escaped, row)) + r" \\" for row in cells]
    columns = "".join("lr"[right] for right in numeric(cells, len(head)))
    lines = [
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_escaped, head)) + r" \\",
        r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    if caption:
        lines = [
            r"\begin{table}", r"\centering", *lines, rf"\caption{{{_escaped(caption)}}}",
            r"\end{table}",
        ]  # fmt: skip
    return "\n".join([r"% needs \usepackage{booktabs}", *lines])


def _cells(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """The cells as texts; a row of another length than the head is refused."""
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(head):
            raise ConfigError(
                f"table: row {brief(row)} has {len(row)} cells, the head {len(head)}; give a cell a"
                " column"
            )
    return cells


def _escaped(text: str) -> str:
    # A cell that begins with [ after \\ would be read as its argument.
    text = "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
    return "{[}" + text[1:] if text.startswith("[") else text
