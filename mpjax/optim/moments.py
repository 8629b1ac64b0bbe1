"""Low-precision storage of an optimizer's moments; the update itself runs in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax.errors import ConfigError
from mpjax.optim.blockwise import Blockwise, quantize_blocks
from mpjax.optim.given import as_transformation
from mpjax.precision import Moments, matches
from mpjax.precision.moments import MomentFormat
from mpjax.precision.rule import near_misses

# Field names of optax's states: adam and lion call the mean mu, sgd trace, adafactor ema.
_FIRST = dict.fromkeys(("mu", "m", "m1", "m2", "trace", "momentum", "ema", "exp_avg"), "first")
_SECOND = dict.fromkeys(
    ("nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares", "exp_avg_sq"), "second"
)
_MOMENTS = _FIRST | _SECOND
# States in which such a name means another thing.
_UNLIKE: dict[str, dict[str, str]] = {
    "ScaleByAdanState": {"m": "first", "v": "first", "n": "second"},  # v: gradients' differences
    "ScaleBySM3State": {"mu": "second", "nu": "first"},
    "ScaleBySimplifiedAdEMAMixState": {"m": "first", "n": "second"},
    "MechanicState": {},  # its own learning rates
}
# States of optax whose running square is never negative; in others its sign is stored too.
_SQUARES = frozenset(
    {
        *("ScaleByAdamState", "ScaleByAmsgradState", "ScaleByBeliefState", "ScaleByNovogradState"),
        *("ScaleByRmsState", "ScaleByRmsWithCountState", "ScaleByRStdDevState", "FactoredState"),
        *("ScaleByRssState", "ScaleByAdanState", "ScaleBySM3State", "ScaleByAdemamixState"),
        *("ScaleBySimplifiedAdEMAMixState", "ProdigyState", "MomoAdamState", "DAdaptAdamWState"),
    }
)


class _Moment(NamedTuple):
    """Which moment a leaf of a state belongs to, its weight's path, and whether it has a sign."""

    kind: str | None = None
    where: str = ""
    signed: bool = True


def _moment(state: Any, path: tuple[Any, ...], own: frozenset[type]) -> _Moment:
    """What a leaf of a state is.

    Args:
      state: the optimizer's.
      path: of the leaf.
      own: types of which the weights' tree is made: attributes of these are the user's names, as
        in a copy of the weights or of gradients that the state holds.
    """
    for place, key in enumerate(path):
        if type(state) in own:
            break
        name, owner = str(getattr(key, "name", "")), type(state).__name__
        kind = _UNLIKE.get(owner, _MOMENTS).get(name)
        if kind is not None:
            where = jax.tree_util.keystr(path[place + 1 :], simple=True, separator="/")
            return _Moment(kind, where, kind == "first" or owner not in _SQUARES)
        state = _child(state, key)
    return _Moment()


def _own(params: Any) -> frozenset[type]:
    """Types of the nodes with attributes of which a tree is made."""
    found = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        node = params
        for key in path:
            if isinstance(key, jax.tree_util.GetAttrKey):
                found.add(type(node))
            node = _child(node, key)
    return frozenset(found)


