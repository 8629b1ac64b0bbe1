"""Rotary positions against complex rotation in float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.ops import rotary
from mpjax.ops.rotary import RopeScaling, sinusoid
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


def test_each_row_may_have_its_own_positions() -> None:
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 1, 8)), jnp.float32)
    f32, rows = parse_policy("f32"), jnp.array([[0, 1, 2], [5, 6, 7]])
    both = rotary(x, rows, f32)
    for row in range(2):
        one = rotary(x[row : row + 1], rows[row], f32)
        np.testing.assert_array_equal(np.asarray(both)[row], np.asarray(one)[0])
    assert np.abs(np.asarray(both)[1] - np.asarray(rotary(x, rows[0], f32))[1]).max() > 0.1


def test_llama3_leaves_short_waves_and_stretches_long_ones() -> None:
    scaling = RopeScaling("llama3", factor=8.0, low=1.0, high=4.0, context=64)
    x = jnp.ones((1, 1, 1, 16))
    f32, at = parse_policy("f32"), jnp.array([1])

    def angles(**spec: Any) -> np.ndarray:
        y = np.asarray(rotary(x, at, f32, theta=1e6, **spec)).ravel()
        return (np.arctan2(y[8:], y[:8]) - np.pi / 4) % (2 * np.pi)

    ratio = angles(scaling=scaling)[:5] / angles()[:5]  # later ones are too small to divide
    np.testing.assert_allclose(ratio[0], 1, rtol=1e-5)  # 2 pi < 64 / 4
    assert 1 / 8 < ratio[1] < 1  # 35 tokens: between
    np.testing.assert_allclose(ratio[2:], 1 / 8, rtol=1e-3)  # 199 > 64


def test_sinusoids_against_numpy() -> None:
    got = np.asarray(sinusoid(jnp.array([[0, 3], [257, 1000]]), 6))
    for row, column, i in np.ndindex(2, 2, 3):
        angle = [[0, 3], [257, 1000]][row][column] / 10000 ** (2 * i / 6)
        want = np.sin(angle), np.cos(angle)
        np.testing.assert_allclose(got[row, column, 2 * i : 2 * i + 2], want, atol=1e-4)
