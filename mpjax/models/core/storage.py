"""The storage of an array for inference: a dtype, or a Format and the groups of its scales."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.formats import Format, Quantized, Scaling, check_offset, check_scaling, quantize
from mpjax.typing import Array, DTypeLike, PyTree

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_DTYPES = {"fp32": "float32", "fp16": "float16"} | dict(zip(_SHORT.values(), _SHORT, strict=True))
_HELP = (
    "write a dtype (f32 bf16 f16) or FORMAT@SCALING with FORMAT int8, int4, e4m3 or another and"
    " SCALING row (one scale a channel), a number such as 32 (one for each 32 numbers), tensor,"
    " mx(32) or nv(16); +offset behind a number, row or tensor gives integers an offset too"
)
_OFFSET = "+offset"


@dataclasses.dataclass(frozen=True)
class Storage:
    """A dtype, or a Format with scales.

    Args:
      format: of the values.
      scaling: which values share a scale; None stores the values themselves in the format's dtype.
      offset: whether they share an offset too.

    Example:
      >>> str(Storage.parse("int4@32")), str(Storage.parse("int8")), str(Storage.parse("bfloat16"))
      ('int4@32', 'int8@row', 'bf16')
    """

    format: Format
    scaling: Scaling | None
    offset: bool = False

    @classmethod
    def parse(cls, value: str | DTypeLike | Storage, where: str = "storage") -> Storage:
        """Reads a dtype, `FORMAT@SCALING` or `FORMAT@SCALING+offset`; a FORMAT alone has rows.

        Args:
          value: such as `bf16`, `int8`, `int4@32`, `int4@32+offset`, `e4m3@tensor`, `e2m1@mx(32)`;
            or a dtype such as `jnp.bfloat16`.
          where: what to call the setting in an error.

        Raises:
          ConfigError: anything else.
        """
        if isinstance(value, Storage):
            return value
        if not isinstance(value, str):
            try:  # numpy takes None and more for a dtype
                value = np.dtype(value if isinstance(value, np.dtype | type) else "").name
            except TypeError:
                raise ConfigError(f"{where}: {brief(value)}; {_HELP}") from None
        offset = value.endswith(_OFFSET)
        name, at, scaling = value.removesuffix(_OFFSET).partition("@")
        if (dtype := _DTYPES.get(name, name)) in _SHORT:
            if at or offset:
                raise ConfigError(f"{where}: {value!r} scales a dtype; write {name}")
            return cls(Format(dtype), None)
        if not name or (at and not scaling):
            raise ConfigError(f"{where}: {value!r} is incomplete; {_HELP}")
        try:
            format = Format("e4m3" if name == "fp8" else name)
            parsed = Scaling.parse(f"block(1x{scaling})" if scaling.isdigit() else scaling or "row")
            check_scaling(format, parsed, parsed.default_rounding)
            if offset:
                check_offset(format, parsed, parsed.default_rounding)
        except ConfigError as error:
            raise ConfigError(f"{where}: {value!r}: {error}; {_HELP}") from None
        if parsed.kind == "none":
            raise ConfigError(f"{where}: {value!r} leaves numbers without a scale; {_HELP}")
        return cls(format, parsed, offset)

    def __str__(self) -> str:
        if self.scaling is None:
            return _SHORT[self.format.name]
        s = self.scaling
        plain = s.kind == "block" and s.rows == 1
        return f"{self.format.name}@{s.columns if plain else s}{_OFFSET if self.offset else ''}"

    def store(self, x: Array, axis: int | tuple[int, ...] = -1) -> Array | Quantized:
        """Returns an array as it is stored: an array of the dtype, or a Quantized.

        Args:
          x: float32, bfloat16 or float16.
          axis: the axis, or axes, that a product sums over, along which rows and blocks extend.
        """
        if self.scaling is None:
            return x.astype(self.format.dtype)  # what was asked for
        return quantize(x, self.format, self.scaling, axis=axis, offset=self.offset)

    def shaped(self, x: Array | jax.ShapeDtypeStruct, axis: int | tuple[int, ...] = -1) -> PyTree:
        """Returns shapes and dtypes of `store(x)`."""
        return jax.eval_shape(lambda x: self.store(x, axis), x)


def stored_bytes(tree: PyTree) -> int:
    """Returns the bytes of a tree as a program holds it: int4 two to a byte, scales included.

    Example:
      >>> x = jax.numpy.ones((2, 64))
      >>> stored_bytes(x), stored_bytes(Storage.parse("int4@32").store(x))
      (512, 80)
    """

    def leaf(a: Array) -> int:
        # `nbytes` counts a byte for each int4; a compiled program holds two in a byte.
        small = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4}
        bits = small.get(np.dtype(a.dtype).name, 8 * np.dtype(a.dtype).itemsize)
        return -(-a.size * bits // 8)

    return sum(leaf(a) for a in jax.tree.leaves(tree))
