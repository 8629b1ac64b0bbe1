"""Reads a GPU's optimised HLO: which kernel multiplies what, and in which dtypes."""

from __future__ import annotations

import re
from typing import NamedTuple

from mpjax.probe import instructions

_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_NAME = re.compile(r'op_name="([^"]+)"')
FUSED = "__cudnn$fmhaSoftmax"
FLOAT8 = "__cublas$lt$matmul$f8"


class Product(NamedTuple):
    """One matrix product of a compiled program.

    Args:
      kernel: the library's kernel, such as `__cublas$lt$matmul`; or HLO's own `dot`.
      dtypes: of the two operands.
      shape: of the result.
      path: where it comes from, such as `jit(step)/transpose(jvp(Block))/mlp/up/...`.
    """

    kernel: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    path: str


def products(hlo: str) -> list[Product]:
    """Returns all matrix products: calls of cuBLAS, Triton's, and products left to XLA itself."""
    found = []
    for one in instructions(hlo):
        target = _TARGET.search(one.rest)
        kernel = target[1] if target else one.opcode
        if kernel.startswith("__cublas") or "gemm" in kernel or kernel in ("dot", "convolution"):
            where = _NAME.search(one.rest)
            left, right = one.operands[:2]
            found.append(Product(kernel, (left, right), one.shape, where[1] if where else ""))
    return found


def fused_attention(hlo: str) -> tuple[int, int]:
    """Returns how many of cuDNN's fused attention kernels run forward and backward."""
    targets = [t[1] for one in instructions(hlo) if (t := _TARGET.search(one.rest))]
    backward = [t for t in targets if t.startswith(FUSED) and t.endswith("Backward")]
    return sum(t.startswith(FUSED) for t in targets) - len(backward), len(backward)
