"""Every recipe under every transform of transforms, against float64.

Run:       python -m benchmarks.numerics.transforms
Expected:  recipes that round to nearest within 1e-5 of float64 with straight-through rounding,
           those that draw within 0.01 (8 bits and more) or 0.3 (4 bits) of its mean, over 16 keys.

The function is the sum of the tanh of a product; what is compared, and the formulas in float64,
stand in `tests/ops/straight_through.py`: value and both gradients (jit, vmap, vmap of vmap), the
second derivatives of both operands along a direction (grad of grad; also under vmap, remat and
scan), and forward mode (the derivative of the gradient and of the value along a direction).
`shard_map` is over two devices, gradient and second derivative.
"""

from __future__ import annotations

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from benchmarks.common.page import write
from mpjax.markdown import table
from mpjax.precision import get_recipe, recipe_names
from tests.ops import straight_through

KEYS = 16


def bar(name: str) -> float:
    """The largest error that is let pass."""
    if not straight_through.draws(name):
        return 1e-5
    return 0.3 if get_recipe(name).hadamard else 0.01


def main() -> bool:
    """Measures and writes the page; whether every bar is met."""
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles sooner
    rows, missed, columns = [], [], []
    for name in (*recipe_names(), "fixed-q8.8", "emulate(e4m3)"):
        found = straight_through.errors(name, KEYS if straight_through.draws(name) else 1)
        columns = list(found)
        rows.append([name, f"{bar(name):g}", *(f"{e:.1e}" for e in found.values())])
        missed += [f"{name} {t}: {e:.2g}" for t, e in found.items() if not e <= bar(name)]
    body = (__doc__ or "").split("\n\nRun:")[0] + "\n\n"
    body += "The largest relative error (2-norm) of what a transform returns:\n\n"
    body += table(["recipe", "bar", *columns], rows)
    body += "\n\n" + ("Missed: " + "; ".join(missed) if missed else "All bars are met.")
    write("transforms", "Recipes under transforms of transforms", body)
    return not missed


if __name__ == "__main__":
    sys.exit(not main())
