"""All orders of dimensions of a product of two arrays, and what runs it.

An order names each axis of either operand: b batch, c contracting, x and y free, each with a
number. Orders that differ by names alone are one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import dot_general
from mpjax.precision import get_recipe

Order = tuple[tuple[str, int], ...]
SIZES = {"b": (2, 3, 1, 2), "c": (3, 2, 1, 3), "x": (2, 1, 3, 2), "y": (3, 2, 1, 2)}
BARS = {"nvfp4": 0.6, "mxfp4": 0.5, "int8": 0.03, "int8-switchback": 0.03, "fixed-q8.8": 0.03}
TRANSFORMS = ("jit", "vmap", "vmap of vmap", "grad")


def _orders(axes: list[tuple[str, int]], fixed: str) -> Iterator[Order]:
    """All orders in which the axes of the kinds in `fixed` keep their numbers' order."""
    for order in itertools.permutations(axes):
        for kind in fixed:
            numbers = [n for k, n in order if k == kind]
            if numbers != sorted(numbers):
                break
        else:
            yield order


def orders(rank: int) -> list[tuple[Order, Order]]:
    """All pairs of orders of operands of at most so many axes."""
    found = []
    for b, c in itertools.product(range(rank + 1), repeat=2):
        for x, y in itertools.product(range(max(rank + 1 - b - c, 0)), repeat=2):
            shared = [("b", n) for n in range(b)] + [("c", n) for n in range(c)]
            left = list(_orders(shared + [("x", n) for n in range(x)], "bcx"))
            right = list(_orders(shared + [("y", n) for n in range(y)], "y"))
            found += list(itertools.product(left, right))
    return found


def spelled(pair: tuple[Order, Order]) -> str:
    """An order as a text, such as `b0x0c0|b0c0y0`."""
    return "|".join("".join(f"{k}{n}" for k, n in order) for order in pair)


def read(pair: tuple[Order, Order]) -> tuple[Any, Any, Any]:
    """Shapes of both operands and the dimension numbers."""
    left, right = pair
    shapes = [tuple(SIZES[k][n] for k, n in order) for order in pair]
    where = {kind: [a for a in left if a[0] == kind] for kind in "bc"}
    dims = [tuple(tuple(o.index(a) for a in where[k]) for o in (left, right)) for k in "cb"]
    return *shapes, (dims[0], dims[1])


def under(product: Any, transform: str) -> Any:
    """A function of operands with two leading axes, of sizes 2 and 3."""

    def twice(x: Any, y: Any) -> Any:
        return jax.vmap(jax.vmap(product, (0, None)), (0, 0))(x, y[:, 0])

    def grad(x: Any, y: Any) -> Any:
        out, pull = jax.vjp(product, x[0, 0], y[0, 0])
        return pull(1.5 + jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return {
        "jit": lambda x, y: product(x[0, 0], y[0, 0]),
        "vmap": lambda x, y: jax.vmap(product, (None, y.ndim - 2), 0)(
            x[0, 0], jnp.moveaxis(y[0], 0, -1)
        ),
        "vmap of vmap": twice,
        "grad": grad,
    }[transform]


def exact(a: np.ndarray, b: np.ndarray, dims: Any, transform: str) -> list[np.ndarray]:
    """The same in float64, by einsum."""
    (ca, cb), (ba, bb) = dims
    names = iter("abcdefghijkl")
    left, right = ["?"] * (a.ndim - 2), ["?"] * (b.ndim - 2)
    for i, j in [*zip(ba, bb, strict=True), *zip(ca, cb, strict=True)]:
        left[i] = right[j] = next(names)
    for side in (left, right):
        side[:] = [next(names) if s == "?" else s for s in side]
    batch = [left[i] for i in ba]
    free = [[s for k, s in enumerate(side) if k not in (*c, *n)]
            for side, c, n in ((left, ca, ba), (right, cb, bb))]  # fmt: skip
    out = "".join([*batch, *free[0], *free[1]])
    x, y = "".join(left), "".join(right)
    if transform == "jit":
        return [np.einsum(f"{x},{y}->{out}", a[0, 0], b[0, 0])]
    if transform == "vmap":
        return [np.einsum(f"{x},Y{y}->Y{out}", a[0, 0], b[0])]
    if transform == "vmap of vmap":
        return [np.einsum(f"XY{x},X{y}->XY{out}", a, b[:, 0])]
    shape = np.einsum(f"{x},{y}->{out}", a[0, 0], b[0, 0]).shape
    dy = 1.5 + np.cos(np.arange(np.prod(shape, dtype=int))).reshape(shape)
    return [np.einsum(f"{out},{y}->{x}", dy, b[0, 0]), np.einsum(f"{x},{out}->{y}", a[0, 0], dy)]


def by_recipe(name: str) -> Any:
    """Dimension numbers -> `mpjax.dot_general` under a recipe."""
    recipe = get_recipe(name)
    state = AmaxHistory.empty(recipe.history) if recipe.history else None

    def make(dims: Any) -> Any:
        def product(a: Any, b: Any) -> Any:
            y = dot_general(a, b, dims, recipe, key=jax.random.key(0), amax=state)
            return y[0] if isinstance(y, tuple) else y

        return product

    return make


def bar(name: str) -> float:
    """The error of a recipe: about half a step of its coarsest format, twice."""
    return BARS.get(name, 0.15)


def errors(
    pairs: list[Any], make: Any, transforms: Any, seed: int = 0, options: Any = None
) -> list[float]:
    """Of each order, the largest error of the transforms; all of them are one program.

    Args:
      pairs: orders.
      make: dimension numbers -> a product of two arrays.
      transforms: for each order, the names of those that are run.
      seed: of the operands.
      options: of the compiler.
    """
    rng = np.random.default_rng(seed)
    data, functions, want = [], [], []
    for pair, names in zip(pairs, transforms, strict=True):
        left, right, dims = read(pair)
        # of one sign, so that sums do not cancel and the error is that of the format
        a, b = (
            (0.1 + np.abs(rng.normal(size=(2, 3, *s)))).astype(np.float32) for s in (left, right)
        )
        data.append((jnp.asarray(a), jnp.asarray(b)))
        functions.append([under(make(dims), name) for name in names])
        exactly = [exact(a.astype(float), b.astype(float), dims, name) for name in names]
        want.append([x for each in exactly for x in each])
    run = jax.jit(
        lambda data: [
            jax.tree.leaves([f(*ab) for f in fs]) for ab, fs in zip(data, functions, strict=True)
        ],
        compiler_options=options,
    )
    return [
        max(
            float(np.linalg.norm(np.asarray(g, np.float64) - w) / np.linalg.norm(w))
            if g.shape == w.shape
            else float("inf")
            for g, w in zip(got, right, strict=True)
        )
        for got, right in zip(run(data), want, strict=True)
    ]
