"""What do low-bit optimizer states cost? One decoder on real text, Adam's moments in fewer bits.

Reproduces at small scale: Dettmers et al. 2022 (blockwise dynamic 8-bit states train like float32
ones, linear 8-bit ones per tensor do not) and Li et al. 2023 (4 bits). Lion, SGD with momentum and
Adafactor follow, each with its own moments in 8 bits beside float32.

Run:       python experiments/low_bit_adam.py
Expected:  int8@256 within 0.3 % of float32 states with 2.1 bytes a parameter in place of 8, also
           with embeddings quantised; int8-linear, rounded to nearest as it is in the paper, at
           least 10 % worse or diverged.
Output:    the table, runs/low_bit_adam/report.md with the plots, a run folder per arm and seed.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import sweep

from common import launch  # sets XLA flags before JAX starts
from mpjax.errors import ConfigError
from mpjax.precision import get_precision
from mpjax.report import plot_loss, rich_table, save_plot, write_report

REFERENCE = "Adam f32"
# optimizer -> its peak learning rate as a multiple of Adam's, and its own moments in 8 bits
OTHERS = {
    "lion": (0.1, "first=int8@256"),
    "sgd": (50.0, "first=int8@256"),
    "adafactor": (1.0, "second=int8@256"),
}


@dataclasses.dataclass(frozen=True)
class Config(sweep.Workload):
    """Compare storage formats of the optimizer's moments on one small decoder."""

    steps: int = 200
    """Steps a run."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    precision: str = "fp32"
    """Of everything but the moments: a preset, a policy or a line of text."""
    moments: tuple[str, ...] = (
        "int8@256", "int8@256,keep=**/embed", "int8-linear,rounding=nearest", "first=bf16",
        "fp8", "int4@128",
    )  # fmt: skip
    """Of Adam, each compared with float32 ones."""
    others: tuple[str, ...] = tuple(OTHERS)
    """Optimizers besides Adam, among `lion`, `sgd` and `adafactor`."""
    seeds: int = 3
    """Seeds an arm; the n-th seed has the same initial weights and batches in every arm."""
    other_seeds: int = 1
    """Seeds of Lion, SGD and Adafactor."""
    out: Path = Path("runs/low_bit_adam")
    """Folder of the report and of all runs."""
    CHOOSING = (*sweep.Training.CHOOSING, "moments", "others", "other_seeds")


def adam(config: Config) -> list[sweep.Arm]:
    """The arms under Adam."""
    return [
        sweep.Arm(
            f"Adam {text}".replace("**/", ""),
            get_precision(config.precision, moments=text),
            config.lr,
            REFERENCE,
        )
        for text in ("f32", *config.moments)
    ]


def other(config: Config, name: str) -> list[sweep.Arm]:
    """Another optimizer, with float32 moments and with its own in 8 bits."""
    factor, text = OTHERS[name]
    return [
        sweep.Arm(
            f"{name} {moments}",
            get_precision(config.precision, moments=moments),
            factor * config.lr,
            f"{name} f32",
        )
        for moments in ("f32", text)
    ]


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.positive(config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "seeds")
    launch.positive(config, "other_seeds")
    for name in config.others:
        if name not in OTHERS:
            raise ConfigError(f"others: unknown optimizer {name!r}; known: {' '.join(OTHERS)}")
    start = time.perf_counter()
    outcomes = sweep.run_arms(adam(config), config, config.seeds, config.out)
    others = [
        outcome
        for name in config.others
        for outcome in sweep.run_arms(
            other(config, name), dataclasses.replace(config, optimizer=name),
            config.other_seeds, config.out,
        )
    ]  # fmt: skip
    title = "Optimizer states in fewer bits"
    launch.wide().print(rich_table([*outcomes, *others], title))
    save_plot(plot_loss(outcomes), config.out / "loss.png")
    state = ", ".join(f"{o.label} {o.bytes_per_parameter - 4:.3f}" for o in [*outcomes, *others])
    notes = [
        f"Bytes of optimizer state a parameter, weights not counted: {state}.",
        f"{config.extent}, {config.data} as {config.tokenizer}."
        f" Took {time.perf_counter() - start:.0f} s on {launch.machine()}.",
    ]
    path = write_report(config.out, title, [*outcomes, *others], notes, ["loss.png"])
    launch.wide().print(f"report: {path}")


if __name__ == "__main__":
    launch.command(main, Config)
