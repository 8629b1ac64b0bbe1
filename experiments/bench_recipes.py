"""What does a quantised product cost here? Training steps under recipes against the bf16 step.

Off the hardware that has the units, a recipe is emulated: what is measured is the price of that.
The model is a GPT of 12.3M parameters (6 layers, width 384, 6 heads, 4096 words, 8 x 256 tokens).

Run:       python experiments/bench_recipes.py
Expected:  on CPU the fp8 step takes at most 1.6 times as long as the bf16 step.
"""

from __future__ import annotations

import dataclasses
import time

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
import optax
from bench_step import ratio
from rich.console import Console
from rich.table import Table

from mpjax.models import decoder
from mpjax.ops import how_it_runs
from mpjax.precision import get_precision, get_recipe, recipe_names
from mpjax.train import build

Row = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Config:
    """Time training steps under recipes, each in turn with the bf16 step."""

    recipe: tuple[str, ...] = recipe_names()
    """Recipes by name."""
    size: str = "small"
    """Model size."""
    layers: int = 6
    """Layers of the model."""
    batch: int = 8
    """Sequences a step."""
    seq: int = 256
    """Tokens a sequence."""
    rounds: int = 8
    """Timed steps of each program, in turn with bf16."""


class Program:
    """A compiled training step and its state."""

    def __init__(self, config: Config, precision: str) -> None:
        model = decoder(
            config.size, get_precision(precision), layers=config.layers, context=config.seq
        )
        start = time.perf_counter()
        self._state, self._step = build(model, optax.adamw(3e-4), gate=False)
        ids = np.random.default_rng(0).integers(
            0, model.config.vocabulary, (config.batch, config.seq + 1), np.int32
        )
        self._batch = {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}
        self.seconds()
        self.compile_seconds = time.perf_counter() - start

    def seconds(self) -> float:
        """The time of one step."""
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - start


def measure(config: Config) -> list[Row]:
    """Returns (precision, median seconds, ratio to bf16 with its 95 % interval, what ran)."""
    reference = Program(config, "bf16")
    rows: list[Row] = []
    for name in ("fp32", *config.recipe):
        program = Program(config, name)
        ours: list[float] = []
        theirs: list[float] = []
        for turn in range(config.rounds):
            for times, one in ((ours, program), (theirs, reference))[:: 1 if turn % 2 else -1]:
                times.append(one.seconds())
        how = ""
        if name != "fp32":
            runs = how_it_runs(get_recipe(name), jax.default_backend(), config.batch * config.seq)
            how = "; ".join(f"{product}: {text}" for product, text in runs.items())
        rows.append((name, f"{np.median(ours):.3f}", ratio(ours, theirs), how))
        print(*rows[-1], f"compiled in {program.compile_seconds:.0f} s", sep=" | ", flush=True)
        del program
    return rows


def main(config: Config) -> None:
    """Prints the comparison."""
    launch.positive(config, "layers", "batch", "seq", "rounds")
    launch.not_empty(config, "recipe")
    rows = measure(config)
    table = Table("precision", "median s", "time / bf16", "what multiplies")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    launch.command(main, Config)
