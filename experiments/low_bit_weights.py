"""Can weights be stored in 16 or 8 bits without a float32 copy? One decoder, paired seeds.

At a low learning rate an update is under half the distance between two bfloat16 numbers, and
rounding to nearest loses it. Stochastic rounding keeps it on average, Kahan summation keeps what
was lost in a second bfloat16 number. With e4m3, matrices and the embedding are stored in 8 bits
with a scale for each row. All arms but the reference compute in bfloat16.

Run:       python experiments/low_bit_weights.py
Expected:  in bfloat16 nearest is at least 2 % worse than float32; stochastic and kahan each close
           at least 90 % of that gap, at 2 and 4 bytes of weights a parameter.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import sweep

from common import launch  # sets XLA flags before JAX starts
from mpjax.precision import get_precision
from mpjax.report import Outcome, interval, plot_loss, rich_table, save_plot, write_report


@dataclasses.dataclass(frozen=True)
class Config(sweep.Workload):
    """Compare update rules of weights that are stored low, on one small decoder."""

    steps: int = 200
    """Steps a run."""
    lr: float = 2e-4
    """Peak learning rate; low, so that most updates are under half an ulp."""
    schedule: str = "constant"
    """`constant`, `linear`, `cosine` or `wsd`."""
    update: tuple[str, ...] = ("nearest", "stochastic", "kahan")
    """Update rules; the first leaves the gap that the others are to close."""
    storage: tuple[str, ...] = ("bf16", "e4m3")
    """Formats of the weights: `bf16`, `f16`, `e4m3` or `e5m2`."""
    seeds: int = 3
    """Seeds an arm."""
    out: Path = Path("runs/low_bit_weights")
    """Folder of the report and of all runs."""
    CHOOSING = (*sweep.Training.CHOOSING, "update", "storage")


def closed(outcome: Outcome, worst: Outcome, best: Outcome) -> tuple[float, float]:
    """Returns mean and half-width of the share of the gap that an arm closes, in percent."""
    runs = zip(outcome.validation_loss, worst.validation_loss, best.validation_loss, strict=True)
    return interval([100 * (w - o) / (w - b) for o, w, b in runs])


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.positive(config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "seeds")
    launch.not_empty(config, "update", "storage")
    start = time.perf_counter()
    arms = [sweep.Arm("fp32", get_precision("fp32"), config.lr, "fp32")]
    for storage in config.storage:
        rules = [f"**/{name}=p={storage}" for name in ("kernel", "table") if storage != "bf16"]
        for rule in config.update:
            precision = get_precision("pure-bf16", rules=rules, update=rule)
            arms.append(sweep.Arm(f"{storage} {rule}", precision, config.lr, "fp32"))
    outcomes = sweep.run_arms(arms, config, config.seeds, config.out)
    title = "Update rules of weights that are stored low"
    launch.wide().print(rich_table(outcomes, title))
    best, notes = outcomes[0], []
    for first in range(1, len(outcomes), len(config.update)):
        worst, *others = outcomes[first : first + len(config.update)]
        for other in others:
            mean, half = closed(other, worst, best)
            notes.append(
                f"{other.label} closes {mean:.1f} ± {half:.1f} % of the gap between fp32 and"
                f" {worst.label} (95 % interval over paired seeds)."
            )
    launch.wide().print("\n".join(notes))
    notes.append(
        f"{config.seeds} seeds, {config.extent}, lr {config.lr:g} {config.schedule},"
        f" {config.data} as {config.tokenizer}."
        f" Took {time.perf_counter() - start:.0f} s on {launch.machine()}."
    )
    save_plot(plot_loss(outcomes), config.out / "loss.png")
    launch.wide().print(f"report: {write_report(config.out, title, outcomes, notes, ['loss.png'])}")


if __name__ == "__main__":
    launch.command(main, Config)
