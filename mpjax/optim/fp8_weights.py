"""Weights stored in fp8: float8 values with the scales that rows or blocks of them share.

Scales are powers of two, so that values times scales are exact in float32 and a change of scale
moves no number but those that fall among the format's subnormals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.formats import Format, Quantized, Scaling, is_quantized, quantize
from mpjax.formats.format_table import FormatLike
from mpjax.formats.quantize import scaled_values
from mpjax.formats.scaling import to_scale
from mpjax.formats.tiles import amax_of
from mpjax.paths import path_name
from mpjax.precision import Precision, matches
from mpjax.precision.rule import nearest
from mpjax.typing import Array, Key, Params

Weight: TypeAlias = Array | Quantized


def _storage_format(format: FormatLike) -> Format:
    if isinstance(format, Precision):
        raise ConfigError(
            f"store_weights: {brief(format)} is no number format; write the one in which weights"
            " are stored, such as store_weights(params, 'e4m3'), and give the Precision to wrap"
        )
    format = Format.of(format)
    if format.kind != "float" or format.bits != 8 or format.dtype is None:
        raise ConfigError(
            f"store_weights: {format.name} is no 8-bit floating-point format that JAX stores;"
            " take e4m3 or e5m2, or store bf16 and f16 weights as arrays of that dtype"
        )
    return format


@explains_calls
def store_weights(
    params: Params,
    format: FormatLike = "e4m3",
    scaling: str | Scaling = "row",
    where: str | Sequence[str] | Callable[[str], bool] = "**",
) -> Params:
    r"""Returns the weights with some of them stored in fp8, as Quantized leaves.

    A weight is $w = s\,v$ with $v$ in the format and $s = 2^{\lceil \log_2 (amax / max) \rceil}$.
    Only an update rule writes them: take gradients with respect to `weight_view(params)` and give
    both to `Optimizer.step`.

    Args:
      params: float32, bfloat16 or float16 weights; the view keeps their dtype.
      format: an 8-bit floating-point format, such as `e4m3` or `e5m2`.
      scaling: `tensor`, `row` (along the last axis), `block(RxC)` or `mx(N)`.
      where: which weights: path patterns (see `mpjax.precision.matches`), or a function of the
        path.

    Raises:
      ConfigError: a format or scaling that weights are not stored in, or a pattern that matches
        no weight.

    Example:
      >>> params = {"mlp": {"up": jnp.array([[1.0, 0.3]])}, "norm": jnp.ones(2)}
      >>> stored = store_weights(params, where="mlp")
      >>> stored["mlp"]["up"].values.dtype.name, stored["norm"].dtype.name
      ('float8_e4m3fn', 'float32')
      >>> stored["mlp"]["up"].dequantize().tolist()
      [[1.0, 0.3125]]

    References:
      Peng et al. 2023, FP8-LM: Training FP8 Large Language Models, section 2.2 (scaled weights).
    """
    format, scaling = _storage_format(format), Scaling.parse(scaling)
    if scaling.kind in ("none", "nv"):
        raise ConfigError(
            f"store_weights: scaling={scaling} has no scales that an update can renew; take tensor,"
            " row, block(128x128) or mx(32)"
        )
    named, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    paths = [path_name(path) for path, _ in named]
    if callable(where):
        chosen = [where(path) for path in paths]
    elif not isinstance(where, str | list | tuple | set | frozenset):
        raise ConfigError(
            f"store_weights: where={brief(where)}; write a path pattern, a list of them, or a"
            " function of the path"
        )
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        for pattern in patterns:
            if not any(matches(pattern, path) for path in paths):
                raise ConfigError(
                    f"store_weights: {pattern!r} matches no weight; {nearest(pattern, paths)}"
                )
        chosen = [any(matches(pattern, path) for pattern in patterns) for path in paths]
    leaves = []
    for path, take, (_, p) in zip(paths, chosen, named, strict=True):
        dtype = getattr(p, "dtype", None)
        if take and (is_quantized(p) or dtype is None or not jnp.issubdtype(dtype, jnp.floating)):
            what = f"{dtype} numbers" if dtype is not None else brief(p)
            what = f"stored in {p.format.name}" if is_quantized(p) else what
            raise ConfigError(
                f"store_weights: {path} is {what}; choose floating-point arrays with where="
            )
        leaves.append(quantize(p, format, scaling, scale_rounding="up") if take else p)
    return jax.tree.unflatten(tree, leaves)


def compensation(p: Weight) -> Array:
    """Returns a low weight's first Kahan compensation: zeros in its dtype, bfloat16 for fp8."""
    return jnp.zeros(p.shape, jnp.bfloat16 if is_quantized(p) else p.dtype)


def rewrite(
    p: Quantized, full: Array, rounding: str = "nearest", key: Key | None = None
) -> Quantized:
    """Returns float32 numbers in the storage of p, rounded on integer bits.

    A group keeps its scale while its largest number lies between a quarter of what the scale can
    hold and all of it; so numbers that do not change keep their bits.
    """
    amax = amax_of(full, p.tile)
    top = p.scales * p.format.max
    keep = (amax == 0) | ((amax <= top) & (4 * amax >= top))
    scales = jnp.where(keep, p.scales, to_scale(amax, p.format, "up"))
    values = scaled_values(full, scales, p.format, p.tile, rounding, key)
    return dataclasses.replace(p, values=values.astype(p.values.dtype), scales=scales)
