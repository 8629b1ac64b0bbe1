"""What does each precision cost and save? One decoder on real text, paired seeds.

Arms: mixed bfloat16 and float16 against float32; pure bfloat16 at a low learning rate, where its
weights lose updates, against float32 at the same; and the stress test of loss scaling: the loss is
multiplied by 2^-8 and the gradients by 2^8, which float32 does not notice, which dynamic scaling
repairs, and which float16 without a loss scale does not survive.

Run:       make demo      (python experiments/compare_precisions.py --out runs/demo)
Expected:  bf16 and fp16 within 0.5 % of fp32, with and without stress; unscaled stressed fp16 at
           least 10 % worse; pure-bf16 at the low rate at least 2 % worse.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import sweep

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import numpy as np

from mpjax.errors import ConfigError
from mpjax.models import Decoder, decoder
from mpjax.precision import get_precision
from mpjax.report import (
    plot_gradients,
    plot_loss,
    plot_loss_scale,
    rich_table,
    save_plot,
    write_report,
)
from mpjax.typing import Array, Batch, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Config(sweep.Workload):
    """Compare precisions on one small decoder, with a stress test of the loss scale."""

    lr: float = 2e-3
    """Peak learning rate."""
    low_lr: float = 2e-4
    """Learning rate of the pure-bf16 arm and its reference."""
    stress: int = 8
    """k: the stressed arms multiply the loss by 2^-k."""
    loss_scale: str = "dynamic:init=1048576,interval=60"
    """Of the float16 arms; it begins too high, so that backing off and growing show."""
    seeds: int = 3
    """Seeds an arm."""
    out: Path = Path("runs/demo")
    """Folder of the report and of all runs."""
    CHOOSING = (*sweep.Training.CHOOSING, "low_lr", "loss_scale")


def arms(config: Config) -> list[sweep.Arm]:
    """The arms of the comparison."""
    fp32, bf16, pure = (get_precision(name) for name in ("fp32", "bf16", "pure-bf16"))
    fp16 = get_precision("fp16", loss_scale=config.loss_scale)
    bare = get_precision("fp16", loss_scale="none")
    low, stress = f"lr={config.low_lr:g}", f"x 2^-{config.stress}"
    return [
        sweep.Arm("fp32", fp32, config.lr, "fp32"),
        sweep.Arm("bf16", bf16, config.lr, "fp32"),
        sweep.Arm("fp16", fp16, config.lr, "fp32"),
        sweep.Arm(f"fp32 {low}", fp32, config.low_lr, f"fp32 {low}"),
        sweep.Arm(f"pure-bf16 {low}", pure, config.low_lr, f"fp32 {low}"),
        sweep.Arm(f"fp32 {stress}", fp32, config.lr, f"fp32 {stress}", config.stress),
        sweep.Arm(f"fp16 {stress}", fp16, config.lr, f"fp32 {stress}", config.stress),
        sweep.Arm(f"fp16 unscaled {stress}", bare, config.lr, f"fp32 {stress}", config.stress),
    ]


def gradients(model: Decoder, params: Params, batch: Batch, stress: int) -> np.ndarray:
    """All weight gradients of the loss times 2^-stress, in one vector."""

    def loss(params: Params) -> Array:
        return model.loss(params, batch)[0] * 2.0**-stress

    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in leaves])


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.positive(
        config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "low_lr", "seeds"
    )
    if not 0 <= config.stress <= 100:
        raise ConfigError(f"stress: 2^-{config.stress} leaves no float32 gradients; give 0 .. 100")
    start = time.perf_counter()
    kept: dict[str, PyTree] = {}

    def keep(label: str, seed: int, params: Params, batch: Batch) -> None:
        if label == "fp32" and seed == 0:
            kept["params"], kept["batch"] = params, batch

    outcomes = sweep.run_arms(
        arms(config), config, config.seeds, config.out, keep=keep,
        again=lambda label, seed: label == "fp32" and seed == 0,
    )  # fmt: skip
    title = "One Transformer, several precisions"
    launch.wide().print(rich_table(outcomes, title))

    vocabulary, width = kept["params"]["decoder"]["embed"]["table"].shape
    shape = dict(vocabulary=vocabulary, width=width, layers=config.layers, heads=config.heads)
    histograms = {}
    for name, stress in (("fp32", 0), ("fp32", config.stress), ("fp16", config.stress)):
        precision = get_precision(name, loss_scale="none")
        model = decoder(config.model, precision, context=config.seq, **shape)
        label = f"{name}, loss x 2^-{stress}" if stress else name
        histograms[label] = gradients(model, kept["params"], kept["batch"], stress)
    save_plot(plot_loss(outcomes), config.out / "loss.png")
    save_plot(plot_loss_scale(outcomes), config.out / "loss_scale.png")
    save_plot(plot_gradients(histograms), config.out / "gradients.png")
    notes = [
        f"Loss x 2^-{config.stress} is the stress test: gradients are multiplied by"
        f" 2^{config.stress} afterwards, so an arithmetic with enough range does not notice."
        " The gradient histogram is taken after training, from the fp32 weights of seed 0.",
        f"{config.seeds} seeds, {config.extent}, {config.data} as {config.tokenizer}."
        f" Took {time.perf_counter() - start:.0f} s on {launch.machine()}.",
    ]
    plots = ["loss.png", "loss_scale.png", "gradients.png"]
    launch.wide().print(f"report: {write_report(config.out, title, outcomes, notes, plots)}")


if __name__ == "__main__":
    launch.command(main, Config)
