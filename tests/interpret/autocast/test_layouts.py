"""Products of bfloat16 with float32 results, in layouts that the CPU alone has no product for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(3, 8)).astype(np.float32), RNG.normal(size=(8, 4)).astype(np.float32)
# The first is refused by the backend itself: a product whose result is turned.
LAYOUTS = {
    "result turned": lambda x, w: (x @ w).T,
    "plain": lambda x, w: x @ w,
    "both turned": lambda x, w: w.T @ x.T,
    "mapped last": lambda x, w: jax.vmap(jnp.dot, (None, 1), -1)(x, w),
}


def low(x):
    """The operands as bfloat16 holds them, exactly."""
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_float32_result_of_low_operands_is_right(name):
    found = jax.jit(mpjax.autocast(LAYOUTS[name], "p=f32,c=bf16,o=f32"))(X, W)
    want, full = low(X) @ low(W), X @ W
    want, full = (want.T, full.T) if "turned" in name else (want, full)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - full).max() > 1e-4, "the operands were rounded"