def _child(state: Any, key: Any) -> Any:
    """What a key of a path leads to; None where only the node knows."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(state, key.name, None)
    if isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
        index = key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key
        return None if state is None else state[index]
    return None


def quantize_moments(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    first: str | MomentFormat = "f32",
    second: str | MomentFormat = "f32",
    keep: Sequence[str] = (),
    min_size: int = 0,
) -> optax.GradientTransformation:
    r"""Returns an optimizer that stores its moments in other formats.

    Each step makes them float32, runs the optimizer, and stores them again:
    $m = \hat b_{code}\,\max_{block}|m|$ for formats with blocks.

    Args:
      optimizer: any optax optimizer with moments (adam, lion, sgd with momentum, adafactor ...).
      first: of the gradient's running mean; a dtype, or `int8@256 int4@128 e4m3@256 ...`, see
        `mpjax.precision.Moments`.
      second: of its running square; where optax's state says that it is never negative, no code
        is spent on a sign.
      keep: path patterns of weights whose moments stay float32, such as `**/embed`.
      min_size: moments of fewer numbers stay float32.

    Returns:
      The optimizer; one whose moments are all float32 is returned as it is. Low moments of its
      state are arrays, or `Blockwise` nodes of arrays in their place.

    Raises:
      ConfigError: no optimizer, or settings that cannot be read; at init, when the optimizer keeps
        no moment of a kind that is to be low, or a pattern of `keep` matches no weight.

    Example:
      >>> tx = quantize_moments(optax.adam(1e-3), first="int8@256", second="bf16")
      >>> state = tx.init({"w": jnp.ones(2)})
      >>> state[0].mu["w"].codes.dtype.name, state[0].nu["w"].dtype.name
      ('uint8', 'bfloat16')

    References:
      Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization.
      Li et al. 2023, Memory Efficient Optimizers with 4-bit States.
    """
    optimizer = as_transformation(optimizer)
    moments = Moments(first, second, keep, min_size)  # type: ignore[arg-type]
    formats = {"first": moments.first, "second": moments.second}
    low = {kind for kind, format in formats.items() if format.dtype != jnp.float32}
    if not low:
        return optimizer

    def is_low(moment: _Moment, x: Any) -> bool:
        if moment.kind not in low or not jnp.issubdtype(x.dtype, jnp.floating):
            return False
        kept = any(matches(pattern, moment.where) for pattern in moments.keep)
        return not kept and x.size >= max(1, moments.min_size)

    def store(state: Any, own: frozenset[type]) -> Any:
        def leaf(path: Any, x: Any) -> Any:
            moment = _moment(state, path, own)
            if moment.kind is None or not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            format = formats[moment.kind] if is_low(moment, x) else MomentFormat()
            if format.dtype is not None:
                return x.astype(format.dtype)
            return quantize_blocks(x, format, signed=moment.signed)

        return jax.tree_util.tree_map_with_path(leaf, state)

    def load(state: Any, own: frozenset[type]) -> Any:
        def leaf(path: Any, x: Any) -> Any:
            if isinstance(x, Blockwise):
                return x.dequantize()
            is_moment = _moment(state, path, own).kind and jnp.issubdtype(x.dtype, jnp.floating)
            return x.astype(jnp.float32) if is_moment else x

        return jax.tree_util.tree_map_with_path(
            leaf, state, is_leaf=lambda x: isinstance(x, Blockwise)
        )

    def check(state: Any, own: frozenset[type]) -> None:
        named = jax.tree_util.tree_leaves_with_path(state)
        leaves = [(_moment(state, path, own), x) for path, x in named]
        missing = low - {moment.kind for moment, _ in leaves}
        if missing:
            rest = sorted(low - missing)
            cure = f"write moments={rest[0]}={formats[rest[0]]}" if rest else "set moments=f32"
            raise ConfigError(
                f"moments: {' and '.join(sorted(missing))} moment is to be stored low, but"
                f" this optimizer keeps none; {cure} or choose another optimizer"
            )
        paths = sorted({moment.where for moment, _ in leaves if moment.kind in low})
        for pattern in moments.keep:
            if not any(matches(pattern, path) for path in paths):
                parents = {path.rpartition("/")[0] for path in paths} - {""}
                raise ConfigError(
                    f"moments: keep={pattern} matches no weight of the optimizer state; near"
                    f" misses: {' '.join(near_misses(pattern, [*parents, *paths]))}"
                )
        if not any(is_low(*leaf) for leaf in leaves):
            raise ConfigError(
                f"moments: {moments} stores no moment low, because keep= and min= exclude all;"
                " exclude fewer or set moments=f32"
            )

    def init(params: Any) -> Any:
        # XLA would fold the codes of constant zeros, which takes it a second for 100 000 numbers.
        state, own = jax.lax.optimization_barrier(optimizer.init(params)), _own(params)
        check(state, own)
        return store(state, own)

    inner = optax.with_extra_args_support(optimizer)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        own = _own(grads)
        updates, state = inner.update(grads, load(state, own), params, **extra)
        return updates, store(state, own)

    return optax.GradientTransformationExtraArgs(init, update)
