"""Narrow forms of float32 numbers, as arrays that collectives can send.

A codec encodes rows of numbers, one for each replica that is to have it, and decodes them. Legend:
R rows, M numbers of a row, a multiple of the codec's block.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from mpjax.formats import Format, quantize
from mpjax.precision.compression import Compression

Message: TypeAlias = tuple[Array, ...]  # each (R, ...)


@runtime_checkable
class Codec(Protocol):
    """Encodes rows of numbers."""

    @property
    def block(self) -> int:
        """Numbers that are encoded together; a row holds a multiple of them."""

    def encode(self, x_RM: Float[Array, "R M"]) -> Message:
        """Returns what is sent of each row."""

    def decode(self, message: Message) -> Float[Array, "R M"]:
        """Returns the numbers that a message says, float32."""


def make_codec(compression: Compression) -> Codec:
    """Returns the codec of a compression of kind `dtype`, `block` or `sign`."""
    if compression.kind == "dtype":
        return CastCodec(compression.dtype)
    assert compression.block is not None, compression.name
    if compression.kind == "sign":
        return SignCodec(compression.block)
    values = BlockCodec(compression.name, compression.block)
    if compression.sent == compression.block:
        return values
    return PrunedCodec(values._replace(block=compression.sent), compression.block)


def pack_bits(bits: Bool[Array, "R M"]) -> UInt8[Array, "R bytes"]:
    """Returns eight bits a byte, the first one lowest."""
    eights = bits.reshape(bits.shape[0], -1, 8).astype(jnp.uint8)
    shifts = jnp.arange(8, dtype=jnp.uint8)[None, None]
    return jnp.sum(eights << shifts, axis=-1, dtype=jnp.uint8)


def unpack_bits(packed: UInt8[Array, "R bytes"]) -> Bool[Array, "R M"]:
    """Undoes `pack_bits`."""
    shifts = jnp.arange(8, dtype=jnp.uint8)[None, None]
    return ((packed[..., None] >> shifts) & jnp.uint8(1)).astype(bool).reshape(packed.shape[0], -1)


class CastCodec(NamedTuple):
    """Numbers in a 16-bit dtype, rounded to nearest; what is larger becomes its largest.

    Args:
      dtype: `bfloat16` or `float16`.
    """

    dtype: str
    block: int = 1

    def encode(self, x_RM: Array) -> Message:
        """See `Codec`."""
        top = jnp.float32(jnp.finfo(self.dtype).max)
        return (jnp.clip(x_RM, -top, top).astype(self.dtype),)  # inf would stay in the residual

    def decode(self, message: Message) -> Array:
        """See `Codec`."""
        return message[0].astype(jnp.float32)  # exact


class BlockCodec(NamedTuple):
    """Numbers in 8 or 4 bits with a float32 scale a block; two of 4 bits share a byte.

    Args:
      format: `int8`, `int4`, `e4m3` or `e5m2`.
      block: numbers of a block.
    """

    format: str
    block: int

    def encode(self, x_RM: Array) -> Message:
        """See `Codec`."""
        q = quantize(x_RM, self.format, f"block(1x{self.block})")
        if self.format == "int4":
            low, high = jnp.split(q.values.astype(jnp.uint8).reshape(x_RM.shape[0], -1, 2), 2, -1)
            packed = (low & jnp.uint8(15)) | (high << jnp.uint8(4))
            return packed[..., 0], q.scales
        if self.format == "int8":
            return q.values, q.scales
        # As bytes: a compiler without 8-bit floats would send wider ones.
        return lax.bitcast_convert_type(q.values, jnp.uint8), q.scales

    def decode(self, message: Message) -> Array:
        """See `Codec`."""
        sent, scales = message
        if self.format == "int4":
            both = jnp.stack([sent << jnp.uint8(4), sent], axis=-1)  # the sign at the top
            values = lax.bitcast_convert_type(both, jnp.int8) >> jnp.int8(4)
            sent = values.reshape(sent.shape[0], -1)
        elif self.format != "int8":
            dtype = Format(self.format).dtype
            assert dtype is not None, self.format
            sent = lax.bitcast_convert_type(sent, dtype)
        blocks = sent.astype(jnp.float32).reshape(*scales.shape, self.block)
        return (blocks * scales[..., None]).reshape(sent.shape)


class SignCodec(NamedTuple):
    """One bit a number, and the mean magnitude of a block: the nearest such numbers.

    Args:
      block: numbers of a block.
    """

    block: int

    def encode(self, x_RM: Array) -> Message:
        """See `Codec`."""
        blocks = x_RM.reshape(x_RM.shape[0], -1, self.block)
        return pack_bits(x_RM >= 0), jnp.mean(jnp.abs(blocks), axis=-1)

    def decode(self, message: Message) -> Array:
        """See `Codec`."""
        packed, size = message
        positive = unpack_bits(packed).reshape(*size.shape, self.block)
        return jnp.where(positive, size[..., None], -size[..., None]).reshape(packed.shape[0], -1)


class PrunedCodec(NamedTuple):
    """The largest numbers of each block, encoded, and a bit a number that says where they are.

    Args:
      values: codec of the numbers that are sent, whose block is as many as a block sends.
      block: numbers of a block.
    """

    values: BlockCodec
    block: int

    def encode(self, x_RM: Array) -> Message:
        """See `Codec`."""
        blocks = x_RM.reshape(-1, self.block)
        _, largest = lax.top_k(jnp.abs(blocks), self.values.block)
        places = jnp.sort(largest, axis=-1)
        rows = jnp.arange(blocks.shape[0])[:, None]
        sent = jnp.zeros(blocks.shape, bool).at[rows, places].set(True)
        chosen = jnp.take_along_axis(blocks, places, axis=-1).reshape(x_RM.shape[0], -1)
        return pack_bits(sent.reshape(x_RM.shape)), *self.values.encode(chosen)

    def decode(self, message: Message) -> Array:
        """See `Codec`."""
        packed, *rest = message
        chosen = self.values.decode(tuple(rest)).reshape(-1, self.values.block)
        sent = unpack_bits(packed).reshape(-1, self.block)
        order = jnp.maximum(jnp.cumsum(sent.astype(jnp.int32), axis=-1) - 1, 0)
        found = jnp.take_along_axis(chosen, order, axis=-1)
        return jnp.where(sent, found, jnp.float32(0)).reshape(packed.shape[0], -1)


def largest_count(share: float, size: int) -> int:
    """Returns how many numbers of a weight are sent, at least one."""
    return max(1, round(share * size))


def largest_numbers(x_M: Float[Array, " M"], count: int) -> tuple[Array, Array]:
    """Returns the numbers of largest magnitude and their places, int32."""
    _, places = lax.top_k(jnp.abs(x_M), count)
    return x_M[places], places.astype(jnp.int32)


def orthonormal(p_LDR: Float[Array, "L D R"]) -> Float[Array, "L D R"]:
    """Returns orthonormal columns that span those of each matrix; columns of zeros become some."""
    return jnp.linalg.qr(p_LDR)[0]


def message_bytes(codec: Codec, rows: int, width: int) -> int:
    """Returns the bytes of a message of (rows, width) numbers, scales included."""
    message = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((rows, width), jnp.float32))
    return sum(x.size * x.dtype.itemsize for x in message)
