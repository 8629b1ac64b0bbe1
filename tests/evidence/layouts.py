"""Products of two arrays in all orders of their dimensions, under every recipe, on a CPU.

Run:       python tests/evidence/layouts.py [--every N]
Expected:  nothing crashes; bfloat16 products within 1 % of float64, recipes within their formats'
           error (3 % int8 and 16 bits, 15 % fp8, 50 to 60 % fp4).

An order names each axis of either operand: batch, contracting or free. There are 2609 orders of
operands of up to four axes that differ by more than names; sizes are 1 to 3. Each is run as the
product that recipes emulate in (bfloat16, where the CPU's gaps are), and under recipes, with the
transforms jit, vmap (over the last axis of the right operand), vmap of vmap (the outer over both
operands, the inner over the left) and grad (both gradients). With `--every 1` the recipes' part is
the whole cross product, which takes hours; with N each recipe takes every Nth order, another one
than its neighbour takes, the product in bfloat16 every (N / 20)th, and one transform of each, in
turn.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import layouts  # noqa: E402
from page import table, write  # noqa: E402

from mpjax.ops.dot import dot  # noqa: E402
from mpjax.precision import recipe_names  # noqa: E402

TOGETHER = 60  # orders in one program
BARE = layouts.TRANSFORMS[:3]  # a product alone is never differentiated


def bfloat16(dims: Any) -> Any:
    """The product that recipes emulate in."""
    return lambda a, b: dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dims)


def measured(name: str, pairs: list[Any], make: Any, transforms: list[Any], bar: float) -> Any:
    """A row of the table, and what missed the bar or crashed."""
    worst, missed = 0.0, []
    for start in range(0, len(pairs), TOGETHER):
        some, names = pairs[start : start + TOGETHER], transforms[start : start + TOGETHER]
        try:
            found = layouts.errors(some, make, names)
        except jax.errors.JaxRuntimeError as error:
            missed.append(f"{name}: one of {layouts.spelled(some[0])} ...: {error}")
            continue
        worst = max(worst, *found)
        missed += [
            f"{name} {layouts.spelled(pair)} {' '.join(t)}: {e:.2g}"
            for pair, t, e in zip(some, names, found, strict=True)
            if not e <= bar
        ]
        print(name, start + len(some), f"{worst:.2g}", file=sys.stderr, flush=True)
    runs = sum(map(len, transforms))
    return [name, len(pairs), runs, f"{worst:.1e}", f"{bar:g}", len(missed)], missed


def main() -> bool:
    """Measures and writes the page; whether every bar is met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=20)
    every = parser.parse_args().every
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles sooner
    pairs = layouts.orders(4)
    rows, missed = [], []
    some = pairs[:: max(1, every // 20)]
    turns = [list(BARE) if every == 1 else [BARE[i % 3]] for i in range(len(some))]
    row, bad = measured("bfloat16", some, bfloat16, turns, 0.01)
    rows.append(row)
    missed += bad
    for number, name in enumerate((*recipe_names(), "fixed-q8.8")):
        some = pairs[number % every :: every]
        turns = [[layouts.TRANSFORMS[(i + number) % 4]] for i in range(len(some))]
        if every == 1:
            turns = [list(layouts.TRANSFORMS)] * len(some)
        row, bad = measured(name, some, layouts.by_recipe(name), turns, layouts.bar(name))
        rows.append(row)
        missed += bad
    body = (__doc__ or "").split("\n\nRun:")[0] + "\n\n" + (__doc__ or "").split("fp4).\n\n")[1]
    body += f"\nHere N is {every}.\n\n"
    body += table(["product", "orders", "runs", "largest error", "bar", "missed"], rows)
    body += "\n\n" + ("Missed:\n\n- " + "\n- ".join(missed) if missed else "All bars are met.")
    command = f"python tests/evidence/layouts.py --every {every}"
    write("layouts", "Products in all orders of their dimensions", body, command)
    return not missed


if __name__ == "__main__":
    sys.exit(not main())
