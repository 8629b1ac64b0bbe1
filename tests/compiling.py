"""What makes programs compile sooner, where this jaxlib has it."""

from __future__ import annotations

import functools

import jax

PLAIN = {"xla_cpu_use_fusion_emitters": False}


@functools.cache
def plain_code() -> dict[str, bool]:
    """Returns the option for XLA's older, simpler code generator; JAX 0.12 has it no more."""
    try:
        jax.jit(lambda: 0, compiler_options=PLAIN).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return PLAIN
