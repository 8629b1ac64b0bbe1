"""Derivatives of products under every transform, against float64 with straight-through rounding.

The function is $L = \\sum \\tanh(x W)$. In float64, with $Q$ for what a recipe rounds (by
`mpjax.quantize`, along the axis that each product sums over), $t = \\tanh(Q(x) Q(W))$:

    dy = 1 - t^2          dx = Q(dy) Q(W)'        dW = Q(x)' Q(dy)
    and along a direction v of W, with s = -2 t (1 - t^2):
    dL = sum(dy * Q(x) Q(v)),     d(dW) = Q(x)' Q(s * Q(x) Q(v))
    d<dW, v>/dx = Q(dy) Q(v)' + Q(s * Q(x) Q(v)) Q(W)'
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mpjax.formats import quantize
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import dot_general
from mpjax.precision import Operand, Recipe, get_recipe

MATRIX = (((1,), (0,)), ((), ()))
M, K, N = 6, 40, 5  # more than one block of 32 to sum over


class Exact:
    """The three products of a recipe in float64, on average where it draws.

    What is rounded at random is its own mean; so are both operands behind a Hadamard transform with
    random signs, but for a small bias, for they are rounded to nearest there.
    """

    def __init__(self, recipe: Recipe | None) -> None:
        pairs = [(None, None)] * 3 if recipe is None else [recipe.fprop, recipe.dgrad, recipe.wgrad]
        if recipe is not None and recipe.hadamard:
            pairs[2] = (None, None)
        self.f, self.d, self.g = (
            [None if o is None or o.rounding == "stochastic" else o for o in pair] for pair in pairs
        )

    def fprop(self, x: Any, w: Any) -> np.ndarray:
        return rounded(x, self.f[0], 1) @ rounded(w, self.f[1], 0)

    def dgrad(self, dy: Any, w: Any) -> np.ndarray:
        return rounded(dy, self.d[0], 1) @ rounded(w, self.d[1], 1).T

    def wgrad(self, x: Any, dy: Any) -> np.ndarray:
        return rounded(x, self.g[0], 0).T @ rounded(dy, self.g[1], 0)

    def derivatives(self, x: Any, w: Any, v: Any) -> dict[str, np.ndarray]:
        """Value, gradients, derivative along v, and the two second derivatives along it."""
        t = np.tanh(self.fprop(x, w))
        dy, along = 1 - t**2, self.fprop(x, v)
        bent = -2 * t * (1 - t**2) * along
        return {
            "value": np.sum(t),
            "dx": self.dgrad(dy, w),
            "dw": self.wgrad(x, dy),
            "jvp": np.sum(dy * along),
            "ddw": self.wgrad(x, bent),
            "ddx": self.dgrad(dy, v) + self.dgrad(bent, w),
        }


def rounded(x: Any, operand: Operand | None, axis: int) -> np.ndarray:
    """What an operand becomes, in float64."""
    if operand is None:
        return np.asarray(x, np.float64)
    q = quantize(
        jnp.asarray(x, jnp.float32), operand.format, operand.scaling, axis=axis,
        scale_rounding=operand.scales_rounded,
    )  # fmt: skip
    return np.asarray(q.dequantize(jnp.float32), np.float64)


def draws(name: str) -> bool:
    """Whether a recipe rounds at random, so that float64 is met only on average."""
    return get_recipe(name).uses_key


def operands() -> tuple[Any, Any, Any]:
    """x for two by three mapped axes (and shards), W and v."""
    rng = np.random.default_rng(4)
    x, w, v = (rng.normal(size=s) for s in ((2, 3, M, K), (3, K, N), (K, N)))
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, w * 0.2, v))  # type: ignore[return-value]


def loss(name: str) -> Callable[..., Any]:
    recipe = get_recipe(name)
    state = AmaxHistory.empty(recipe.history) if recipe.history else None

    def function(x: Any, w: Any, key: Any) -> Any:
        y = dot_general(x, w, MATRIX, recipe, key=key, amax=state)
        return jnp.sum(jnp.tanh(y[0] if isinstance(y, tuple) else y))

    return function


def transforms(name: str) -> dict[str, Callable[[Any, Any, Any, Any], Any]]:
    """Transform -> function of (x, W, v, key), whose results `oracle` names."""
    f = loss(name)

    def hvp(f: Any) -> Any:  # reverse over reverse, of W and of x
        def function(x: Any, w: Any, v: Any, key: Any) -> Any:
            inner = lambda x, w: jnp.sum(jax.grad(f, 1)(x, w, key) * v)  # noqa: E731
            return jax.grad(inner, (1, 0))(x, w)

        return function

    def forward(x: Any, w: Any, v: Any, key: Any) -> Any:
        g = lambda w: jax.grad(f, 1)(x, w, key)  # noqa: E731
        return jax.jvp(g, (w,), (v,))[1], jax.jvp(lambda w: f(x, w, key), (w,), (v,))[1]

    def scanned(x: Any, w: Any, key: Any) -> Any:
        return jax.lax.scan(lambda sum, x: (sum + f(x, w, key), None), 0.0, x)[0]

    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec("d"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
    )  # fmt: skip
    def sharded(x: Any, w: Any, key: Any) -> Any:
        return jax.lax.psum(f(x[0], w, jax.random.wrap_key_data(key)), "d")

    def over_shards(x: Any, w: Any, v: Any, key: Any) -> Any:
        g = lambda w: jax.grad(sharded, 1)(x[:, 0], w, jax.random.key_data(key))  # noqa: E731
        return g(w[0]), jax.grad(lambda w: jnp.sum(g(w) * v))(w[0])

    first = jax.value_and_grad(f, (0, 1))
    return {
        "jit": lambda x, w, v, key: first(x[0, 0], w[0], key),
        "vmap": lambda x, w, v, key: jax.vmap(first, (0, None, None))(x[0], w[0], key),
        "vmap of vmap": lambda x, w, v, key: jax.vmap(
            jax.vmap(first, (0, 0, None)), (2, None, None)
        )(jnp.moveaxis(x, 0, 2), w, key),
        "grad of grad": lambda x, w, v, key: hvp(f)(x[0, 0], w[0], v, key),
        "vmap of grad of grad": lambda x, w, v, key: jax.vmap(hvp(f), (0, 0, None, None))(
            x[0], w, v, key
        ),
        "jvp": lambda x, w, v, key: forward(x[0, 0], w[0], v, key),
        "remat": lambda x, w, v, key: hvp(jax.checkpoint(f))(x[0, 0], w[0], v, key),
        "scan": lambda x, w, v, key: hvp(scanned)(x[0], w[0], v, key),
        "shard_map": over_shards,
    }  # fmt: skip


def oracle(recipe: Recipe | None, x: Any, w: Any, v: Any) -> dict[str, list[Any]]:
    """What `transforms` give, in float64; without a recipe, of operands that are not rounded."""
    exact = Exact(recipe)
    at = {(i, j, k): exact.derivatives(x[i, j], w[k], v)
          for i, j, k in [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 1, 1), (0, 2, 2), (1, 0, 0),
                          (1, 1, 1), (1, 2, 2)]}  # fmt: skip

    def stack(names: tuple[str, ...], places: Any) -> list[Any]:
        return [np.stack([at[p][n] for p in places]) for n in names]

    first, one = ("value", "dx", "dw"), at[0, 0, 0]
    rows = [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    pairs = [[(i, j, j) for j in range(3)] for i in range(2)]
    second = [one["ddw"], one["ddx"]]
    return {
        "jit": [one[n] for n in first],
        "vmap": stack(first, rows),
        "vmap of vmap": [np.stack(s) for s in zip(*(stack(first, p) for p in pairs), strict=True)],
        "grad of grad": second,
        "vmap of grad of grad": stack(("ddw", "ddx"), pairs[0]),
        "jvp": [one["ddw"], one["jvp"]],
        "remat": second,
        "scan": [sum(at[p]["ddw"] for p in rows), np.stack([at[p]["ddx"] for p in rows])],
        "shard_map": [one[n] + at[1, 0, 0][n] for n in ("dw", "ddw")],
    }


def errors(name: str, keys: int = 1, only: tuple[str, ...] = ()) -> dict[str, float]:
    """Transform -> the largest error of its results, relative to the size of each.

    Of a recipe that draws, the mean over so many keys is compared.
    """
    x, w, v = operands()
    found = {n: t for n, t in transforms(name).items() if not only or n in only}
    run = jax.jit(lambda *args: [jax.tree.leaves(t(*args)) for t in found.values()])
    results = [run(x, w, v, jax.random.key(seed)) for seed in range(keys)]
    want = oracle(get_recipe(name), *map(np.asarray, (x, w, v)))
    out = {}
    for i, transform in enumerate(found):
        pairs = []
        for j, right in enumerate(want[transform]):
            got = np.mean([np.asarray(r[i][j], np.float64) for r in results], 0)
            assert got.shape == right.shape, (transform, got.shape, right.shape)
            pairs.append(float(np.linalg.norm(got - right) / np.linalg.norm(right)))
        out[transform] = max(pairs)
    return out
