"""Moments converted from one storage to another, to restore a checkpoint of other moments."""

from __future__ import annotations

from typing import TypeAlias, TypeGuard

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.optim.moments.blockwise import Blockwise, quantize_blocks, stored
from mpjax.optim.moments.dither import dither_key
from mpjax.optim.moments.low_moments import (
    MomentState,
    centered,
    is_variance,
    moment_of,
    widen,
)
from mpjax.paths import key_at, path_name
from mpjax.precision.moments import MomentFormat
from mpjax.typing import Array, PyTree

Stored: TypeAlias = Array | jax.ShapeDtypeStruct | Blockwise

# Compiled: operation by operation, the shapes of a model would be some thousand programs.
_widen = jax.jit(widen, static_argnums=1)
_stored = jax.jit(stored, static_argnums=(1, 2))


def is_block(x: object) -> TypeGuard[Blockwise]:
    """Returns whether a node is a moment in codes."""
    return isinstance(x, Blockwise)


def describe_format(x: Blockwise) -> str:
    """Returns what the arrays of a moment in codes do not say: its format and its sign.

    Example:
      >>> from mpjax.optim.moments.blockwise import quantize_blocks
      >>> describe_format(quantize_blocks(jnp.ones(3), "int8", signed=False))
      'int8@256 unsigned'
    """
    return f"{x.format} {'signed' if x.signed else 'unsigned'}"


def parse_format(text: str, x: Array) -> Blockwise:
    """Returns a float32 moment in the format that `describe_format` wrote."""
    name, _, sign = text.partition(" ")
    return quantize_blocks(x, MomentFormat.parse(name), sign == "signed")


def recast_moments(state: PyTree, like: PyTree, own: frozenset[type]) -> PyTree:
    """Returns an optimizer's state with its moments stored like those of another state.

    What is stored alike keeps its bits; the rest goes by way of float32 and is rounded
    stochastically. Counts are kept.

    Args:
      state: a MomentState or an optimizer's own state.
      like: the same of the same optimizer; arrays or shapes.
      own: types of which the weights' tree is made.

    Raises:
      ConfigError: numbers overflow a dtype.
    """
    before, after = isinstance(state, MomentState), isinstance(like, MomentState)
    held = state.inner if before else state
    wide = _widen(state, own) if before else state
    wide = centered(wide) if after else wide
    key = dither_key("recast", 0)

    def leaf(path: jax.tree_util.KeyPath, template: Stored, x: Array, raw: Stored) -> Stored:
        moved = before != after and is_variance(held, path)
        if not moved and _alike(raw, template):
            return raw
        if isinstance(template, Blockwise):
            return _stored(x, template.format, template.signed, key_at(key, path))
        if not jnp.issubdtype(template.dtype, jnp.floating) or x.dtype == template.dtype:
            return x
        signed = moment_of(held, path, own).signed
        format = MomentFormat(jnp.dtype(template.dtype).name)
        cast = _stored(x.astype(jnp.float32), format, signed, key_at(key, path))
        lost = jnp.isfinite(x) & ~jnp.isfinite(cast)
        if lost.any():
            raise ConfigError(
                f"moments: {int(lost.sum())} values of {path_name(path)} overflow"
                f" {template.dtype}, whose largest is {float(jnp.finfo(template.dtype).max):g};"
                " choose another format"
            )
        return cast

    inner = jax.tree_util.tree_map_with_path(
        leaf, like.inner if after else like, wide, held, is_leaf=is_block
    )
    if not after:
        return inner
    return MomentState(inner, state.draws if before else jnp.int32(0))


def _alike(x: Stored, template: Stored) -> bool:
    """Whether two leaves are stored alike."""
    if isinstance(x, Blockwise) and isinstance(template, Blockwise):
        pairs = ((x.codes, template.codes), (x.absmax, template.absmax))
        same = all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
        return same and describe_format(x) == describe_format(template)
    if isinstance(x, Blockwise) or isinstance(template, Blockwise):
        return False
    return bool(x.dtype == template.dtype)
