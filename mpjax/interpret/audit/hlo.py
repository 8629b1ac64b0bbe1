"""What XLA made of a program on this backend: products, casts and dtypes of its optimised HLO.

CPU HLO is no oracle of dtype: products of bfloat16 become products of float32 there.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

from mpjax.interpret.audit.collectives import Collective, collectives

_FLOATS = re.compile(r"^(?:bf|f)\d")


@dataclasses.dataclass(frozen=True)
class Optimised:
    """How many instructions of each kind an optimised program has; one in a loop counts once.

    Args:
      backend: that it was compiled for.
      products: such as `f32 x f32 -> f32`.
      converts: between floats, such as `bf16 -> f32`.
      dtypes: of all instructions.
      collectives: what is sent between devices.
    """

    backend: str
    products: dict[str, int]
    converts: dict[str, int]
    dtypes: dict[str, int]
    collectives: tuple[Collective, ...] = ()


def read(text: str, backend: str, mesh: Mapping[str, int] | None = None) -> Optimised:
    """Reads an optimised program.

    Args:
      text: `compiled.as_text()`.
      backend: that it was compiled for.
      mesh: axis -> devices, for the names of axes.

    Example:
      >>> read('''ENTRY %main (a: bf16[8,8]) -> f32[8,8] {
      ...   %a = bf16[8,8]{1,0} parameter(0)
      ...   %b = f32[8,8]{1,0} convert(%a)
      ...   ROOT %dot = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}
      ... }''', "cpu").products
      {'f32 x f32 -> f32': 1}
    """
    from mpjax.probe import instructions  # a command, which no package loads before it runs

    products: Counter[str] = Counter()
    converts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for one in instructions(text):
        if one.several:
            continue
        dtypes[one.dtype] += 1
        if one.is_product:
            products[f"{' x '.join(one.operands[:2])} -> {one.dtype}"] += 1
        elif one.opcode == "convert" and all(map(_FLOATS.match, (one.operands[0], one.dtype))):
            converts[f"{one.operands[0]} -> {one.dtype}"] += 1
    sent = collectives(text, mesh)
    return Optimised(backend, dict(products), dict(converts), dict(dtypes), sent)
