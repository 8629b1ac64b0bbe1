"""Reads a GPU's optimised HLO: which kernel multiplies what, and in which dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_DEFINED = re.compile(r"^\s*(?:ROOT )?(%[\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_NAME = re.compile(r'op_name="([^"]+)"')
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
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


def _lines(hlo: str) -> Iterator[tuple[str, str, str, str]]:
    for line in hlo.splitlines():
        if match := _DEFINED.match(line):
            yield match[1], match[2], match[3], match[4]


def products(hlo: str) -> list[Product]:
    """Returns all matrix products: calls of cuBLAS, Triton's, and products left to XLA itself."""
    types = {name: type for name, type, _, _ in _lines(hlo)}
    found = []
    for _, type, op, rest in _lines(hlo):
        target = _TARGET.search(rest)
        kernel = target[1] if target else op
        if not (kernel.startswith("__cublas") or "gemm" in kernel or op in ("dot", "convolution")):
            continue
        names = re.findall(r"%[\w.\-]+", rest.split(")")[0])
        left, right = (_SHAPE.match(types[name]) for name in names[:2])
        result = _SHAPE.search(type)
        where = _NAME.search(rest)
        assert left and right and result, rest
        shape = tuple(int(n) for n in result[2].split(",") if n)
        found.append(Product(kernel, (left[1], right[1]), shape, where[1] if where else ""))
    return found


def fused_attention(hlo: str) -> tuple[int, int]:
    """Returns how many of cuDNN's fused attention kernels run forward and backward."""
    targets = [t[1] for _, _, _, rest in _lines(hlo) if (t := _TARGET.search(rest))]
    backward = [t for t in targets if t.startswith(FUSED) and t.endswith("Backward")]
    return sum(t.startswith(FUSED) for t in targets) - len(backward), len(backward)
