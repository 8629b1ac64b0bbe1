"""LayerNorm and RMSNorm against float64, where float32 and float16 are under strain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.ops import norm
from mpjax.precision import parse_policy
from tests.ops.jaxprs import dtypes
from tests.ops.oracle import gradient, rounded

EPSILON = 1e-5


def oracle(x: Any, scale: Any, bias: Any, centre: bool) -> Any:
    x = x - x.mean(-1, keepdims=True) if centre else x
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale + bias


def one_pass(x: Any, epsilon: float = EPSILON) -> Any:
    """The mutant: E[x^2] - E[x]^2 cancels when the mean is large."""
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x), -1, keepdims=True) - jnp.square(mean)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_forward_and_backward_against_float64(centre: bool, mean: float) -> None:
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(mean, 1.0, (2, 3, 16)))
    scale, bias, dy = (np.float32(rng.normal(size=s)) for s in ((16,), (16,), (2, 3, 16)))
    y, pull = jax.vjp(
        lambda *a: norm(*a, parse_policy("f32"), centre=centre),
        *(jnp.asarray(a) for a in (x, scale, bias)),
    )
    tolerance = 1e-5 * (1 + mean / 10)  # x - mean keeps an absolute error of mean * 2^-24
    np.testing.assert_allclose(
        np.asarray(y), oracle(x.astype(float), scale, bias, centre), atol=tolerance
    )
    full = [a.astype(np.float64) for a in (x, scale, bias)]
    for i, got in enumerate(pull(jnp.asarray(dy))):

        def scalar(moved: Any, i: int = i) -> Any:
            return (oracle(*full[:i], moved, *full[i + 1 :], centre) * dy).sum()

        np.testing.assert_allclose(np.asarray(got), gradient(scalar, full[i]), atol=3 * tolerance)


def test_a_mean_of_100_needs_two_passes() -> None:
    x = np.float32(np.random.default_rng(1).normal(100, 0.1, (4, 64)))
    want = oracle(x.astype(np.float64), 1.0, 0.0, True)
    ours = norm(jnp.asarray(x), jnp.ones(64), None, parse_policy("f32"), centre=True)
    assert np.abs(np.asarray(ours) - want).max() < 1e-3
    assert np.abs(np.asarray(one_pass(jnp.asarray(x))) - want).max() > 1e-2


@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
def test_float16_with_tiny_variance_keeps_a_finite_gradient(centre: bool) -> None:
    rng = np.random.default_rng(2)
    x = rounded(rng.normal(0.0, 0.005, (2, 64)), "f16")
    dy = rounded(rng.normal(size=(2, 64)), "f16")
    policy = parse_policy("f16")

    def naive(x: Any) -> Any:
        x = x - jnp.mean(x, -1, keepdims=True) if centre else x
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)

    def ours(x: Any) -> Any:
        return norm(x, jnp.ones(64, jnp.float16), None, policy, centre=centre)

    def pull(fn: Any) -> Any:
        half = jnp.asarray(x, jnp.float16)
        return np.asarray(jax.vjp(fn, half)[1](jnp.asarray(dy, jnp.float16))[0], np.float64)

    want = gradient(lambda moved: (oracle(moved, 1.0, 0.0, centre) * dy).sum(), x)
    assert not np.isfinite(pull(naive)).all()
    error = np.linalg.norm(pull(ours) - want) / np.linalg.norm(want)
    assert error < 0.03, error  # float16 squares of 0.005 are subnormal: 2-3 digits are left


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_statistics_run_in_the_compute_dtype(kind: str) -> None:
    x = jnp.ones((2, 8), jnp.bfloat16)

    def loss(x: Any, text: str) -> Any:
        policy = parse_policy(text)
        y = norm(x, jnp.ones(8), None, policy, centre=kind == "layer")
        assert y.dtype == policy.output_dtype
        return jnp.sum(y.astype(jnp.float32))

    for text, want in (("c=f32,o=bf16", "float32"), ("c=bf16", "bfloat16")):
        assert dtypes("rsqrt", jax.grad(lambda x: loss(x, text)), x) == {want}  # noqa: B023


def test_no_wide_copy_is_kept_for_the_backward_pass() -> None:
    x, policy = jnp.ones((4, 32), jnp.bfloat16), parse_policy("c=f32,o=bf16")

    def wide(fn: Any) -> int:
        kept = jax.tree.leaves(jax.vjp(fn, x)[1])
        return sum(k.dtype == jnp.float32 and k.size >= x.size for k in kept)

    # scale_by keeps its operand, the normalised values; the statistics keep x in bfloat16.
    assert wide(lambda x: norm(x, jnp.ones(32), None, policy, centre=True)) == 1
    assert wide(lambda x: one_pass(x.astype(jnp.float32)) * jnp.ones((4, 32))) > 1
