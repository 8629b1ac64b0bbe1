"""Can weights be stored in 16 bits without a float32 copy? One decoder, paired seeds.

At a low learning rate an update is under half the distance between two bfloat16 numbers, and
rounding to nearest loses it. Stochastic rounding keeps it on average, Kahan summation keeps what
was lost in a second bfloat16 number. All arms compute in bfloat16 but for the reference.

Run:       python experiments/low_bit_weights.py
Expected:  nearest at least 2 % worse than float32; stochastic and kahan each close at least 90 %
           of that gap, at 2 and 4 bytes of weights a parameter.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import launch  # sets XLA flags before JAX starts
import sweep

from mpjax.errors import ConfigError
from mpjax.precision import get_precision
from mpjax.report import Outcome, interval, plot_loss, rich_table, write_report


@dataclasses.dataclass(frozen=True)
class Config(sweep.Workload):
    """Compare update rules of bfloat16 weights on one small decoder."""

    steps: int = 200
    """Steps a run."""
    lr: float = 2e-4
    """Peak learning rate; low, so that most updates are under half an ulp."""
    schedule: str = "constant"
    """`constant`, `linear`, `cosine` or `wsd`."""
    update: tuple[str, ...] = ("nearest", "stochastic", "kahan")
    """Update rules; the first is the gap that the others are to close."""
    seeds: int = 3
    """Seeds an arm."""
    out: Path = Path("runs/low_bit_weights")
    """Folder of the report and of all runs."""


def closed(outcome: Outcome, worst: Outcome, best: Outcome) -> tuple[float, float]:
    """Returns mean and half-width of the share of the gap that an arm closes, in percent."""
    runs = zip(outcome.validation_loss, worst.validation_loss, best.validation_loss, strict=True)
    return interval([100 * (w - o) / (w - b) for o, w, b in runs])


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.positive(config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "seeds")
    if not config.update:
        raise ConfigError("update: empty; give at least one rule, or leave --update out")
    start = time.perf_counter()
    arms = [sweep.Arm("fp32", get_precision("fp32"), config.lr, "fp32")]
    for rule in config.update:
        pure = get_precision("pure-bf16", update=rule)
        arms.append(sweep.Arm(f"pure-bf16 {rule}", pure, config.lr, "fp32"))
    outcomes = sweep.run_arms(arms, config, config.seeds, config.out)
    title = "Update rules of bfloat16 weights"
    launch.wide().print(rich_table(outcomes, title))
    best, worst, *others = outcomes
    shares = [(other.label, *closed(other, worst, best)) for other in others]
    notes = [
        f"{label} closes {mean:.1f} ± {half:.1f} % of the gap between fp32 and {worst.label}"
        " (95 % interval over paired seeds)."
        for label, mean, half in shares
    ]
    for note in notes:
        launch.wide().print(note)
    notes.append(
        f"{config.seeds} seeds, {config.steps} steps of {config.batch} x {config.seq} tokens,"
        f" {config.layers} layers of width {config.width}, lr {config.lr:g} {config.schedule},"
        f" {config.data} as {config.tokenizer}."
        f" Took {time.perf_counter() - start:.0f} s on {launch.machine()}."
    )
    plot_loss(outcomes).savefig(config.out / "loss.png")
    launch.wide().print(f"report: {write_report(config.out, title, outcomes, notes, ['loss.png'])}")


if __name__ == "__main__":
    launch.command(main, Config)
