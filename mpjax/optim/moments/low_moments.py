"""Low-precision storage of an optimizer's moments; the update itself runs in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from jaxtyping import Array, Int

from mpjax.errors import ConfigError, explains_calls
from mpjax.optim.checks import as_transformation
from mpjax.optim.moments.blockwise import Blockwise, stored
from mpjax.optim.moments.dither import dither_key
from mpjax.paths import child_at, key_at, path_name
from mpjax.precision import Moments, matches
from mpjax.precision.moments import MomentFormat
from mpjax.precision.rule import nearest
from mpjax.typing import Grads, Key, Params, PyTree

# Field names of optax's states: adam and lion call the mean mu, sgd trace, adafactor ema.
_FIRST = dict.fromkeys(("mu", "m", "m1", "m2", "trace", "momentum", "ema", "exp_avg"), "first")
_SECOND = dict.fromkeys(
    ("nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares", "exp_avg_sq"), "second"
)
_MOMENTS = _FIRST | _SECOND
# States in which these names mean something else.
_UNLIKE: dict[str, dict[str, str]] = {
    "ScaleByAdanState": {"m": "first", "v": "first", "n": "second"},  # v: gradients' differences
    "ScaleBySM3State": {"mu": "second", "nu": "first"},
    "ScaleBySimplifiedAdEMAMixState": {"m": "first", "n": "second"},
    "MechanicState": {},  # its own learning rates
}
# States whose formula subtracts the square of mu from nu: the difference is stored in place of nu,
# because two roundings could make it negative.
_CENTERED = (optax.ScaleByRStdDevState,)
# States of optax whose running square is never negative; in others its sign is stored too.
_SQUARES = frozenset(
    {
        *("ScaleByAdamState", "ScaleByAmsgradState", "ScaleByBeliefState", "ScaleByNovogradState"),
        *("ScaleByRmsState", "ScaleByRmsWithCountState", "ScaleByRStdDevState", "FactoredState"),
        *("ScaleByRssState", "ScaleByAdanState", "ScaleBySM3State", "ScaleByAdemamixState"),
        *("ScaleBySimplifiedAdEMAMixState", "ProdigyState", "MomoAdamState", "DAdaptAdamWState"),
    }
)


class MomentState(NamedTuple):
    """State of an optimizer whose moments are stored low.

    Args:
      inner: the optimizer's own state; low moments are arrays, or `Blockwise` nodes of arrays. In
        that of a centered optimizer `nu` is the variance, the square of `mu` taken off.
      draws: steps that were rounded stochastically.
    """

    inner: PyTree
    draws: Int[Array, ""]


class Moment(NamedTuple):
    """Which moment a leaf of a state belongs to, its weight's path, and whether it has a sign."""

    kind: str | None = None
    where: str = ""
    signed: bool = True


