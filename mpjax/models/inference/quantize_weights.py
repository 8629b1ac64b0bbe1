"""Weights quantised after training: the storage of each leaf, and its error.

A quantised leaf is a Quantized whose tiles are those of one layer; the layers of a stack are
quantised one by one, so a scan or a slice over the stack yields each layer's Quantized.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError
from mpjax.formats import Quantized, is_quantized, sqnr
from mpjax.models.core.checks import named_leaves
from mpjax.models.core.storage import Storage, stored_bytes
from mpjax.models.inference.gptq import store_weighed
from mpjax.paths import path_name
from mpjax.precision import matches
from mpjax.precision.rule import nearest
from mpjax.typing import Array, Params

KEEP = "keep"
# Left as they are unless a rule of the user matches: small, or part of every token's path.
KEPT = ("**/embed", "**/position", "**/token_type", "**/head", "**/norm*", "**/bias")


def _parse(text: str) -> tuple[str, Storage | None]:
    pattern, equals, value = text.partition("=")
    if not pattern or not equals or not value:
        raise ConfigError(
            f"weights: rule {text!r} is malformed; write PATTERN=STORAGE, such as **/down=int8 or"
            f" **/embed=int8, or PATTERN={KEEP}"
        )
    return pattern, None if value == KEEP else Storage.parse(value, f"weights: rule {text!r}")


@functools.partial(jax.jit, static_argnames=("storage", "axis", "stacked"))
def _store(
    leaf: Array, storage: Storage, axis: int | tuple[int, ...], stacked: bool
) -> Array | Quantized:
    store = functools.partial(storage.store, axis=axis)
    return (jax.vmap(store) if stacked else store)(leaf)


@functools.partial(jax.jit, static_argnames=("storage", "stacked"))
def _store_weighed(leaf: Array, moments: Array, storage: Storage, stacked: bool) -> Quantized:
    if not stacked:
        return store_weighed(leaf, moments, storage)
    # A loop, not vmap: each layer needs the inverse of its moment in memory.
    return jax.lax.map(lambda one: store_weighed(one[0], one[1], storage), (leaf, moments))


def _check_moment(path: str, leaf: Array, moment: Array, stacked: bool) -> None:
    if leaf.ndim - stacked != 2:
        raise ConfigError(
            f"weights: {path} has moments and its shape {leaf.shape} is no matrix's; leave them out"
        )
    inputs = leaf.shape[-2]
    expected = (*leaf.shape[:stacked], inputs, inputs)
    if moment.shape != expected:
        raise ConfigError(
            f"weights: the moments of {path} are {moment.shape} where its shape {leaf.shape} needs"
            f" {expected}; make them with input_moments of this model"
        )
    if not bool(jnp.isfinite(moment).all()):
        raise ConfigError(
            f"weights: the moments of {path} are not finite; make them anew with input_moments"
        )


def _unused(rule: str, paths: Sequence[str]) -> ConfigError:
    pattern = rule.partition("=")[0]
    if hit := [path for path in paths if matches(pattern, path)]:
        why = (
            f"decides no matrix: what it matches, such as {hit[0]}, is a vector without rows to"
            " scale, or a rule before it takes it; write a dtype, move it up or drop it"
        )
    else:
        modules = {path.rpartition("/")[0] for path in paths}
        near = nearest(pattern, [*paths, *modules, *(m.rpartition("/")[0] for m in modules)])
        why = f"matches no weight; {near}"
    return ConfigError(f"weights: rule {rule!r}: {why}")


def has_scales(storage: str | Storage, rules: Sequence[str] = ()) -> bool:
    """Whether `quantize_weights` would round some weights to a grid with scales.

    Example:
      >>> has_scales("bf16"), has_scales("bf16", ["**/mlp=int4@32"])
      (False, True)
    """
    chosen = [Storage.parse(storage, "weights"), *(_parse(rule)[1] for rule in rules)]
    return any(one is not None and one.scaling is not None for one in chosen)


def quantize_weights(
    params: Params, storage: str | Storage = "int8", *, rules: Sequence[str] = (),
    moments: Mapping[str, Array] | None = None,
) -> Params:  # fmt: skip
    r"""Returns weights stored in fewer bits, for inference: $w \approx s\,v$, v in the Format.

    Kernels are quantised along the axis that their product sums over: `int8` has one scale for
    each output channel, `int4@32` one for each 32 inputs of each, `int4@32+offset` an offset too:
    $w \approx s\,v + m$. A model reads them as they are and dequantises one layer at a time. Under
    a Precision whose products have the `int8` recipe (`get_precision("int8")`), int8 rows run as
    int8 x int8 -> int32, with the scales of the activations taken from each token.

    Args:
      params: a model's weights, float32, bfloat16 or float16.
      storage: of all that no rule names: a dtype (all leaves), or `FORMAT@SCALING`, integers with
        `+offset` too (matrices, without embeddings, norms and the head; vectors never).
      rules: `PATTERN=STORAGE` or `PATTERN=keep` in order, the first match wins; patterns as in a
        Precision, of paths without layer index, such as `decoder/layers/mlp/down/kernel`.
      moments: of the inputs of kernels, from `input_moments`: these are then rounded so that their
        products change least (GPTQ), with scales that may clip; others to nearest.

    Returns:
      The same tree with Quantized leaves.

    Raises:
      ConfigError: an unknown storage, a rule that decides no weight, weights that are quantised
        already, or moments of another model.

    Example:
      >>> params = {"layers": {"up": {"kernel": jnp.ones((2, 64, 4))}}, "norm": jnp.ones(4)}
      >>> small = quantize_weights(params, "int4@32")
      >>> small["layers"]["up"]["kernel"].values.dtype.name, stored_bytes(small)
      ('int4', 336)

    References:
      Dettmers et al. 2022, LLM.int8(), section 2.1 (row-wise); Frantar et al. 2023, GPTQ, section
      3 (with moments) and 4 (round to nearest, groups).
    """
    storage = Storage.parse(storage, "weights")
    found = [_parse(rule) for rule in rules]
    named, tree = named_leaves(params), jax.tree.structure(params, is_leaf=is_quantized)
    moments = {} if moments is None else moments
    if not isinstance(moments, Mapping):
        raise ConfigError(
            f"weights: moments are a dict of path -> moment from input_moments, not"
            f" {type(moments).__name__}"
        )
    used, weighed, leaves = set[int](), False, list[Array | Quantized]()
    for path, leaf in named.items():
        if isinstance(leaf, Quantized):
            raise ConfigError(
                f"weights: {path} is stored in {leaf.format.name} already; quantise the weights as"
                " they were trained"
            )
        stacked = "layers" in path.split("/")
        ndim = leaf.ndim - stacked
        number = next((i for i, (p, _) in enumerate(found) if matches(p, path)), -1)
        excluded = storage.scaling is not None and any(matches(p, path) for p in KEPT)
        chosen = found[number][1] if number >= 0 else None if excluded else storage
        vector = chosen is not None and chosen.scaling is not None and ndim < 2
        if not vector:  # a vector has no rows to scale
            used.add(number)
        if chosen is None or vector or not jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves.append(leaf)
        elif chosen.scaling is not None and path in moments:
            moment, weighed = jnp.asarray(moments[path]), True
            _check_moment(path, leaf, moment, stacked)
            leaves.append(_store_weighed(leaf, moment, chosen, stacked))
        else:  # the axes that the product sums over: of a table's rows, or all but the last
            axis = -1 if path.endswith("/table") else tuple(range(ndim - 1))
            leaves.append(_store(leaf, chosen, axis, stacked))
    if moments and not weighed and any(is_quantized(leaf) for leaf in leaves):
        raise ConfigError(
            f"weights: no weight is called as the moments are, such as {next(iter(moments))}; make"
            " them with input_moments of this model"
        )
    for number, rule in enumerate(rules):
        if number not in used:
            raise _unused(rule, list(named))
    return jax.tree.unflatten(tree, leaves)


class Stored(NamedTuple):
    """The storage of one weight.

    Args:
      path: of the weight.
      storage: `int8@row`, `float32`, ...
      bytes: that it takes, scales included.
      sqnr: in dB against the original weight; inf if they are equal.
    """

    path: str
    storage: str
    bytes: int
    sqnr: float


def weight_report(before: Params, after: Params) -> list[Stored]:
    """Returns the storage and the error of each weight.

    Args:
      before: the weights.
      after: what `quantize_weights` made of them.

    Example:
      >>> params = {"up": {"kernel": jnp.ones((64, 4))}}
      >>> weight_report(params, quantize_weights(params, "bf16"))[0]
      Stored(path='up/kernel', storage='bfloat16', bytes=512, sqnr=inf)
    """

    def row(path: jax.tree_util.KeyPath, new: Array | Quantized, old: Array) -> Stored:
        text = np.dtype(new.dtype).name
        if isinstance(new, Quantized):
            offset = "" if new.offsets is None else "+offset"
            text = f"{new.format.name}@{'x'.join(map(str, new.tile))}{offset}"
        return Stored(path_name(path), text, stored_bytes(new), float(jax.jit(sqnr)(old, new)))

    # Both trees together: a weight of one that is not in the other raises.
    rows = jax.tree_util.tree_map_with_path(row, after, before, is_leaf=is_quantized)
    return jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, Stored))
