"""Quantised arrays, values in a format with the scales that they share, and trees of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeGuard

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.formats.format_table import Format
from mpjax.formats.tiles import per_tile, scale_up
from mpjax.typing import Array, DType, DTypeLike, Params, Shape


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "tensor_scale", "offsets"),
    meta_fields=("format", "tile", "dtype", "scale_bits"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array in a format: `dequantize()` is values times scales, plus offsets if it has any.

    Args:
      values: in the dtype that holds the format where JAX has one, else in `dtype`.
      scales: float32, one for each tile; numbers of e8m0 or e4m3 for mx and nv.
      tensor_scale: nv's second scale, or None.
      format: of the values.
      tile: size of a tile along each axis.
      dtype: of the array that was quantised.
      scale_bits: bits that a scale takes in its own format, 0 where all are 1.
      offsets: float32, one for each tile, or None.
    """

    values: Array
    scales: Array
    tensor_scale: Array | None
    format: Format
    tile: Shape
    dtype: DType
    scale_bits: int = 32
    offsets: Array | None = None

    @property
    def shape(self) -> Shape:
        """Shape of the array."""
        return self.values.shape

    @property
    def is_stack(self) -> bool:
        """Whether it was made under `vmap`, a stack of arrays whose tiles are those of one."""
        return self.values.ndim > len(self.tile)

    @property
    def full_scales(self) -> Array:
        """What the values of each tile are multiplied by, the scales, times nv's second one."""
        return self.scales if self.tensor_scale is None else self.scales * self.tensor_scale

    def dequantize(self, dtype: DTypeLike | None = None) -> Array:
        """Returns the array, in its own dtype or another.

        Raises:
          ConfigError: that is no dtype.
        """
        try:
            wanted = jnp.dtype(self.dtype if dtype is None else dtype)
        except TypeError:
            raise ConfigError(
                f"dequantize: {brief(dtype)} is no dtype; write jnp.float32 or jnp.bfloat16"
            ) from None
        return _dequantize(self, jax.dtypes.canonicalize_dtype(wanted))

    @property
    def nbytes(self) -> float:
        """Bytes that values and scales take when each is stored in its format's bits."""
        bits = self.values.size * self.format.bits + self.scales.size * self.scale_bits
        offsets = 0 if self.offsets is None else 4 * self.offsets.size
        return bits / 8 + offsets + (0 if self.tensor_scale is None else 4)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantize(q: Quantized, dtype: DType) -> Array:
    if q.is_stack:
        return jax.vmap(lambda one: _dequantize(one, dtype))(q)
    out = scale_up(q.values, q.full_scales, q.tile)
    if q.offsets is not None:
        out = per_tile(out, q.offsets, q.tile, lambda v, m: v + m)
    return out.astype(dtype)


def is_quantized(leaf: object) -> TypeGuard[Quantized]:
    """Returns whether a leaf is a Quantized."""
    return isinstance(leaf, Quantized)


def weight_view(params: Params) -> Params:
    """Returns weights that a forward pass can use: Quantized leaves dequantised, others as is.

    Example:
      >>> from mpjax.formats import quantize
      >>> q = quantize(jnp.array([1.0, 0.3]), "e4m3", scale_rounding="up")
      >>> weight_view({"w": q, "norm": jnp.ones(1)})["w"].tolist()
      [1.0, 0.3125]
    """
    return jax.tree.map(
        lambda p: p.dequantize() if is_quantized(p) else p, params, is_leaf=is_quantized
    )


def slice_view(params: Params) -> Params:
    """Returns weights as `weight_view` does, but stacks of Quantized as they are.

    A slice or a scan along their leading axis yields a Quantized for each, so that only one is
    dequantised at a time.
    """
    return jax.tree.map(
        lambda p: p.dequantize() if is_quantized(p) and not p.is_stack else p,
        params,
        is_leaf=is_quantized,
    )
