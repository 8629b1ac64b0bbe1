"""Arrays near the smallest float32, which compiled arithmetic flushes on CPUs, against NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax.formats import Format, quantize
from mpjax.formats.scaling import to_scale
from mpjax.ops import dot_general
from tests.formats.oracle import GRIDS, KNOWN, slow_quantize

pytestmark = pytest.mark.usefixtures("fast_compile")
NAMES = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8", "int4", "int2")
POWERS = [(n, s, r) for n in NAMES for s in ("mx(32)", "row") for r in ("up", "down")]
FLOATS = [(n, s, "none") for n in ("e4m3", "e2m1", "int8") for s in ("row", "block(1x8)", "tensor")]
FLOATS += [("e2m1", "nv(16)", "none"), ("e4m3", "nv(16)", "none")]


def tiny() -> np.ndarray:
    """Rows of 32 numbers, in each binade from below the smallest number to 2^-100."""
    rng, rows = np.random.default_rng(0), [np.zeros(32)]
    for exponent in range(-152, -100):
        rows.append(rng.normal(size=32) * 2.0**exponent)
        rows.append(rng.normal(size=32) * 2.0 ** (exponent + rng.uniform(-12, 0, 32)))
    rows += [np.full(32, 2.0**-127), np.full(32, 2.0**-126), np.full(32, 2.0**-149)]
    with np.errstate(under="ignore"):
        return np.stack(rows).astype(np.float32)


X = tiny()


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def ours(x: Any, name: str, scaling: str, rule: str) -> Any:
    q = quantize(x, name, scaling, scale_rounding=rule)
    return q.dequantize(), q.scales


@pytest.mark.parametrize(("name", "scaling", "rule"), POWERS)
def test_scales_that_are_powers_of_two(name: str, scaling: str, rule: str) -> None:
    got, scales = map(np.asarray, ours(X, name, scaling, rule))
    want, slow = slow_quantize(X, name, scaling, rule)
    np.testing.assert_array_equal(scales.ravel(), slow)
    np.testing.assert_array_equal(got, want)
    assert (scales.min() == 2.0**-127) == (scaling == "mx(32)")
    if not Format(name).is_integer:
        assert (np.abs(got[got != 0]) < 2.0**-126).any()  # so subnormal numbers come out


@pytest.mark.parametrize(("name", "scaling", "rule"), FLOATS)
def test_float32_scales(name: str, scaling: str, rule: str) -> None:
    x = X[:56] if scaling == "tensor" else X
    got = np.asarray(ours(x, name, scaling, rule)[0])
    want = slow_quantize(x, name, scaling, rule)[0]
    # a subnormal product is rounded twice: to 24 bits and to a multiple of 2^-149
    small = np.abs(want) < 2.0**-126
    np.testing.assert_array_equal(got[~small], want[~small])
    np.testing.assert_allclose(got[small].astype(float), want[small], rtol=0, atol=2.0**-149)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "tf32", "e8m3"])
def test_no_scale_leaves_subnormal_numbers(name: str) -> None:
    got = np.asarray(ours(X, name, "none", "none")[0])
    want = (GRIDS | KNOWN)[name].round(X) if name in GRIDS | KNOWN else X
    if name in ("float32", "bfloat16"):
        want = X.astype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[name])
        np.testing.assert_array_equal(got, want.astype(np.float32))
    assert got[(X != 0) & (np.abs(X) > 2.0**-129)].all()


def test_the_smallest_scale_of_mx_is_that_of_e8m0() -> None:
    amax = np.float32([2.0**-149, 2.0**-127, 2.0**-126, 448 * 2.0**-127, 449 * 2.0**-127, 0])
    got = np.asarray(to_scale(jnp.asarray(amax), Format("e4m3"), "up", 2.0**-127))
    np.testing.assert_array_equal(got, np.float32([2.0**-127] * 4 + [2.0**-126, 1]))
    got = np.asarray(to_scale(jnp.asarray(amax), Format("int2"), "up", 2.0**-127))
    np.testing.assert_array_equal(got[:3], np.float32([2.0**-127, 2.0**-127, 2.0**-126]))


def test_a_product_of_tiny_blocks_is_not_lost() -> None:
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(4, 32)) * 2.0**-122)
    w = np.float32(rng.normal(size=(32, 4)) * 2.0**20)
    dims = (((1,), (0,)), ((), ()))
    got = jax.jit(lambda x, w: dot_general(x, w, dims, "mxfp8"))(x, w)
    want = x.astype(np.float64) @ w.astype(np.float64)
    assert np.linalg.norm(got - want) < 0.06 * np.linalg.norm(want)
