"""Error measures against float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.formats import max_error, quantize, saturation_rate, sqnr, underflow_rate

X = (np.random.default_rng(0).standard_normal((16, 200)) * 3).astype(np.float32)


pytestmark = pytest.mark.usefixtures("fast_compile")


def decibels(x: np.ndarray, q: np.ndarray) -> float:
    x, q = x.astype(np.float64), q.astype(np.float64)
    return float(10 * np.log10((x**2).sum() / ((x - q) ** 2).sum()))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])  # squares would leave float32 at both ends
@pytest.mark.parametrize("name", ["e4m3", "e2m1", "int8"])
def test_sqnr_and_max_error_equal_numpy(name: str, size: float) -> None:
    x = jnp.asarray(X * np.float32(size))
    q = quantize(x, name, "row")
    want = np.asarray(q.dequantize())
    np.testing.assert_allclose(sqnr(x, q), decibels(np.asarray(x), want), atol=1e-3)
    np.testing.assert_array_equal(sqnr(x, q), sqnr(x, q.dequantize()))
    error = np.abs(np.asarray(x) - want).max()
    np.testing.assert_array_equal(max_error(x, q.dequantize()), error)
    # compiled as one, x - v s is a fused multiply-add: off by a rounding of v s
    slack = float(np.abs(np.asarray(x)).max()) * 2.0**-23
    np.testing.assert_allclose(jax.jit(max_error)(x, q), error, rtol=0, atol=slack)
    assert np.isnan(max_error(x.at[3, 17].set(np.nan), q))


def test_sqnr_orders_formats_and_has_its_limits() -> None:
    x = jnp.asarray(X)
    found = [float(sqnr(x, quantize(x, name, "row"))) for name in ("e2m1", "e4m3", "int8", "int16")]
    assert found == sorted(found) and 10 < found[0] < 20 < found[1] < 35 < found[2] < 50
    assert sqnr(x, x) == np.inf and sqnr(x * 0, x * 0) == np.inf
    assert sqnr(x, x * 0) == 0
    assert np.isnan(sqnr(x, x.at[0, 0].set(np.nan)))


def test_underflow_rate_counts_what_became_zero() -> None:
    x = np.float32([0, 1e-3, -1e-3, 1, 2, 1e-40, -1e-45, 0])
    q = np.where(np.abs(x) < 0.5, np.float32(0), x)
    assert underflow_rate(jnp.asarray(x), jnp.asarray(q)) == 4 / 8  # subnormals too, zeros not
    assert underflow_rate(jnp.asarray(x), jnp.asarray(x)) == 0
    halves = jnp.asarray(X, jnp.bfloat16)
    quantised = quantize(halves, "e2m1", "tensor")
    want = ((np.asarray(halves) != 0) & (np.asarray(quantised.dequantize()) == 0)).mean()
    np.testing.assert_allclose(underflow_rate(halves, quantised), want, rtol=1e-6)
    assert want > 0.1


def test_saturation_rate_counts_what_lies_beyond() -> None:
    x = jnp.asarray(X) * 100
    rate = saturation_rate(x, quantize(x, "e4m3", "none"))
    np.testing.assert_allclose(rate, (np.abs(np.asarray(x)) > 448).mean(), rtol=1e-6)
    assert rate > 0.05
    for scaling in ("tensor", "row", "block(1x128)"):  # scales that hold the largest
        for name in ("e4m3", "int8", "e2m1", "int4"):
            assert saturation_rate(x, quantize(x, name, scaling)) == 0
    low = jnp.array([[-128.0, -129.0, 127.0, 128.0]])
    assert saturation_rate(low, quantize(low, "int8", "none")) == 0.5
