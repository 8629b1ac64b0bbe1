"""Convolutions under a policy and GroupNorm, against loops in float64 numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.stablehlo import convolutions
from mpjax import ops
from mpjax.precision import parse_policy
from tests.ops.oracle import gradient, rounded

pytestmark = pytest.mark.usefixtures("fast_compile")
F32 = parse_policy("f32")


def naive(x: Any, k: Any, stride: int) -> np.ndarray:
    """Convolution with zeros around, `SAME`, one result at a time."""
    N, H, W, C = x.shape
    a, b, _, F = k.shape
    h, w = -(-H // stride), -(-W // stride)
    top = max((h - 1) * stride + a - H, 0) // 2
    left = max((w - 1) * stride + b - W, 0) // 2
    y = np.zeros((N, h, w, F), np.result_type(x, k))
    for i, j, u, v in np.ndindex(h, w, a, b):
        row, column = i * stride + u - top, j * stride + v - left
        if 0 <= row < H and 0 <= column < W:
            y[:, i, j] += x[:, row, column] @ k[u, v]
    return y


def operands(size: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(size)
    return rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(size, size, 3, 4))


def run(x: Any, k: Any, text: str, stride: int, dy: Any, gradient_dtype: Any = jnp.float32) -> Any:
    """y, dx and dk."""
    policy = parse_policy(text)

    def both(x: Any, k: Any, dy: Any) -> Any:
        y, pull = jax.vjp(
            lambda x, k: ops.convolution(
                x, k, policy, strides=(stride, stride), gradient_dtype=gradient_dtype
            ),
            x, k,
        )  # fmt: skip
        return y, *pull(dy.astype(y.dtype))

    return jax.jit(both)(x, k, jnp.asarray(dy, jnp.float32))


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2), (2, 1)])
def test_it_is_the_sum_over_the_window_and_so_are_its_gradients(size: int, stride: int) -> None:
    x, k = operands(size)
    want = naive(x, k, stride)
    dy = np.random.default_rng(9).normal(size=want.shape)
    got = run(jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32), "f32", stride, dy)
    right = (
        want,
        gradient(lambda x: (naive(x, k, stride) * dy).sum(), x),
        gradient(lambda k: (naive(x, k, stride) * dy).sum(), k),
    )
    for a, b in zip(got, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("low", ["bf16", "f16"])
def test_operands_are_rounded_once_and_sums_are_not(low: str) -> None:
    x, k = operands()
    dy = np.random.default_rng(9).normal(size=naive(x, k, 2).shape)
    x32, k32 = jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32)
    got = run(x32, k32, f"p=f32,c={low},o=f32", 2, dy)
    x, k, dy = (rounded(np.asarray(a, np.float32), low) for a in (x, k, dy))
    right = (
        naive(x, k, 2),
        gradient(lambda x: (naive(x, k, 2) * dy).sum(), x),
        gradient(lambda k: (naive(x, k, 2) * dy).sum(), k),
    )
    for a, b in zip(got, right, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    # the control: all-16 rounds its result, and its weight gradient still is not rounded
    low_y, _, low_dk = run(x32, k32, low, 2, dy)
    error = np.abs(np.asarray(low_y, np.float64) - right[0]).max()
    assert error > 1e-4 * np.abs(right[0]).max()
    assert low_dk.dtype == jnp.float32
    assert np.abs(low_dk - rounded(np.asarray(low_dk), low)).max() > 0


@pytest.mark.parametrize(
    ("policy", "gradient_dtype", "want"),
    [
        ("p=f32,c=bf16,o=f32", jnp.float32, {"bf16 * bf16 -> f32"}),
        ("bf16", jnp.float32, {"bf16 * bf16 -> bf16", "bf16 * bf16 -> f32"}),
        ("bf16", jnp.bfloat16, {"bf16 * bf16 -> bf16"}),
        ("f16", jnp.float32, {"f16 * f16 -> f16", "f16 * f16 -> f32"}),
    ],
)
def test_the_program_has_the_dtypes_of_the_policy(
    policy: str, gradient_dtype: Any, want: set[str]
) -> None:
    low = parse_policy(policy)
    x = jnp.zeros((1, 4, 4, 2), low.output_dtype)
    k = jnp.zeros((3, 3, 2, 2), low.param_dtype)

    def loss(x: Any, k: Any) -> Any:
        y = ops.convolution(x, k, low, gradient_dtype=gradient_dtype)
        return jnp.sum(y.astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, k)
    assert set(convolutions(lowered)) == want


def test_group_norm_is_numpys_and_so_are_its_gradients() -> None:
    rng = np.random.default_rng(3)
    x, dy = rng.normal(2, 3, size=(2, 2, 3, 6)), rng.normal(size=(2, 2, 3, 6))
    scale, bias = rng.normal(size=6), rng.normal(size=6)

    def want(x: Any, scale: Any = scale) -> Any:
        g = x.reshape(2, 2, 3, 3, 2)
        g = g - g.mean((1, 2, 4), keepdims=True)
        y = g / np.sqrt((g * g).mean((1, 2, 4), keepdims=True) + 1e-5)
        return y.reshape(x.shape) * scale + bias

    def ours(x: Any, scale: Any) -> Any:
        return ops.group_norm(x, scale, jnp.asarray(bias, jnp.float32), F32, groups=3)

    @jax.jit
    def both(x: Any, scale: Any, dy: Any) -> Any:
        y, pull = jax.vjp(ours, x, scale)
        return y, *pull(dy)

    y, dx, dscale = both(*(jnp.asarray(a, jnp.float32) for a in (x, scale, dy)))
    np.testing.assert_allclose(y, want(x), atol=2e-6)
    np.testing.assert_allclose(dx, gradient(lambda x: (want(x) * dy).sum(), x), atol=2e-6)
    right = gradient(lambda s: (want(x, s) * dy).sum(), scale)
    np.testing.assert_allclose(dscale, right, atol=1e-5)
    whole = (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True)
    assert np.abs(whole * scale + bias - want(x)).max() > 0.1  # the groups do matter
