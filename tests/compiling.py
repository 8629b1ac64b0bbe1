"""What makes programs compile sooner, where this jaxlib has it."""

from __future__ import annotations

import functools

import jax

PLAIN: dict[str, bool | int] = {
    "xla_cpu_use_fusion_emitters": False,  # XLA's older, simpler code generator
    "xla_cpu_parallel_codegen_split_count": 1,  # the cores have other tests to run
}


def _known(name: str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: PLAIN[name]}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def plain_code() -> dict[str, bool | int]:
    """Returns those of the options that this jaxlib has; JAX 0.12 has no older generator."""
    return {name: value for name, value in PLAIN.items() if _known(name)}
