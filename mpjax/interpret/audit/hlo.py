"""What XLA made of a program on this backend: products, casts and dtypes of its optimised HLO.

CPU HLO is no oracle of dtype: products of bfloat16 become products of float32 there.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

_INSTRUCTION = re.compile(r"%?([\w.\-]+) = (\w+)\[[\d,]*\]\S* ([\w\-]+)\((.*)")
_CALLED = re.compile(r'custom_call_target="([^"]*(?:matmul|gemm|dot|conv|cublas)[^"]*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_FLOATS = re.compile(r"^(?:bf|f)\d")


@dataclasses.dataclass(frozen=True)
class Optimised:
    """How many instructions of each kind an optimised program has; one in a loop counts once.

    Args:
      backend: that it was compiled for.
      products: such as `f32 x f32 -> f32`.
      converts: between floats, such as `bf16 -> f32`.
      dtypes: of all instructions.
    """

    backend: str
    products: dict[str, int]
    converts: dict[str, int]
    dtypes: dict[str, int]


def read(text: str, backend: str) -> Optimised:
    """Reads an optimised program.

    Args:
      text: `compiled.as_text()`.
      backend: that it was compiled for.

    Example:
      >>> read('''ENTRY %main (a: bf16[8,8]) -> f32[8,8] {
      ...   %a = bf16[8,8]{1,0} parameter(0)
      ...   %b = f32[8,8]{1,0} convert(%a)
      ...   ROOT %dot = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}
      ... }''', "cpu").products
      {'f32 x f32 -> f32': 1}
    """
    products: Counter[str] = Counter()
    converts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    known: dict[str, str] = {}
    for line in text.splitlines():
        if line.endswith("{"):
            known.clear()  # names are only sure to be unique within one computation
        match = _INSTRUCTION.search(line)
        if not match:
            continue
        name, dtype, opcode, rest = match.groups()
        known[name] = dtype
        dtypes[dtype] += 1
        operands = [known.get(o, "?") for o in _OPERAND.findall(re.split(r"\)(?:,|$)", rest)[0])]
        library = opcode == "custom-call" and _CALLED.search(rest)
        if opcode in ("dot", "convolution") or library:
            products[f"{' x '.join(operands[:2])} -> {dtype}"] += 1
        elif opcode == "convert" and all(_FLOATS.match(d) for d in (operands[0], dtype)):
            converts[f"{operands[0]} -> {dtype}"] += 1
    return Optimised(backend, dict(products), dict(converts), dict(dtypes))
