"""Rotary positions against complex rotation in float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.ops import rotary
from mpjax.precision import parse_policy
from tests.ops.oracle import rounded

POSITIONS = np.array([0, 1, 255, 257, 1001, 4095])
TOLERANCE = {"f32": 1e-3, "bf16": 0.02, "f16": 3e-3}  # f32: the angle's error, 4095 * 2^-24


def oracle(x_BTHK: Any, positions: Any, theta: float = 10000.0) -> Any:
    half = x_BTHK.shape[-1] // 2
    z = x_BTHK[..., :half] + 1j * x_BTHK[..., half:]
    turn = np.exp(1j * positions[:, None] * theta ** (-np.arange(half) / half))
    z = z * turn[None, :, None, :]
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("low", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_against_complex_rotation(low: str, theta: float) -> None:
    x = rounded(np.random.default_rng(0).normal(size=(2, len(POSITIONS), 3, 8)), low)
    policy = parse_policy(low)
    y = rotary(jnp.asarray(x, policy.compute_dtype), jnp.asarray(POSITIONS), policy, theta=theta)
    assert y.dtype == policy.output_dtype
    np.testing.assert_allclose(
        np.asarray(y, np.float64),
        oracle(x, POSITIONS, theta),
        atol=TOLERANCE[low] * np.abs(x).max(),
    )


def test_positions_past_256_need_float32_angles() -> None:
    x = rounded(np.random.default_rng(1).normal(size=(1, 1, 1, 8)), "bf16")
    wrong = oracle(x, rounded([257], "bf16"))  # bfloat16 reads 257 as 256
    assert np.abs(wrong - oracle(x, np.array([257]))).max() > 0.3
    y = rotary(jnp.asarray(x, jnp.bfloat16), jnp.array([257]), parse_policy("bf16"))
    assert np.abs(np.asarray(y, np.float64) - oracle(x, np.array([257]))).max() < 0.03


def test_scores_depend_on_the_distance_only() -> None:
    q, k = (np.float32(np.random.default_rng(s).normal(size=(1, 1, 1, 16))) for s in (2, 3))

    def score(t: int, s: int) -> float:
        f32 = parse_policy("f32")
        a = rotary(jnp.asarray(q), jnp.array([t]), f32)
        b = rotary(jnp.asarray(k), jnp.array([s]), f32)
        return jnp.sum(a * b).item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2
