"""Gradients of gradients, and derivatives along a direction, of quantised products."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import conv_general_dilated, dot_general

sys.path.insert(0, str(Path(__file__).parent))
import straight_through as s

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("name", ["int8-switchback", "fp8-delayed"])
def test_each_transform_is_that_of_float64_with_straight_through_rounding(name: str) -> None:
    """`benchmarks/numerics/transforms.py` does it for every recipe."""
    found = s.errors(name)
    assert len(found) == 9 and max(found.values()) < 1e-5, found


def test_the_oracle_tells_rounding_from_none() -> None:
    """The control: 1e-5 above is far below what rounding does to these derivatives."""
    x, w, v = (np.asarray(a) for a in s.operands())
    plain = s.oracle(None, x, w, v)["grad of grad"]
    for name in ("int8-switchback", "mxfp8"):
        rounded = s.oracle(s.get_recipe(name), x, w, v)["grad of grad"]
        for a, b in zip(plain, rounded, strict=True):
            assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)


def test_a_recipe_that_draws_is_right_on_average() -> None:
    found = s.errors("int8", 16, ("jvp",))
    assert found["jvp"] < 0.01, found


def test_second_order_products_draw_their_own_bits() -> None:
    x, w, v = s.operands()
    f = s.loss("int8")

    @jax.jit
    def both(key: Any) -> Any:
        g = lambda w: jax.grad(f, 1)(x[0, 0], w, key)  # noqa: E731
        return jax.jvp(g, (w[0],), (v,))

    (g, h), (g2, h2), (g3, h3) = (both(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(g, g2)
    np.testing.assert_array_equal(h, h2)
    assert bool((g != g3).any()) and bool((h != h3).any())


def test_a_history_scales_neither_tangents_nor_inner_gradients() -> None:
    """Delayed scales fit what they were recorded of; a direction is of another size."""
    x, w, v = (a for a in s.operands())
    x, w = x[0, 0], w[0]
    amax = jnp.stack([jnp.abs(x).max(), jnp.abs(w).max(), jnp.float32(1e-3)])

    def second(state: Any, v: Any) -> Any:
        def f(w: Any) -> Any:
            return jnp.sum(jnp.tanh(dot_general(x, w, s.MATRIX, "fp8-delayed", amax=state)[0]))

        return jax.jvp(jax.grad(f), (w,), (v,))[1]

    second = jax.jit(second)
    empty = AmaxHistory.empty(4)
    known = empty._replace(amax=amax)
    for size in (1.0, 1e4):  # beyond 448 times what W's history would hold
        np.testing.assert_allclose(second(known, size * v), second(empty, size * v), rtol=1e-5)


@pytest.mark.parametrize("name", ["int8"])
def test_convolutions_have_second_derivatives(name: str) -> None:
    rng = np.random.default_rng(1)
    x, k, v = (
        jnp.asarray(rng.normal(size=n), jnp.float32)
        for n in ((2, 6, 6, 4), (3, 3, 4, 4), (3, 3, 4, 4))
    )

    def f(recipe: str | None) -> Any:
        def function(k: Any) -> Any:
            if recipe is None:
                y = jax.lax.conv_general_dilated(
                    x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            else:
                y = conv_general_dilated(x, k, (1, 1), "SAME", recipe, key=jax.random.key(0))
            return jnp.sum(jnp.tanh(0.1 * y))

        return function

    @jax.jit
    def second(k: Any) -> Any:
        out = []
        for recipe in (None, name):
            g = jax.grad(f(recipe))
            out.append((jax.grad(lambda k, g=g: jnp.sum(g(k) * v))(k), jax.jvp(g, (k,), (v,))[1]))
        return out

    plain, low = second(k)
    for a, b in zip(plain, low, strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
        assert 1e-4 < error < 0.03


def test_a_penalty_on_gradients_goes_through_autocast() -> None:
    x, w, _ = s.operands()

    def penalty(f: Any) -> Any:
        return jax.jit(jax.grad(lambda w: jnp.sum(jax.grad(f)(w) ** 2)))(w[0])

    f = lambda w: jnp.sum(jnp.tanh(x[0, 0] @ w))  # noqa: E731
    low = mpjax.autocast(f, "bf16", rules=["**=r=int8-switchback"])
    want = penalty(f)
    assert float(jnp.linalg.norm(penalty(low) - want) / jnp.linalg.norm(want)) < 0.05


def test_a_transpose_is_refused_in_one_line() -> None:
    x, w = jnp.ones((2, 8)), jnp.ones((8, 8))

    def product(x: Any) -> Any:
        return dot_general(x, w, (((1,), (0,)), ((), ())), "fp8")

    for function in (product, jax.jit(product)):
        with pytest.raises(ConfigError, match=r"cannot be transposed.*leave it out by a rule"):
            jax.linear_transpose(function, x)(x)
