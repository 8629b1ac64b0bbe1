"""Reads StableHLO: which products and casts a program holds, and in which dtypes."""

from __future__ import annotations

import re
from collections import Counter

_FUNCTION = re.compile(r"func\.func (?:public|private) @(\S+?)\(")
_CALL = re.compile(r"call @(\S+?)\(")
_DOT = re.compile(r"stablehlo\.dot_general .*: \((.*?)\) -> (\S+)")
_CONVOLUTION = re.compile(r"stablehlo\.convolution\(.* : \((.*?)\) -> (\S+)")
_CAST = re.compile(r"stablehlo\.convert (%\S+) : \((tensor<\S+>)\) -> (tensor<\S+>)")
_FLOAT = re.compile(r"(?:bf|f)\d+(?:E\d+M\d+\w*)?>?$")


def products_and_casts(stablehlo: str) -> Counter[str]:
    """Counts the products and float-to-float casts of a program, by shape and dtype.

    Functions that are called are counted at every call; a cast of a value that the same function
    casts already is counted once, as compilers do.

    Args:
      stablehlo: text of a module, `jax.jit(f).lower(...).as_text()`.

    Returns:
      How often each kind occurs, such as `dot (tensor<2x3xbf16>, tensor<3x4xbf16>) -> ...` and
      `cast tensor<3x4xf32> -> tensor<3x4xbf16>`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> text = jax.jit(lambda x: x.astype(jnp.bfloat16)).lower(jnp.ones(3)).as_text()
      >>> products_and_casts(text)
      Counter({'cast tensor<3xf32> -> tensor<3xbf16>': 1})
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in stablehlo.splitlines():
        if match := _FUNCTION.search(line):
            lines = bodies.setdefault(match[1], [])
        lines.append(line)

    counted: dict[str, Counter[str]] = {}

    def count(name: str) -> Counter[str]:
        if name in counted:
            return counted[name]
        total: Counter[str] = Counter()
        cast_once: set[tuple[str, str]] = set()
        for line in bodies[name]:
            if match := _DOT.search(line):
                total[f"dot ({match[1]}) -> {match[2]}"] += 1
            elif match := _CAST.search(line):
                value, old, new = match.groups()
                if _FLOAT.search(old) and _FLOAT.search(new) and (value, new) not in cast_once:
                    cast_once.add((value, new))
                    total[f"cast {old} -> {new}"] += 1
            elif match := _CALL.search(line):
                total.update(count(match[1]))
        counted[name] = total
        return total

    return count("main")


def convolutions(stablehlo: str) -> tuple[str, ...]:
    """Returns the dtypes of a program's convolutions, each kind once.

    Args:
      stablehlo: text of a module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> conv = jax.jit(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"))
      >>> ones = jnp.ones((1, 1, 4, 4), jnp.bfloat16)
      >>> convolutions(conv.lower(ones, ones).as_text())
      ('bf16 * bf16 -> bf16',)
    """
    found = set()
    for match in filter(None, map(_CONVOLUTION.search, stablehlo.splitlines())):
        arrays = (*match[1].split(", "), match[2])
        x, k, y = (array.removesuffix(">").split("x")[-1] for array in arrays)
        found.add(f"{x} * {k} -> {y}")
    return tuple(sorted(found))
