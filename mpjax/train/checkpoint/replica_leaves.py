"""What replicas have of their own, for another number of them than at the save.

The mean of what all have not sent of compressed gradients is what the next steps have to send: each
replica of the new mesh takes this mean, and their mean is the same. Right factors of low rank are
of the parts of a cut weight and begin anew. Of replicas that train apart each new one takes the
mean of their weights, and the rest, which may be codes, of the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.optim.compression import first_basis
from mpjax.typing import Array

if TYPE_CHECKING:
    from mpjax.train.checkpoint.leaves import Leaf

_ROOT, _LOCAL = "exchange/", "local/"


def fits_other_replicas(name: str, saved: Leaf, wanted: Leaf) -> bool:
    """Returns whether a leaf is of replicas, and is wanted for others than those at the save.

    Args:
      name: its path in the train state.
      saved: shape and dtype in the checkpoint.
      wanted: shape and dtype in the new state.
    """
    if (
        not name.startswith((_ROOT, _LOCAL))
        or saved.dtype != wanted.dtype
        or saved.shape == wanted.shape
    ):
        return False
    if name.startswith(f"{_ROOT}basis/"):
        return saved.ndim == wanted.ndim
    return saved.shape[1:] == wanted.shape[1:]


def as_saved(saved: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the saved shape, cut as the wanted one is but for the axis of replicas."""
    cut = wanted.sharding
    if isinstance(cut, NamedSharding):
        cut = NamedSharding(cut.mesh, PartitionSpec(None, *cut.spec[1:]))
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=cut)


def for_replicas(name: str, array: Array, wanted: jax.ShapeDtypeStruct) -> Array:
    """Returns what the wanted replicas begin with.

    Args:
      name: path of the leaf.
      array: what those at the save had.
      wanted: shape, dtype and sharding.
    """
    basis, weight = f"{_ROOT}basis/", name.removeprefix(f"{_ROOT}basis/")

    def begin(x: Array) -> Array:
        if name.startswith(basis):
            first = first_basis(weight, wanted.shape[2:])
        elif name.startswith(_LOCAL) and not _is_weight(name, x):
            first = x[:1]
        else:
            first = jnp.mean(x.astype(jnp.float32), axis=0, keepdims=True).astype(x.dtype)
        return jnp.broadcast_to(first, wanted.shape)

    return jax.jit(begin, out_shardings=wanted.sharding)(array)


def _is_weight(name: str, x: Array) -> bool:
    """Whether a leaf is a weight or its float32 copy, in a dtype of plain numbers."""
    held = name.startswith(f"{_LOCAL}params/") or "/update_state/master/" in name
    return held and x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
