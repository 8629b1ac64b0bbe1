"""What quantised products lose against float64 numpy: by dot length, and with outlier channels.

The measurements of `formats.py`, which says what the data are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.formats import Format
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import dot_general, hadamard
from mpjax.ops.products import opened, quantize_operand
from mpjax.precision import Operand, Recipe, get_recipe
from mpjax.typing import Array, ArrayLike, DTypeLike, Key, Settings

Three = tuple[Array, Array, Array]  # output, dgrad, wgrad
MATMUL = (((1,), (0,)), ((), ()))
PRODUCTS = ("output", "dgrad", "wgrad")
WEIGHT, GRADIENT = 2.0**-6, 2.0**-12  # standard deviations


def plain(name: str, format: str, scaling: str) -> Recipe:
    """A recipe that quantises all operands alike."""
    pair = (Operand(format, scaling), Operand(format, scaling))
    return Recipe(name, pair, pair, pair)


# Beside the registered recipes; the two of a pair differ only in the scaling.
OWN = {
    r.name: r
    for r in (
        plain("int8-tensor", "int8", "tensor"),
        plain("int8-block", "int8", "block(1x128)"),
        plain("e4m3-tensor", "e4m3", "tensor"),
        plain("e4m3-block", "e4m3", "block(1x128)"),
        Recipe("not-quantised", (None, None), (None, None), (None, None)),
    )
}


def find(name: str) -> Recipe:
    """A recipe of this file or of the library."""
    return OWN[name] if name in OWN else get_recipe(name)


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Which channels of x are multiplied.

    Args:
      sizes: what they are multiplied by.
      every: one in so many channels.
      placement: `random`, `even` (equal distances) or `together` (one run of channels).
      tokens: of x.
      channels: of x.
      outputs: columns of W.
      seeds: draws of data and channels.
    """

    sizes: tuple[float, ...] = (1.0, 100.0, 1e4)
    every: int = 64
    placement: str = "random"
    tokens: int = 512
    channels: int = 2048
    outputs: int = 64
    seeds: int = 5

    def choose(self, rng: np.random.Generator) -> np.ndarray:
        """Their indices."""
        count = self.channels // self.every
        if self.placement == "random":
            return rng.choice(self.channels, count, replace=False)
        return np.arange(count) * (self.every if self.placement == "even" else 1)


def decibels(exact: np.ndarray, got: np.ndarray) -> float:
    """10 log10 of sum(exact^2) / sum((exact - got)^2), in float64."""
    noise = np.sum(np.square(exact - np.asarray(got, np.float64)))
    return float(10 * np.log10(np.sum(np.square(exact)) / noise)) if noise else float("inf")


def products(recipe: Recipe, compute: DTypeLike) -> Callable[..., Three]:
    """Returns a function (x, W, dy, key, past amax) -> (output, dgrad, wgrad).

    Delayed scaling, and no other, takes its scales from the past amax of x, W and dy.
    """

    @jax.jit
    def three(x: Array, w: Array, dy: Array, key: Key, past: Array) -> Three:
        def forward(x: Array, w: Array) -> Array:
            if not recipe.history:
                return dot_general(x, w, MATMUL, recipe, key=key, compute_dtype=compute)
            state = AmaxHistory.empty(recipe.history)._replace(amax=past)
            return dot_general(x, w, MATMUL, recipe, key=key, compute_dtype=compute, amax=state)[0]

        y, back = jax.vjp(forward, x, w)
        return (y, *back(dy))

    return three


