"""Scaled gradients against plain ones, and what happens without the scale."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.optim import DynamicLossScale, NoOpLossScale, StaticLossScale, scaled_value_and_grad

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.float32)
W = jnp.asarray(np.random.default_rng(2).normal(size=4), jnp.float32)


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean(jnp.square(x @ params["w"] - y))


def small_loss(w: Any) -> Any:
    """A loss in float16 whose gradient, 2^-28, float16 cannot hold (its smallest is 2^-24)."""
    return (jnp.sum(w * jnp.float16(2.0**-14))).astype(jnp.float32) * jnp.float32(2.0**-14)


@pytest.mark.parametrize(
    "scale", [NoOpLossScale(), StaticLossScale(2.0**9), DynamicLossScale(2.0**14)]
)
def test_equals_plain_grad_bit_for_bit_in_float32(scale: Any) -> None:
    """A power of two passes through every float32 product without rounding."""
    params = {"w": W}
    loss, grads, finite = jax.jit(scaled_value_and_grad(loss_fn))(scale, params, X, Y)
    expected_loss, expected = jax.jit(jax.value_and_grad(loss_fn))(params, X, Y)
    assert loss == expected_loss and bool(finite)
    assert np.array_equal(grads["w"], expected["w"])
    by_hand = 2 / 8 * np.asarray(X, np.float64).T @ (np.asarray(X, np.float64) @ W - Y)
    np.testing.assert_allclose(grads["w"], by_hand, rtol=1e-5)  # a float32 sum of 8


def test_a_scale_that_is_no_power_of_two_is_divided_out_too() -> None:
    _, grads, _ = scaled_value_and_grad(loss_fn)(StaticLossScale(1000.0), {"w": W}, X, Y)
    _, expected, _ = scaled_value_and_grad(loss_fn)(NoOpLossScale(), {"w": W}, X, Y)
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-5)
    assert not np.allclose(np.asarray(grads["w"]) * 1000, expected["w"])


def test_the_scale_saves_gradients_that_float16_loses() -> None:
    w = jnp.ones(4, jnp.float16)
    fn = jax.jit(scaled_value_and_grad(small_loss))
    _, lost, finite = fn(NoOpLossScale(), w)
    assert np.array_equal(lost, np.zeros(4)) and bool(finite)  # the control: gone, unnoticed
    _, saved, _ = fn(StaticLossScale(2.0**14), w)
    assert np.array_equal(saved, np.full(4, 2.0**-28))
    assert saved.dtype == lost.dtype == jnp.float32


def test_too_large_a_scale_is_seen() -> None:
    w = jnp.full(4, 60000.0, jnp.float16)
    fn = jax.jit(scaled_value_and_grad(lambda w: jnp.mean(w.astype(jnp.float32)) * 16))
    assert bool(fn(StaticLossScale(2.0**13), w)[2])
    loss, grads, finite = fn(StaticLossScale(2.0**14), w)  # cotangent 2^16 in float16 is inf
    assert np.isinf(grads).all() and not bool(finite)
    assert np.isfinite(loss)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_in_one_leaf_is_seen(bad: float) -> None:
    def loss(params: Any, factor: Any) -> Any:
        return jnp.sum(params["a"]) + jnp.sum(params["b"] * factor)

    params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    fn = jax.jit(scaled_value_and_grad(loss))
    scale = StaticLossScale(4.0)
    assert bool(fn(scale, params, jnp.ones(4))[2])
    assert not bool(fn(scale, params, jnp.ones(4).at[2].set(bad))[2])


def test_aux_is_passed_through_unscaled_and_undifferentiated() -> None:
    def with_aux(params: Any, x: Any, y: Any) -> Any:
        loss = loss_fn(params, x, y)
        return loss, {"loss": loss, "step": jnp.int32(3), "half": loss.astype(jnp.float16)}

    scale = StaticLossScale(2.0**10)
    (loss, aux), grads, finite = jax.jit(scaled_value_and_grad(with_aux, has_aux=True))(
        scale, {"w": W}, X, Y
    )
    plain, expected, _ = jax.jit(scaled_value_and_grad(loss_fn))(scale, {"w": W}, X, Y)
    assert loss == plain == aux["loss"] and bool(finite)
    assert aux["step"].dtype == jnp.int32 and aux["half"].dtype == jnp.float16
    assert np.array_equal(grads["w"], expected["w"])


def test_a_low_loss_is_reported_in_float32() -> None:
    loss, _, _ = scaled_value_and_grad(lambda w: jnp.sum(w))(
        NoOpLossScale(), jnp.ones(2, jnp.bfloat16)
    )
    assert loss.dtype == jnp.float32 and loss == 2.0


def test_unscale_takes_the_scale_that_scaled_the_loss() -> None:
    """At a growth step, dividing by the adjusted scale halves the gradient."""
    scale = DynamicLossScale(2.0**10, growth_interval=1)
    _, grads, finite = scaled_value_and_grad(loss_fn)(scale, {"w": W}, X, Y)
    expected = jax.grad(loss_fn)({"w": W}, X, Y)["w"]
    assert np.array_equal(grads["w"], expected)
    scaled = jax.grad(lambda p: scale.scale(loss_fn(p, X, Y)))({"w": W})
    mutant = scale.adjust(finite).unscale(scaled)["w"]
    assert np.array_equal(mutant, expected / 2) and not np.array_equal(mutant, expected)


def test_a_loop_of_ones_own() -> None:
    """Scale, gradient, step or skip, adjust: written out, with plain SGD on float16 products."""

    def loss(w: Any, x: Any, y: Any) -> Any:
        out = x.astype(jnp.float16) @ w.astype(jnp.float16)
        return jnp.mean(jnp.square(out.astype(jnp.float32) - y)) * 2.0**-12

    @jax.jit
    def step(scale: Any, w: Any) -> Any:
        _, grads, finite = scaled_value_and_grad(loss)(scale, w, X, Y)
        w = jnp.where(finite, w - 2.0**11 * grads * 0.2, w)
        return scale.adjust(finite), w

    scale, w = DynamicLossScale(2.0**30, growth_interval=20, max_scale=2.0**30), jnp.zeros(4)
    scales = []
    for _ in range(500):
        scale, w = step(scale, w)
        scales.append(float(scale.value))
    best = np.linalg.lstsq(np.asarray(X), np.asarray(Y), rcond=None)[0]
    np.testing.assert_allclose(w, best, atol=5e-3)  # float16 products: 2^-11 of numbers near 1
    assert min(scales) < 2.0**30 and scales[-1] > min(scales)  # it backed off, and grew again
