"""Random bits for rounding: a hash of an element's index and a key, cheaper than JAX's own."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from mpjax.errors import ConfigError
from mpjax.typing import Array, ArrayLike, Key, Shape

_PRNG = "threefry2x32"


def _hashed(key: Array, width: int, shape: Shape) -> Array:
    """Bits of each element: Wellons' lowbias32 of its index, with both words of the key.

    They do not depend on how an array is cut over devices: the index is that of the whole array.
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + place * np.uint32(stride % 2**32)
        stride *= shape[axis]
    x = index ^ key[0]
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D) ^ key[1]
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    if width > 32:
        raise ConfigError(f"a key of dither_key draws 32 bits at most, not {width}")
    return (x >> np.uint32(32 - width)).astype(f"uint{width}")


def _wrapped(key: Array) -> Key:
    return jax.random.wrap_key_data(key, impl=_PRNG)


@functools.cache
def _implementation() -> Hashable:
    """Seeds and folds as threefry does, once a leaf; the bits of its elements are hashed."""
    return define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jax.random.key_data(jax.random.key(seed, impl=_PRNG)),
        split=lambda key, shape: jax.random.key_data(jax.random.split(_wrapped(key), shape)),
        random_bits=_hashed,
        fold_in=lambda key, data: jax.random.key_data(jax.random.fold_in(_wrapped(key), data)),
        name="mpjax_dither",
        tag="dither",
    )


def dither_key(word: str, step: ArrayLike) -> Key:
    """Returns the key of a step: `jax.random.fold_in` it with a leaf, and draw bits once.

    Threefry draws a number in about 100 operations, more than all the rest of storing a moment;
    rounding needs no more than bits without a pattern, in 12.

    Args:
      word: what is rounded, so that two uses draw different bits.
      step: number of the step.

    Example:
      >>> key = jax.random.fold_in(dither_key("moments", 3), 7)
      >>> jax.random.bits(key, (2,)).dtype.name
      'uint32'

    References:
      Wellons 2018, Prospecting for Hash Functions (lowbias32).
    """
    return jax.random.fold_in(
        jax.random.key(zlib.crc32(word.encode()), impl=_implementation()), step
    )
