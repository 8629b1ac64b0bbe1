"""Magnitude pruning: masks that are optimizer state, their schedule, and how sparse weights are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from mpjax.errors import ConfigError, brief
from mpjax.formats import Quantized, is_quantized
from mpjax.optim.checks import as_transformation, check_whole, is_number
from mpjax.optim.fp8_weights import Weight
from mpjax.optim.per_layer.layer_view import each_layer
from mpjax.paths import leaves_with_names, path_name
from mpjax.precision import matches
from mpjax.precision.rule import nearest
from mpjax.typing import Array, ArrayLike, Grads, Params, PyTree, Tree

SCOPES = ("global", "layer")


class PruneState(NamedTuple):
    """State of `pruned`; every leaf is an array.

    Args:
      count: steps taken.
      masks: for each weight that is pruned, which of its numbers live; None for the others.
      inner: the optimizer's own state.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    masks: PyTree
    inner: PyTree


class Pruned(optax.GradientTransformationExtraArgs):
    """Marks what `pruned` returns: `wrap` refuses the update rules that it cannot go with."""


def named_weights(params: Params) -> dict[str, Weight]:
    """Returns path -> weight, a Quantized being one.

    Raises:
      ConfigError: a leaf that is no array.
    """
    leaves = leaves_with_names(params, is_quantized)
    for name, leaf in leaves:
        if not is_quantized(leaf) and getattr(leaf, "dtype", None) is None:
            raise ConfigError(f"prune: {name} is {brief(leaf)}, not an array; take jnp.asarray")
    return dict(leaves)


def in_float32(leaf: Weight) -> Array:
    """Returns a weight, dequantised if it is a Quantized, in float32."""
    return leaf.dequantize(jnp.float32) if isinstance(leaf, Quantized) else leaf.astype(jnp.float32)


def _stacked(name: str) -> bool:
    """Whether a weight has a leading axis of layers, as below `layers` in our models."""
    parts = name.split("/")
    return any(a == "layers" and not b.isdigit() for a, b in itertools.pairwise(parts))


def _chosen(params: Params, keep: Sequence[str]) -> dict[str, Weight]:
    """The weights that are pruned, by path: matrices and larger that no pattern keeps."""
    if isinstance(keep, str):
        raise ConfigError(f"prune: keep={keep!r} is one text; give a list of patterns")
    named = named_weights(params)
    parents = {name.rpartition("/")[0] for name in named} - {""}
    for pattern in keep:
        if not any(matches(pattern, name) for name in named):
            raise ConfigError(
                f"prune: keep={pattern} matches no weight; {nearest(pattern, [*parents, *named])}"
            )
    found = {
        name: leaf
        for name, leaf in named.items()
        if len(leaf.shape) - _stacked(name) >= 2 and not any(matches(p, name) for p in keep)
    }
    if not found:
        raise ConfigError(
            f"prune: no weight is left to prune, keep={' '.join(keep) or '(none)'} and matrices"
            " alone are pruned; keep fewer"
        )
    return found


def _check(sparsity: float, scope: str, name: str = "sparsity") -> None:
    if not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
        raise ConfigError(
            f"prune: {name}={sparsity!r} is no share of 0 up to, and without, 1; write 0.5 for half"
        )
    if scope not in SCOPES:
        raise ConfigError(f"prune: unknown scope {scope!r}; known: {' '.join(SCOPES)}")


def _smallest(magnitudes: Array, share: Array) -> Array:
    """Which numbers are the round(share n) smallest along the last axis; ties go in order."""
    count = jnp.floor(share * jnp.float32(magnitudes.shape[-1]) + jnp.float32(0.5))
    # Ranks and no threshold: weights stored in fp8 have few magnitudes, and most of them are tied.
    ranks = jnp.argsort(jnp.argsort(magnitudes, axis=-1, stable=True), axis=-1)
    return ranks < count.astype(jnp.int32)


