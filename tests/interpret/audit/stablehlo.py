"""Product FLOPs of a StableHLO text by operand dtypes: what a jaxpr's own count is checked by."""

from __future__ import annotations

import math
import re
from collections import Counter

_FUNCTION = re.compile(r"^  func\.func (?:public |private )?@([\w.$-]+)\(")
_CALL = re.compile(r"\bcall @([\w.$-]+)\(")
_TYPES = re.compile(r": \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>\s*$")
_CONTRACTED = re.compile(r"contracting_dims = \[([\d, ]*)\] x ")
_KERNEL = re.compile(r"dim_numbers = \[[^]]*\]x\[([^]]*)\]")


def _tensor(text: str) -> tuple[list[int], str]:
    *shape, dtype = text.split("x")
    return [int(size) for size in shape], dtype


def _product(line: str) -> tuple[tuple[str, str], int]:
    """Operand dtypes and FLOPs, two for each multiplication."""
    types = _TYPES.search(line)
    if types is None:
        raise ValueError(f"a product whose types cannot be read: {line.strip()}")
    (left, a), (right, b), (out, _) = map(_tensor, types.groups())
    if contracted := _CONTRACTED.search(line):
        terms = math.prod(left[int(i)] for i in contracted[1].split(",") if i.strip())
    elif kernel := _KERNEL.search(line):
        terms = math.prod(right) // right[[d.strip() for d in kernel[1].split(",")].index("o")]
    else:
        raise ValueError(f"a product whose dimensions cannot be read: {line.strip()}")
    return (a, b), 2 * math.prod(out) * terms


def product_flops(text: str) -> Counter[tuple[str, str]]:
    """Returns operand dtypes -> FLOPs of `main`, with the functions that it calls.

    Args:
      text: of `jax.jit(f).lower(...).as_text()`.

    Raises:
      ValueError: a product that cannot be read, or a loop, whose iterations the text does not give.
    """
    own: dict[str, Counter[tuple[str, str]]] = {}
    calls: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if start := _FUNCTION.match(line):
            name = start[1]
            own[name], calls[name] = Counter(), []
        if "stablehlo.while" in line:
            raise ValueError(f"{name}: a loop; count a program without loops")
        if "stablehlo.dot" in line or "stablehlo.convolution" in line:
            dtypes, flops = _product(line)
            own[name][dtypes] += flops
        calls.setdefault(name, []).extend(_CALL.findall(line))

    def total(name: str) -> Counter[tuple[str, str]]:
        return sum(map(total, calls[name]), own[name])

    return total("main")


def low_share(flops: Counter[tuple[str, str]]) -> float:
    """Returns the share of product FLOPs whose operands are both of 16 bits."""
    low = sum(count for dtypes, count in flops.items() if set(dtypes) <= {"bf16", "f16"})
    return low / sum(flops.values())
