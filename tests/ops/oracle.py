"""Derivatives and rounding in float64 numpy, with no JAX in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def rounded(x: Any, dtype: str) -> np.ndarray:
    """x after a round trip through a dtype, in float64."""
    return np.asarray(x).astype(NUMPY[dtype]).astype(np.float64)


def gradient(f: Callable[[np.ndarray], Any], x: Any) -> np.ndarray:
    """Gradient of a real analytic function by the complex step: exact to float64 rounding."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):
        moved = x.astype(np.complex128)
        moved[index] += 1e-100j
        out[index] = f(moved).imag / 1e-100
    return out
