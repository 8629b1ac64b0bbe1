"""A compiled step that takes a plain tree as gradients of the scaled loss."""

from __future__ import annotations

from typing import Any

import jax

from mpjax.optim import Optimizer, ScaledGradients


def scaled_step(opt: Optimizer, **options: Any) -> Any:
    """`step(grads, state, params)` under `jax.jit`, whose options are given."""
    return jax.jit(lambda grads, *rest: opt.step(ScaledGradients(grads), *rest), **options)