def _living(magnitudes: Mapping[str, Array], share: Array, scope: str) -> dict[str, Array]:
    """Which numbers of each weight remain when a share of them is pruned."""
    if scope == "layer":
        living = {}
        for name, x in magnitudes.items():
            rows = x.reshape(x.shape[0] if _stacked(name) else 1, -1)
            living[name] = ~_smallest(rows, share).reshape(x.shape)
        return living
    flat = jnp.concatenate([x.reshape(-1) for x in magnitudes.values()])
    gone = _smallest(flat, share)
    ends = itertools.accumulate((math.prod(x.shape) for x in magnitudes.values()), initial=0)
    spans = itertools.starmap(slice, itertools.pairwise(ends))
    pairs = zip(magnitudes.items(), spans, strict=True)
    return {name: ~gone[span].reshape(x.shape) for (name, x), span in pairs}


def prune_weights(
    params: Tree, sparsity: float, *, scope: str = "global", keep: Sequence[str] = ()
) -> Tree:
    """Returns the weights with the smallest of them set to zero, each stored as it was.

    Args:
      params: weights; those stored in fp8 (Quantized) keep their scales.
      sparsity: share of the pruned weights' numbers that become zero, rounded to whole numbers.
      scope: `global`, one order of magnitude over all of them, or `layer`, that share of each
        matrix; a matrix of a stack of layers counts alone.
      keep: path patterns of weights that are not pruned. Vectors (norms, biases) never are.

    Raises:
      ConfigError: a share outside [0, 1), an unknown scope, a pattern that matches nothing.

    Example:
      >>> pruned = prune_weights({"w": jnp.array([[1.0, -3.0], [0.5, 2.0]])}, 0.5)
      >>> pruned["w"].tolist()
      [[0.0, -3.0], [0.0, 2.0]]

    References:
      Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks.
    """
    _check(sparsity, scope)
    magnitudes = {name: jnp.abs(in_float32(leaf)) for name, leaf in _chosen(params, keep).items()}
    living = _living(magnitudes, jnp.float32(sparsity), scope)

    def prune(path: KeyPath, leaf: Weight) -> Weight:
        mask = living.get(path_name(path))
        if mask is None:
            return leaf
        if isinstance(leaf, Quantized):
            if leaf.offsets is not None:
                raise ConfigError(
                    f"prune: {path_name(path)} has offsets, so no zero; prune before quantising"
                )
            return dataclasses.replace(leaf, values=_masked(leaf.values, mask))
        return _masked(leaf, mask)

    return jax.tree_util.tree_map_with_path(prune, params, is_leaf=is_quantized)


