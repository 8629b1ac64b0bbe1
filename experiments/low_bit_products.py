"""Can the matrix products of training run in 8 or 4 bits? One decoder, paired seeds.

Each recipe quantises the linear products of the blocks, forward and backward; head, norms,
attention and the update stay high. The control casts the same operands to e4m3 without a scale.

Run:       python experiments/low_bit_products.py
Expected:  fp8-block, mxfp8, int8 and int8-switchback within 0.25 % of fp32, fp8 and fp8-delayed at
           +0.2 to +0.3 %; the unscaled cast at least 10 % worse; mxfp4 at most 3 % worse, nvfp4 by
           at most 60 % of what mxfp4 loses. docs/evidence/low_bit_products.md has the intervals.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import sweep

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip

from common.datasets.sources import DOCUMENTS
from mpjax.data import load_corpus
from mpjax.errors import ConfigError
from mpjax.models import Decoder
from mpjax.ops import how_it_runs
from mpjax.paths import path_name
from mpjax.precision import get_precision, get_recipe
from mpjax.report import Outcome, gaps, interval, plot_loss, rich_table, save_plot, write_report

UNSCALED = "emulate(e4m3)"
RECIPES = (
    "fp8", "fp8-delayed", "fp8-row", "fp8-block", "mxfp8", "int8", "int8-switchback", "mxfp4",
    "nvfp4", UNSCALED,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(sweep.Workload):
    """Compare recipes of quantised products on one small decoder."""

    recipe: tuple[str, ...] = RECIPES
    """Recipes by name, each compared with fp32."""
    steps: int = 200
    """Steps a run."""
    lr: float = 2e-3
    """Peak learning rate, the best of fp32 for this model."""
    seeds: int = 5
    """Fewest seeds an arm."""
    first_seed: int = 0
    """The first of them; another one adds runs to a comparison that is there already."""
    most_seeds: int = 40
    """Most seeds an arm; so many of fp32 are trained."""
    within: float = 0.25
    """Seeds are added until the 90 % interval of the gap is inside of ± so many percent, or out."""
    out: Path = Path("runs/low_bit_products")
    """Folder of the report and of all runs."""
    CHOOSING = (*sweep.Training.CHOOSING, "recipe", "first_seed", "most_seeds", "within")


def interval_90(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 90 % confidence interval."""
    mean, half = interval(values, 0.9)
    return mean, mean - half, mean + half


def decided(values: Sequence[float], within: float) -> bool:
    """Whether the 90 % interval lies inside of ± within, or outside of it."""
    _, low, high = interval_90(values)
    return (-within <= low and high <= within) or low > within or high < -within


def quantised_share(model: Decoder, seq: int) -> float:
    """The share of a step's product FLOPs that a recipe quantises.

    A product with a kernel costs two FLOPs a number of the kernel and token, thrice (forward and
    twice backward); so do scores and their sum over values, causal, with seq / 2 keys a token.
    """
    c = model.config
    shapes = jax.eval_shape(model.init, jax.random.key(0))["decoder"]
    kernels = {
        path_name(path[:-1]): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["layers"])
        if path[-1].key == "kernel"
    }
    low = high = 0.0
    for name, size in kernels.items():
        for layer in range(c.layers):
            recipe = model.precision.recipe(f"decoder/layers/{layer}/{name}")
            low += (size / c.layers) * (recipe is not None)
            high += (size / c.layers) * (recipe is None)
    head = c.vocabulary * c.width
    if model.precision.recipe("decoder/head") is None:
        high += head
    else:
        low += head
    high += c.layers * 2 * (seq / 2) * c.heads * c.per_head
    return low / (low + high)


def compare(config: Config) -> tuple[list[Outcome], list[str]]:
    """Trains all arms and writes the report; returns outcomes, fp32 first, and notes."""
    start = time.perf_counter()
    names = [get_recipe(name).name for name in config.recipe]
    arms = [
        sweep.Arm(name, get_precision(name), config.lr, "fp32") for name in ("fp32", "bf16", *names)
    ]
    reference: list[float] = []

    def enough(label: str, losses: Sequence[float]) -> bool:
        if label == "fp32":
            reference[:] = losses
            return False
        found = gaps(losses, reference)
        return len(losses) >= config.seeds and decided(found, config.within)

    outcomes = sweep.run_arms(
        arms, config, config.most_seeds, config.out, enough=enough, first=config.first_seed
    )
    title = "Recipes of quantised products"
    launch.wide().print(rich_table(outcomes, title))
    corpus = load_corpus(config.data, config.tokenizer, sources=DOCUMENTS)
    notes, found = [], {}
    for name, outcome in zip(names, outcomes[2:], strict=True):
        found[name] = gaps(outcome.validation_loss, outcomes[0].validation_loss)
        mean, low, high = interval_90(found[name])
        model = launch.make_decoder(config, corpus, get_precision(name))
        how = "; ".join(f"{product}: {text}" for product, text in runs(name, config).items())
        notes.append(
            f"{name}: {mean:+.3f} % of fp32's loss, 90 % interval {low:+.3f} to {high:+.3f} over"
            f" {len(outcome.validation_loss)} seeds;"
            f" {100 * quantised_share(model, config.seq):.0f} % of the product FLOPs quantised"
            f" ({how})."
        )
    if {"mxfp4", "nvfp4"} <= set(names):
        share, seeds = percent_of(found["nvfp4"], found["mxfp4"])
        notes.append(
            f"nvfp4 loses {share:.0f} % of what mxfp4 loses (mean gaps of {seeds} shared seeds)."
        )
    launch.wide().print("\n".join(notes))
    notes.append(
        f"{config.seeds} to {config.most_seeds} seeds, {config.extent},"
        f" lr {config.lr:g} {config.schedule}, {config.data} as {config.tokenizer}."
        f" Took {time.perf_counter() - start:.0f} s on {launch.machine()}."
    )
    save_plot(plot_loss(outcomes), config.out / "loss.png")
    launch.wide().print(f"report: {write_report(config.out, title, outcomes, notes, ['loss.png'])}")
    return outcomes, notes


def percent_of(gaps: Sequence[float], others: Sequence[float]) -> tuple[float, int]:
    """Returns a mean gap in percent of another over the seeds of both, and their number."""
    seeds = min(len(gaps), len(others))
    return 100 * sum(gaps[:seeds]) / sum(others[:seeds]), seeds


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.positive(
        config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "seeds", "within"
    )
    launch.not_empty(config, "recipe")
    launch.distinct(config, "recipe")
    if config.seeds < 2:
        raise ConfigError("seeds: 1 gives no interval; give at least 2")
    if config.first_seed < 0:
        raise ConfigError(f"first_seed: {config.first_seed} is negative; the first seed is 0")
    if config.most_seeds < config.seeds:
        raise ConfigError(
            f"most_seeds: {config.most_seeds} is less than seeds={config.seeds}; raise it"
        )
    compare(config)


def runs(name: str, config: Config) -> dict[str, str]:
    """What multiplies each product of a recipe here."""
    return how_it_runs(get_recipe(name), jax.default_backend(), config.batch * config.seq)


if __name__ == "__main__":
    launch.command(main, Config)
