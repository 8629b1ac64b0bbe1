"""The report of the fine-tuning experiments: arms, baselines and slices as tables and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common import launch  # sets XLA flags before JAX starts
from common.tables import terminal, write_page
from mpjax.files import write_text
from mpjax.markdown import table
from mpjax.report import (
    Outcome,
    interval,
    plot_loss,
    save_plot,
    slice_cells,
    slice_gaps,
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What came of one arm.

    Args:
      label: what the user called it.
      scores: of each seed.
      correct: (seeds, examples), which held-out examples are right.
      outcome: losses, speed and records.
    """

    label: str
    scores: tuple[dict[str, float], ...]
    correct: np.ndarray
    outcome: Outcome

    def score(self, name: str) -> list[float]:
        """One score, a number a seed."""
        return [scores[name] for scores in self.scores]


def own_loss(arms: Sequence[Arm], term: str, weight: float = 1.0) -> list[Arm]:
    """The arms whose training loss can be drawn as that of the task alone.

    Args:
      arms: of which some have a loss of several terms, each beside it as `loss/NAME`.
      term: that of the task.
      weight: with which the loss has it.

    Returns:
      Arms with that term as their loss; those of several terms without it are left out.
    """
    found = []
    for arm in arms:
        records = arm.outcome.records
        if any(name.startswith("loss/") for name in records[0][0]):
            if f"loss/{term}" not in records[0][0]:
                continue
            records = tuple(
                [one | {"loss": one[f"loss/{term}"] / weight} for one in seed] for seed in records
            )
        outcome = dataclasses.replace(arm.outcome, records=records)
        found.append(dataclasses.replace(arm, outcome=outcome))
    return found


def points(values: Sequence[float]) -> str:
    """Percent with the half-width of the 95 % interval over seeds."""
    return _spread([100 * value for value in values], "")


def above(values: Sequence[float]) -> str:
    """Points above something, with the half-width of the 95 % interval over seeds."""
    return _spread(values, "+")


def _spread(values: Sequence[float], sign: str) -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.2f}" + ("" if np.isnan(half) else f" ± {half:.2f}")


def gap_points(arm: Arm, reference: Arm, name: str = "accuracy") -> list[float]:
    """How many points an arm lies above the reference, seed paired with seed."""
    pairs = zip(arm.score(name), reference.score(name), strict=True)
    return [100 * (own - other) for own, other in pairs]


def tables(
    title: str, baselines: dict[str, dict[str, float]], arms: Sequence[Arm],
    extra: Sequence[str], slices: Mapping[str, Sequence[str]],
    measured: Sequence[str] = ("accuracy",),
) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:  # fmt: skip
    """Returns (title, head, rows) of the comparison and of each arm's slices.

    The scores that are measured have their gap beside them, the extra ones have not.
    """
    head = (
        "arm", *(column for name in measured for column in (name, "gap, points")), *extra,
        "held-out loss", "tokens/s", "skipped",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (name, *(c for m in measured for c in (points([found[m]]), "–")), *(
            points([found[e]]) if e in found else "–" for e in extra
        ), "–", "–", "–")
        for name, found in baselines.items()
    ]  # fmt: skip
    for arm in arms:
        compared: list[str] = []
        for name in measured:
            gap = "–" if arm is arms[0] else above(gap_points(arm, arms[0], name))
            compared += [points(arm.score(name)), gap]
        rows.append((
            arm.label, *compared, *(points(arm.score(name)) for name in extra),
            f"{np.mean(arm.score('loss')):.4f}", f"{arm.outcome.tokens_per_s:,.0f}",
            " ".join(map(str, arm.outcome.skipped)),
        ))  # fmt: skip
    found = [(title, head, rows)]
    for kind, names in slices.items():
        for arm in arms[1:]:
            gaps = slice_gaps(arm.correct, arms[0].correct, names)
            columns = (f"slice by {kind}", "examples", arm.label, arms[0].label, "gap, points")
            found.append((f"{arm.label} by {kind}", columns, slice_cells(gaps)))
    return found


def write(
    out: Path, found: Sequence[tuple[str, tuple[str, ...], list[tuple[str, ...]]]],
    baselines: dict[str, dict[str, float]], arms: Sequence[Arm], notes: Sequence[str], unit: str,
    plotted: Sequence[Arm] = (),
) -> None:  # fmt: skip
    """Prints the tables, and writes report.md, report.html, results.* and loss.png.

    `results.json` has all scores, `results.csv` and `results.tex` the first table. `unit` is that
    of the training loss; of all arms or of those that are `plotted`, whose runs have as many steps.
    """
    shown = launch.wide()
    parts: list[str] = []
    for title, head, rows in found:
        shown.print(terminal(title, head, rows))
        parts.append(f"{'#' if not parts else '##'} {title}\n\n{table(head, rows)}")
        if len(parts) == 1:
            parts.append("\n".join(f"- {note}" for note in notes))
    shown.print("\n".join(notes), highlight=False, markup=False)
    outcomes = [arm.outcome for arm in plotted or arms]
    save_plot(plot_loss(outcomes, unit=unit), out / "loss.png")
    parts.append("![loss](loss.png)")
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    write_page(out, outcomes, found, notes, unit)
    results = {"baselines": baselines, "arms": {arm.label: arm.scores for arm in arms}}
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    shown.print(f"report: {out / 'report.md'}", highlight=False)