def moment_of(state: PyTree, path: KeyPath, own: frozenset[type]) -> Moment:
    """Returns what a leaf of a state is.

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
            where = path_name(path[place + 1 :])
            return Moment(kind, where, kind == "first" or owner not in _SQUARES)
        state = child_at(state, key)
    return Moment()


def types_of(params: PyTree) -> frozenset[type]:
    """Returns the types of the nodes with attributes of which a tree is made."""
    found = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        node = params
        for key in path:
            if isinstance(key, jax.tree_util.GetAttrKey):
                found.add(type(node))
            node = child_at(node, key)
    return frozenset(found)


@explains_calls
def quantize_moments(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    first: str | MomentFormat = "f32",
    second: str | MomentFormat = "f32",
    keep: Sequence[str] = (),
    min_size: int = 0,
    rounding: str = "stochastic",
) -> optax.GradientTransformation:
    r"""Returns an optimizer that stores its moments in other formats.

    Each step makes them float32, runs the optimizer, and stores them again:
    $m = \hat b_{code}\,\max_{block}|m|$ for formats with blocks. They are rounded up or down at
    random, so that the mean is $m$: a step moves a moment by a share $1 - \beta$ of it, and
    rounding to nearest loses all of that where it is less than half the distance of two numbers
    (with $\beta = 0.999$ a second moment in bf16, int8 or fp8 can no longer fall). The random bits
    depend on the step and on the moment's path alone. A second moment above zero stays above zero.

    Args:
      optimizer: any optax optimizer with moments (adam, lion, sgd with momentum, adafactor ...).
      first: of the gradient's running mean; a dtype, or `int8@256 int4@128 e4m3@256 ...`, see
        `mpjax.precision.Moments`.
      second: of its running square; where optax's state says that it is never negative, no code
        is spent on a sign.
      keep: path patterns of weights whose moments stay float32, such as `**/embed`.
      min_size: moments of fewer numbers stay float32.
      rounding: `stochastic` or `nearest`.

    Returns:
      The optimizer, whose state is a `MomentState`; one whose moments are all float32 is returned
      as it is.

    Raises:
      ConfigError: no optimizer, or settings that cannot be read; at init, when the optimizer keeps
        no moment of a kind that is to be low, or a pattern of `keep` matches no weight.

    Example:
      >>> tx = quantize_moments(optax.adam(1e-3), first="int8@256", second="bf16")
      >>> state = tx.init({"w": jnp.ones(2)}).inner
      >>> state[0].mu["w"].codes.dtype.name, state[0].nu["w"].dtype.name
      ('uint8', 'bfloat16')

    References:
      Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization.
      Li et al. 2023, Memory Efficient Optimizers with 4-bit States.
      Gupta et al. 2015, Deep Learning with Limited Numerical Precision, section 3 (stochastic).
    """
    moments = Moments(first, second, keep, min_size, rounding)  # type: ignore[arg-type]
    return low_moments(optimizer, moments)


def low_moments(
    optimizer: optax.GradientTransformation, moments: Moments
) -> optax.GradientTransformation:
    """Returns `quantize_moments` of settings that have been read."""
    optimizer = as_transformation(optimizer)
    formats = {"first": moments.first, "second": moments.second}
    low = {kind for kind, format in formats.items() if format.dtype != jnp.float32}
    if not low:
        return optimizer

    def is_low(moment: Moment, x: Array) -> bool:
        if moment.kind not in low or not jnp.issubdtype(x.dtype, jnp.floating):
            return False
        excluded = any(matches(pattern, moment.where) for pattern in moments.keep)
        return not excluded and x.size >= max(1, moments.min_size)

    def store(state: PyTree, own: frozenset[type], key: Key | None = None) -> PyTree:
        def leaf(path: KeyPath, x: Array) -> Array | Blockwise:
            moment = moment_of(state, path, own)
            if moment.kind is None or not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            format = formats[moment.kind] if is_low(moment, x) else MomentFormat()
            return stored(x, format, moment.signed, None if key is None else key_at(key, path))

        return jax.tree_util.tree_map_with_path(leaf, centered(state))

    def check(state: PyTree, own: frozenset[type]) -> None:
        named = jax.tree_util.tree_leaves_with_path(state)
        leaves = [(moment_of(state, path, own), x) for path, x in named]
        missing = low - {moment.kind for moment, _ in leaves}
        if missing:
            rest = sorted(low - missing)
            cure = f"write moments={rest[0]}={formats[rest[0]]}" if rest else "set moments=f32"
            raise ConfigError(
                f"moments: {' and '.join(sorted(missing))} moment is to be stored low, but"
                f" this optimizer keeps none; {cure} or choose another optimizer"
            )
        if any(map(_is_debiased, jax.tree.leaves(state, is_leaf=_is_debiased))):
            raise ConfigError(
                "moments: rmsprop(centered=True, bias_correction=True) takes one moment from the"
                " square of another after its bias correction, which low moments make negative;"
                " set moments=f32 or bias_correction=False"
            )
        paths = sorted({moment.where for moment, _ in leaves if moment.kind in low})
        for pattern in moments.keep if moments.user else ():
            if not any(matches(pattern, path) for path in paths):
                parents = {path.rpartition("/")[0] for path in paths} - {""}
                raise ConfigError(
                    f"moments: keep={pattern} matches no weight of the optimizer state;"
                    f" {nearest(pattern, [*parents, *paths])}"
                )
        if not any(is_low(*leaf) for leaf in leaves):
            raise ConfigError(
                f"moments: {moments} stores no moment low, because keep= and min= exclude all;"
                " exclude fewer or set moments=f32"
            )

    def init(params: Params) -> MomentState:
        # XLA would fold the codes of constant zeros, which takes it a second for 100 000 numbers.
        state, own = jax.lax.optimization_barrier(optimizer.init(params)), types_of(params)
        check(state, own)
        return MomentState(store(state, own), jnp.int32(0))

    inner = optax.with_extra_args_support(optimizer)

    def update(
        grads: Grads, state: MomentState, params: Params = None, **extra: object
    ) -> tuple[Grads, MomentState]:
        own = types_of(grads)
        updates, new = inner.update(grads, widen(state, own), params, **extra)
        if moments.rounding == "nearest":
            return updates, MomentState(store(new, own), state.draws)
        key = dither_key("moments", state.draws)
        return updates, MomentState(store(new, own, key), state.draws + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def centered(state: PyTree) -> PyTree:
    """Returns a float32 state with variances in place of the squares that mu is taken from."""
    return at_variances(lambda m, n: jnp.maximum(n - m * m, 0), state)


def at_variances(function: Callable[[Array, Array], Array], state: PyTree) -> PyTree:
    """Returns a state with function(mu, nu) for the nu of a centered optimizer."""

    def node(x: PyTree) -> PyTree:
        if not isinstance(x, _CENTERED):
            return x
        return x._replace(nu=jax.tree.map(function, x.mu, x.nu))

    return jax.tree.map(node, state, is_leaf=lambda x: isinstance(x, _CENTERED))


def is_variance(state: PyTree, path: KeyPath) -> bool:
    """Returns whether a leaf of a state is the nu of a centered optimizer."""
    for key in path:
        if isinstance(state, _CENTERED):
            return getattr(key, "name", None) == "nu"
        state = child_at(state, key)
    return False


def _is_debiased(x: object) -> bool:
    return type(x).__name__ == "ScaleByRStdDevWithCountState"  # optax does not export it


def widen(state: MomentState, own: frozenset[type]) -> PyTree:
    """Returns the optimizer's own state with float32 moments.

    Args:
      state: with low moments.
      own: types of which the weights' tree is made.
    """

    def leaf(path: KeyPath, x: Array | Blockwise) -> Array:
        if isinstance(x, Blockwise):
            return x.dequantize()
        is_moment = moment_of(state.inner, path, own).kind and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.float32) if is_moment else x

    wide = jax.tree_util.tree_map_with_path(
        leaf, state.inner, is_leaf=lambda x: isinstance(x, Blockwise)
    )
    return at_variances(lambda m, s: s + m * m, wide)
