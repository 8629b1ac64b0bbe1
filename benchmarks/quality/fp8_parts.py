"""Which product is it that `fp8` loses its quality in? The recipe with parts of it switched off.

Run:       python -m benchmarks.quality.fp8_parts
Expected:  the forward product alone loses what the whole recipe loses, the backward products alone
           nothing that 32 seeds could show; e4m3 gradients change nothing.

Half an hour on one core; the workload is that of experiments/low_bit_products.py. With `--page`
nothing is trained: the page is written from the runs in runs/evidence/fp8_parts.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import low_bit_products as experiment
import sweep

from benchmarks.common.arms import losses
from benchmarks.common.page import ROOT, write
from mpjax.markdown import table
from mpjax.precision import Operand, Precision, Recipe, get_precision, get_recipe
from mpjax.report import gaps

SEEDS = 32
OUT = ROOT / "runs" / "evidence" / "fp8_parts"
FP8, BF16, E4M3 = get_recipe("fp8"), (None, None), Operand("e4m3")
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fwd": ("forward in e4m3, backward in bf16", {"dgrad": BF16, "wgrad": BF16}),
    "bwd": ("forward in bf16, gradients in e5m2", {"fprop": BF16}),
    "e4m3": ("all of it in e4m3", {"dgrad": (E4M3, E4M3), "wgrad": (E4M3, E4M3)}),
}


def precision(recipe: Recipe) -> Precision:
    """The preset `fp8` with another recipe in its place."""
    whole = get_precision("fp8")
    rules = (
        dataclasses.replace(rule, recipe=recipe) if rule.recipe is not None else rule
        for rule in whole.rules
    )
    return dataclasses.replace(whole, name=recipe.name, rules=tuple(rules))


def main() -> None:
    """Trains all arms and writes the page."""
    config = experiment.Config()
    if "--page" not in sys.argv:
        made = [
            precision(dataclasses.replace(FP8, name=name, **changes))
            for name, (_, changes) in PARTS.items()
        ]
        arms = [sweep.Arm(p.name, p, config.lr, "fp32") for p in (get_precision("fp32"), *made)]
        sweep.run_arms(arms, dataclasses.replace(config, fresh=True), SEEDS, OUT)
    found = {name: losses(OUT / name) for name in ("fp32", *PARTS)}
    seeds, rows = sorted(found["fp32"]), []
    for name, (what, _) in PARTS.items():
        own = gaps(*([found[arm][seed] for seed in seeds] for arm in (name, "fp32")))
        mean, low, high = experiment.interval_90(own)
        rows.append((what, f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", len(own)))
    head = ("products of the blocks", "gap to fp32, %", "90 % interval", "seeds")
    text = (
        f"`fp8` with parts of it in bf16, else as in low_bit_products.md: {config.layers} layers of"
        f" width {config.width}, {config.steps} steps at {config.lr:g}, judged in float32, gaps"
        " paired by seed. That page has the whole recipe (e4m3 forward, e5m2 gradients)."
    )
    write("fp8_parts", "Where fp8 loses its quality", f"{text}\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