def exact_products(
    x: np.ndarray, w: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same in float64 numpy."""
    x, w, dy = (np.asarray(v, np.float64) for v in (x, w, dy))
    return x @ w, dy @ w.T, x.T @ dy


def operands(
    rng: np.random.Generator, tokens: int, channels: int, outputs: int
) -> list[np.ndarray]:
    """x, W and dy of normal numbers, float32."""
    shapes = ((tokens, channels), (channels, outputs), (tokens, outputs))
    return [
        (deviation * rng.standard_normal(shape)).astype(np.float32)
        for shape, deviation in zip(shapes, (1.0, WEIGHT, GRADIENT), strict=True)
    ]


def largest(*data: ArrayLike) -> Array:
    """The largest magnitude of each array."""
    return jnp.stack([jnp.max(jnp.abs(v)) for v in data])


def against_length(
    names: Sequence[str], lengths: Sequence[int], rows: int, compute: DTypeLike
) -> list[Settings]:
    """SQNR and largest error of each recipe's products, one record a product and dot length.

    Args:
      names: of recipes.
      lengths: of the dot products, ascending.
      rows: entries of each free axis, fewer than the longest dot product.
      compute: dtype of x and dy before they are quantised, and of operands that are not.
    """
    longest, rng = max(lengths), np.random.default_rng(0)
    # each product sums over another axis: channels, outputs, tokens
    shapes = ((rows, longest, rows), (rows, rows, longest), (longest, rows, rows))
    data = [operands(rng, *shape) for shape in shapes]
    past = largest(*operands(rng, rows, longest, rows))  # as an earlier step saw them
    cases = []
    for which, product in enumerate(PRODUCTS):
        for length in lengths:
            inputs = [shortened(v, longest, length) for v in data[which]]
            cases.append((which, product, length, inputs, exact_products(*inputs)[which]))
    found = []
    for name in names:
        three = products(find(name), compute)
        for which, product, length, inputs, exact in cases:
            got = np.asarray(three(*inputs, jax.random.key(length), past)[which], np.float64)
            worst = np.max(np.abs(exact - got)) / np.sqrt(np.mean(np.square(exact)))
            found.append(
                {"recipe": name, "product": product, "length": length,
                 "sqnr": decibels(exact, got), "max_error": float(worst)}
            )  # fmt: skip
    return found


def shortened(v: np.ndarray, longest: int, length: int) -> np.ndarray:
    """The array with all but its first entries along the longest axis set to zero."""
    out = v.copy()
    for axis, size in enumerate(v.shape):
        if size == longest:
            out[(slice(None),) * axis + (slice(length, None),)] = 0
    return out


def distinct(names: Sequence[str], size: int, compute: DTypeLike) -> list[Settings]:
    """How many different scaled values each operand holds, of about `size` normal numbers."""
    side = max(2, round(size**0.5))
    x, w, dy = operands(np.random.default_rng(1), side, side, side)
    # (operand, array, axis that its product sums over), in the order of a recipe's six operands
    roles = (("x", x, 1), ("W", w, 0), ("dy", dy, 1), ("W", w, 1), ("x", x, 0), ("dy", dy, 0))
    found = []
    for name in names:
        recipe = find(name)
        six = (*recipe.fprop, *recipe.dgrad, *recipe.wgrad)
        for number, (operand, (label, data, axis)) in enumerate(zip(six, roles, strict=True)):
            values = quantize_operand(
                jnp.asarray(data), operand, (axis,), jax.random.key(3), compute
            ).values
            limit = None if operand is None else 2 ** Format(operand.format).bits
            # -0 and 0 are one value: np.unique compares
            count = len(np.unique(np.asarray(values.astype(jnp.float32))))
            product = PRODUCTS[number // 2]
            found.append({"recipe": name, "product": product, "operand": label, "count": count,
                          "limit": limit})  # fmt: skip
    return found


def with_outliers(names: Sequence[str], outliers: Outliers, compute: DTypeLike) -> list[Settings]:
    """SQNR of x, as it enters a product, and of the products that hold it.

    Returns:
      One record a recipe, seed, size and place; "x in output" is x as the output's product takes
      it, "ordinary" leaves the multiplied channels out.
    """
    cases = []
    for seed in range(outliers.seeds):
        rng = np.random.default_rng(100 + seed)
        normal, w, dy = operands(rng, outliers.tokens, outliers.channels, outliers.outputs)
        chosen = outliers.choose(rng)
        ordinary = np.setdiff1d(np.arange(outliers.channels), chosen)
        for size in outliers.sizes:
            x = normal.copy()
            x[:, chosen] *= np.float32(size)
            cases.append((seed, size, ordinary, (x, w, dy), exact_products(x, w, dy)))
    found = []
    for name in names:
        recipe = find(name)
        three = products(recipe, compute)

        @jax.jit
        def seen(x: Array, key: Key, recipe: Recipe = recipe) -> list[Array]:
            pairs = ((recipe.fprop[0], 1), (recipe.wgrad[0], 0))
            factors = [
                quantize_operand(x.astype(compute), o, (axis,), key, compute) for o, axis in pairs
            ]
            return [opened(f).astype(jnp.float32) for f in factors]

        for seed, size, ordinary, inputs, (exact_y, _, exact_dw) in cases:
            key = jax.random.key(seed)
            forward, backward = map(np.asarray, seen(inputs[0], key))
            y, _, dw = map(np.asarray, three(*inputs, key, largest(*inputs)))
            x = inputs[0].astype(np.float64)
            places = {
                "x in output": (x, forward),
                "output": (exact_y, y),
                "x in output, ordinary": (x[:, ordinary], forward[:, ordinary]),
                "x in wgrad": (x, backward),
                "wgrad": (exact_dw, dw),
                "x in wgrad, ordinary": (x[:, ordinary], backward[:, ordinary]),
                "wgrad, ordinary": (exact_dw[ordinary], dw[ordinary]),
            }
            for place, (exact, got) in places.items():
                found.append({"recipe": name, "place": place, "size": size, "seed": seed,
                              "sqnr": decibels(exact, got)})  # fmt: skip
    return found


def hadamard_error(tokens: int, same: bool = True) -> float:
    """How far the transform of both operands of wgrad moves the float32 product, relative.

    Args:
      tokens: length of the product.
      same: whether both operands get the same signs; otherwise the identity does not hold.
    """
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal((tokens, 64)).astype(np.float32) for _ in range(2))
    signs = rng.choice(np.array([-1, 1], np.float32), (2, 16))
    left, right = hadamard(x, 0, signs[0]), hadamard(dy, 0, signs[0 if same else 1])
    turned = jnp.matmul(left.T, right, precision=jax.lax.Precision.HIGHEST)
    plain = jnp.matmul(x.T, dy, precision=jax.lax.Precision.HIGHEST)
    got, straight = np.asarray(turned, np.float64), np.asarray(plain, np.float64)
    return float(np.linalg.norm(got - straight) / np.linalg.norm(straight))
