"""Steps and lines of the same job with mpjax and with others, counted in docs/guides/side_by_side.

Run:       python -m benchmarks.tools.side_by_side
Output:    the tables of these pages, written between their marks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.page import ROOT
from mpjax.markdown import table

FOLDER = ROOT / "docs" / "guides" / "side_by_side"
JOBS = {
    "own_csv": "own CSV: train, export, predict elsewhere",
    "own_chat": "own conversations: tune a Llama, talk with it",
    "resume": "resume",
    "sweep": "sweep of 3 learning rates, 2 precisions, 3 seeds",
}
OURS, DATA = "mpjax", "Data"
COLUMNS = 100  # of a line; `ruff format` checks the Python of these pages
MARKS = "<!-- counted -->", "<!-- end of counted -->"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block.

    Args:
      kind: `python`, `sh` or `yaml`.
      code: what it holds.
    """

    kind: str
    code: str


class Command(NamedTuple):
    """A shell command.

    Args:
      notes: the comments above it.
      text: its lines, whole loops included.
    """

    notes: tuple[str, ...]
    text: str


class Way(NamedTuple):
    """What a job takes.

    Args:
      steps: shell commands, Python scripts and files of settings.
      lines: that are typed.
    """

    steps: int
    lines: int


def sections(page: str) -> dict[str, list[Block]]:
    """Returns heading -> its blocks."""
    found = {}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        found[title.strip()] = [Block(*m) for m in _BLOCK.findall(body)]
    return found


def typed(code: str) -> list[str]:
    """Returns the lines that are neither blank nor only a comment.

    Example:
      >>> typed("import a  # why\\n\\n# what\\na.b()\\n")
      ['import a  # why', 'a.b()']
    """
    return [line for line in code.splitlines() if line.strip() and line.lstrip()[0] != "#"]


def commands(code: str) -> list[Command]:
    """Returns the commands of a shell block; a loop is one.

    Example:
      >>> [c.text for c in commands("# note\\na \\\\\\n  b\\nfor x in 1; do\\n  c\\ndone\\n")]
      ['a \\\\\\n  b', 'for x in 1; do\\n  c\\ndone']
    """
    found, notes, open_lines = [], [], []
    for line in code.splitlines():
        if line.startswith("#"):
            notes.append(line.lstrip("# "))
        elif line.strip():
            open_lines.append(line)
            text = "\n".join(open_lines)
            loops = len(re.findall(r"\bfor\b", text)) - len(re.findall(r"\bdone\b", text))
            if not loops and not line.endswith("\\"):
                found.append(Command(tuple(notes), text))
                notes, open_lines = [], []
    return found


def count(blocks: list[Block]) -> Way:
    """Returns the steps and lines of a way's blocks."""
    steps = sum(len(commands(b.code)) if b.kind == "sh" else 1 for b in blocks)
    return Way(steps, sum(len(typed(b.code)) for b in blocks))


def ways(job: str) -> dict[str, Way]:
    """Returns whose way -> what it takes."""
    blocks = sections((FOLDER / f"{job}.md").read_text())
    return {title: count(found) for title, found in blocks.items() if title != DATA}


def best_of_others(found: dict[str, Way]) -> Way:
    """Returns the fewest steps and the fewest lines of the others, perhaps of two of them."""
    others = [way for title, way in found.items() if title != OURS]
    return Way(min(way.steps for way in others), min(way.lines for way in others))


def tables() -> dict[str, str]:
    """Returns page -> its table."""
    found, rows = {}, []
    for job, title in JOBS.items():
        each = ways(job)
        ours, best = each[OURS], best_of_others(each)
        rows.append(
            (f"[{title}]({job}.md)", f"{ours.steps}", f"{best.steps}", f"{ours.lines}",
             f"{best.lines}")
        )  # fmt: skip
        found[job] = table(
            ("", "steps", "lines"), [(who, f"{w.steps}", f"{w.lines}") for who, w in each.items()]
        )
    head = ("job", "steps, mpjax", "fewest of the others", "lines, mpjax", "fewest of the others")
    return {"index": table(head, rows)} | found


def with_table(page: str, made: str) -> str:
    """Returns a page with the table between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{made.strip()}\n{MARKS[1]}{after}"


def main() -> None:
    """Writes the tables."""
    for name, made in tables().items():
        path = Path(FOLDER / f"{name}.md")
        path.write_text(with_table(path.read_text(), made))
        print(f"{path.name}\n{made}\n")


if __name__ == "__main__":
    main()