def _masked(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def pruned(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    sparsity: float,
    *,
    begin: int = 0,
    end: int = 0,
    every: int = 100,
    initial: float = 0.0,
    scope: str = "global",
    keep: Sequence[str] = (),
) -> optax.GradientTransformation:
    r"""Returns an optimizer that prunes the smallest weights while it trains.

    $w \leftarrow m\,(w + u)$ with masks $m$ that only ever lose numbers: every `every` steps from
    `begin` to `end` the smallest magnitudes are dropped, up to `cubic_sparsity`. A pruned weight
    gets no gradient and is exactly zero, in whatever format `wrap` stores it (which refuses
    `kahan`); a step that the gate skips moves no mask.

    Args:
      optimizer: a raw optax optimizer; `mpjax.optim.wrap` and `build` take what is returned.
      sparsity: the share at the end.
      begin: optimizer steps before the first pruning.
      end: optimizer steps before the last; equal to `begin` prunes once.
      every: steps between two prunings.
      initial: the share at the first pruning.
      scope: `global` or `layer`, see `prune_weights`.
      keep: path patterns of weights that are not pruned.

    Raises:
      ConfigError: values out of range; at init, a pattern that matches nothing.

    Example:
      >>> tx = pruned(optax.sgd(0.1), 0.5)
      >>> params = {"w": jnp.array([[1.0, -3.0], [0.5, 2.0]])}
      >>> updates, state = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
      >>> (params["w"] + updates["w"]).tolist()
      [[0.0, -3.0999999046325684], [0.0, 1.899999976158142]]

    References:
      Zhu & Gupta 2017, To prune, or not to prune.
    """
    _check(sparsity, scope)
    _check(initial, scope, "initial")
    optimizer = each_layer(as_transformation(optimizer))
    if initial > sparsity:
        raise ConfigError(
            f"prune: initial={initial} is above sparsity={sparsity}; masks only lose numbers, so"
            " begin with less"
        )
    for name, value, low in (("begin", begin, 0), ("end", end, begin), ("every", every, 1)):
        check_whole("prune", name, value, low)

    def init(params: Params) -> PruneState:
        chosen = _chosen(params, keep)

        def whole(path: KeyPath, p: Array) -> Array | None:
            return jnp.ones(p.shape, jnp.bool_) if path_name(path) in chosen else None

        masks = jax.tree_util.tree_map_with_path(whole, params)
        return PruneState(jnp.int32(0), masks, optimizer.init(params))

    def update(
        grads: Grads, state: PruneState, params: Params = None, **extra: object
    ) -> tuple[Grads, PruneState]:
        if params is None:
            raise ConfigError("prune: params are missing; call update(grads, state, params)")

        grads = jax.tree.map(lambda g, m: g if m is None else _masked(g, m), grads, state.masks)
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        new = jax.tree.map(lambda p, u: p + u, params, updates)

        def drop(masks: PyTree) -> PyTree:
            weights: dict[str, Any] = named_weights(new)  # no Quantized: the optimizer's view
            # Pruned numbers stay pruned: -1 is below every magnitude.
            magnitudes = {
                name: jnp.where(mask, jnp.abs(weights[name]), jnp.float32(-1))
                for name, mask in leaves_with_names(masks)
            }
            share = cubic_sparsity(state.count, sparsity, begin, end, initial)
            living = _living(magnitudes, share, scope)
            return jax.tree_util.tree_map_with_path(
                lambda path, m: living[path_name(path)] & m, masks
            )

        step = state.count
        due = (step >= begin) & (step <= end)
        due &= ((step - begin) % every == 0) | (step == end)
        masks = jax.lax.cond(due, drop, lambda masks: masks, state.masks)
        # Minus the weight itself is the update that leaves exactly zero.
        updates = jax.tree.map(
            lambda u, m, p: u if m is None else jnp.where(m, u, -p), updates, masks, params
        )
        return updates, PruneState(state.count + 1, masks, inner)

    return Pruned(init, update)


def cubic_sparsity(
    step: ArrayLike, final: int | float, begin: int, end: int, initial: int | float = 0.0
) -> Array:
    r"""Returns the sparsity at a step, $s_f + (s_i - s_f)\,(1 - (t - t_0) / (t_1 - t_0))^3$.

    Args:
      step: $t$.
      final: $s_f$, from $t_1$ on.
      begin: $t_0$, the first pruning.
      end: $t_1$, the last; equal to $t_0$ prunes once.
      initial: $s_i$, at $t_0$; before it nothing is pruned.

    Raises:
      ConfigError: no numbers, or an end before the beginning.

    Example:
      >>> [round(float(cubic_sparsity(t, 0.8, 100, 200)), 3) for t in (100, 150, 200, 999)]
      [0.0, 0.7, 0.8, 0.8]

    References:
      Zhu & Gupta 2017, To prune, or not to prune, equation 1.
    """
    if not all(map(is_number, (final, begin, end, initial))):
        raise ConfigError(
            f"prune: final={brief(final)}, begin={brief(begin)}, end={brief(end)},"
            f" initial={brief(initial)}; give numbers"
        )
    if not begin <= end:
        raise ConfigError(f"prune: end={end} lies before begin={begin}; give a later step")
    t = jnp.clip(jnp.asarray(step, jnp.float32), begin, end)
    rest = (jnp.float32(end) - t) / jnp.float32(max(end - begin, 1))
    return jnp.float32(final) + jnp.float32(initial - final) * rest**3


def sparsity_by_path(params: Params) -> dict[str, float]:
    """Returns the share of zeros of each weight, and of all of them under `total`.

    Args:
      params: arrays or Quantized leaves.

    Raises:
      ConfigError: no weights, or leaves that are none.

    Example:
      >>> sparsity_by_path({"a": jnp.array([0.0, 1.0]), "b": jnp.zeros(2)})
      {'a': 0.5, 'b': 1.0, 'total': 0.75}
    """
    counts = {
        name: (int(jnp.sum(in_float32(leaf) == 0)), math.prod(leaf.shape))
        for name, leaf in named_weights(params).items()
    }
    if not counts:
        raise ConfigError("prune: params hold no weight; give a tree of arrays")
    zeros, sizes = zip(*counts.values(), strict=True)
    shares = {name: zero / size for name, (zero, size) in counts.items()}
    return shares | {"total": sum(zeros) / sum(sizes)}
