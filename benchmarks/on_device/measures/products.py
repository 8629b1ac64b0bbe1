"""Part a: the three products of each recipe: exact sums, and normal data within bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.on_device.measures.compare import both, differ, distance, row
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import dot_general
from mpjax.precision import get_recipe

MATMUL = (((1,), (0,)), ((), ()))
SIDE = 64


def exact_operands(whole: bool) -> tuple[Any, Any, Any]:
    """x, W and dy of few numbers that the recipe's formats hold once they are scaled.

    Four of each row and column are not zero, and one of these is the largest of all, so that all
    groups have one scale: a sum then needs 9 bits, and float8's accumulators on Hopper keep 14.

    Args:
      whole: whether the formats are integers: the largest is then 127, else a power of two.
    """
    rng, index = np.random.default_rng(2), np.arange(SIDE)
    sums = index[:, None] + index[None, :]

    def draw() -> Any:
        size = np.where(
            sums % SIDE == 0, 127.0 if whole else 4.0, np.exp2(rng.integers(0, 3, sums.shape))
        )
        return ((sums % 16 == 0) * size * rng.choice([-1.0, 1.0], sums.shape)).astype(np.float32)

    return draw(), draw(), draw()


def three_products(name: str) -> Callable[..., Any]:
    """Returns (x, W, dy, seed) -> (y, dx, dW) under a recipe."""
    recipe = get_recipe(name)

    def products(x: Any, w: Any, dy: Any, seed: Any) -> Any:
        key = jax.random.key(seed)

        def forward(x: Any, w: Any) -> Any:
            if not recipe.history:
                return dot_general(x, w, MATMUL, recipe, key=key)
            past = AmaxHistory.empty(recipe.history)
            return dot_general(x, w, MATMUL, recipe, key=key, amax=past)[0]

        y, back = jax.vjp(forward, x, w)
        return (y, *back(dy))

    return products


# Bounds of what a recipe loses on normal data, of its output: half a step of the shortest format
# is at most 2^-(m + 1) of a number; 2^-2 for one bit. Below the lower one nothing was rounded.
LOSSES = {"e2m1": (0.05, 0.35), "e4m3": (0.005, 0.08), "int8": (0.003, 0.05)}


def recipe(size: Any, name: str) -> dict[str, Any]:
    """The three products of a recipe: exact sums bit for bit, normal data within bounds."""
    del size
    function, rows, seed = both(three_products(name)), [], np.uint32(3)
    recipe = get_recipe(name)
    formats = {o.format for pair in (recipe.fprop, recipe.dgrad, recipe.wgrad) for o in pair if o}
    x, w, dy = exact_operands("int8" in formats)
    rng = np.random.default_rng(4)
    random = [rng.normal(size=(SIDE, SIDE)).astype(np.float32) for _ in range(3)]
    exact = not recipe.hadamard  # its sums of sixteen are no numbers of few bits
    wide = bool({"e4m3", "e5m2"} & formats)
    bound = 2.0**-10 if wide else 2.0**-17
    why = "float8 accumulators keep 14 bits" if wide else "the order of float32 sums"
    for title, (a, b, c), same in (("exact sums", (x, w, dy), exact), ("normal", random, False)):
        found, cpu = function(a, b, c, seed)
        true = a.astype(np.float64) @ b, c.astype(np.float64) @ b.T, a.T.astype(np.float64) @ c
        for kind, ours, theirs, reference in zip(
            ("fprop", "dgrad", "wgrad"), found, cpu, true, strict=True
        ):
            label = f"{title}, {kind}"
            if same:
                rows.append(row(label, differ=differ(ours, theirs), exact=False,
                                error=distance(ours, theirs), bound=2.0**-22,
                                why="scales are multiplied in another order"))  # fmt: skip
                rows.append(row(f"{label}, against float64", error=distance(ours, reference),
                                bound=2.0**-20, why="scales are rounded"))  # fmt: skip
            else:
                rows.append(row(label, differ=differ(ours, theirs), exact=False,
                                error=distance(ours, theirs), bound=bound, why=why))  # fmt: skip
        if not same and title == "normal":
            least, most = LOSSES[min(formats & LOSSES.keys())]
            lost = distance(found[0], true[0])
            rows.append(row("normal, fprop, what rounding loses", error=lost, bound=most))
            rows.append(row("normal, fprop, something was rounded", error=least, bound=lost))
    return {"rows": rows}
