"""Reads StableHLO: which products and casts a program holds, and in which dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.mlir import ir


def _operations(block: ir.Block) -> Iterator[Any]:  # the bindings have no types of attributes
    """All operations of a block, with those of its loops and branches."""
    for op in block.operations:
        yield op.operation
        for region in op.regions:
            for inner in region.blocks:
                yield from _operations(inner)


def _functions(lowered: jax.stages.Lowered) -> dict[str, ir.Block]:
    module: Any = lowered.compiler_ir("stablehlo")
    functions = {op.name.value: op for op in module.body.operations}
    return {name: op.regions[0].blocks[0] for name, op in functions.items()}


def products_and_casts(lowered: jax.stages.Lowered) -> Counter[str]:
    """Counts the products and float-to-float casts of a program, by shape and dtype.

    Functions that are called are counted at every call; a cast of a value that the same function
    casts already is counted once, as compilers do.

    Args:
      lowered: of `jax.jit(f).lower(...)`.

    Returns:
      How often each kind occurs, such as `dot (tensor<2x3xbf16>, tensor<3x4xbf16>) -> ...` and
      `cast tensor<3x4xf32> -> tensor<3x4xbf16>`.

    Example:
      >>> import jax.numpy as jnp
      >>> lowered = jax.jit(lambda x: x.astype(jnp.bfloat16)).lower(jnp.ones(3))
      >>> products_and_casts(lowered)
      Counter({'cast tensor<3xf32> -> tensor<3xbf16>': 1})
    """
    functions = _functions(lowered)
    counted: dict[str, Counter[str]] = {}

    def count(name: str) -> Counter[str]:
        if name in counted:
            return counted[name]
        total: Counter[str] = Counter()
        cast_once: set[tuple[ir.Value, str]] = set()
        for op in _operations(functions[name]):
            types = [value.type for value in op.operands]
            if op.name == "stablehlo.dot_general":
                total[f"dot ({', '.join(map(str, types))}) -> {op.results[0].type}"] += 1
            elif op.name == "stablehlo.convert":
                old, new = types[0], op.results[0].type
                floats = all(isinstance(t.element_type, ir.FloatType) for t in (old, new))
                if floats and old != new and (op.operands[0], str(new)) not in cast_once:
                    cast_once.add((op.operands[0], str(new)))
                    total[f"cast {old} -> {new}"] += 1
            elif op.name == "func.call":
                total.update(count(op.attributes["callee"].value))
        counted[name] = total
        return total

    return count("main")


def convolutions(lowered: jax.stages.Lowered) -> tuple[str, ...]:
    """Returns the dtypes of a program's convolutions, each kind once.

    Args:
      lowered: of `jax.jit(f).lower(...)`.

    Example:
      >>> import jax.numpy as jnp
      >>> conv = jax.jit(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"))
      >>> ones = jnp.ones((1, 1, 4, 4), jnp.bfloat16)
      >>> convolutions(conv.lower(ones, ones))
      ('bf16 * bf16 -> bf16',)
    """
    found = set()
    for block in _functions(lowered).values():
        for op in _operations(block):
            if op.name == "stablehlo.convolution":
                arrays = [value.type.element_type for value in (*op.operands, *op.results)]
                found.add("{} * {} -> {}".format(*arrays))
    return tuple(sorted(found))
