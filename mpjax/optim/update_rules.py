"""Update rules: how a weight that is stored low takes its float32 update, or a float32 delta."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats import Format, Quantized, is_quantized, round_to
from mpjax.optim.checks import check_like, check_seed, check_weights
from mpjax.optim.fp8_weights import Weight, compensation, rewrite
from mpjax.optim.gate import bits, choose
from mpjax.optim.loss_scale.scaled import check_plain
from mpjax.paths import key_at
from mpjax.precision import dtype_name
from mpjax.typing import Array, ArrayLike, Grads, Key, Params, PyTree, Tree

UpdateState: TypeAlias = dict[str, PyTree]  # name -> arrays, of the structure of the weights or not

# update rule -> what its state holds
_STATE: dict[str, set[str]] = {
    "none": set(),
    "nearest": set(),
    "master": {"master"},
    "stochastic": {"draws", "key"},
    "kahan": {"kahan"},
}
PRNG = "threefry2x32"  # its bits do not depend on how an array is cut over devices


def is_low(leaf: Weight) -> bool:
    """Returns whether a weight is stored in less than 32 bits: a low array or a Quantized."""
    if isinstance(leaf, Quantized):
        return True
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating)) and leaf.dtype.itemsize < 4


def map_weights(fn: Callable[..., object], params: Params, *rest: PyTree) -> PyTree:
    """Returns fn of each weight and the values at its path in `rest`; a Quantized is one weight."""
    return jax.tree.map(fn, params, *rest, is_leaf=is_quantized)


def init_update_state(params: Params, update: str, seed: ArrayLike = 0) -> UpdateState:
    """Returns the state of an update rule.

    Args:
      params: the weights as stored.
      update: `none` and `nearest` have no state; `master` has `{"master": float32 copies}`,
        `kahan` has `{"kahan": compensations}`, None for float32 leaves; `stochastic` has
        `{"draws": steps that drew, "key": raw key data}`.
      seed: of the random bits of `stochastic`.

    Raises:
      ConfigError: low weights without an update rule, one that rounds with float32 weights only,
        leaves that are no floating-point arrays, or a seed that is no whole number.
    """
    check_weights(params)
    check_seed(seed)
    low = [p for p in jax.tree.leaves(params, is_leaf=is_quantized) if is_low(p)]
    for p in filter(is_quantized, low):
        if p.offsets is not None or p.tensor_scale is not None or p.is_stack:
            raise ConfigError(
                f"update: a weight stored in {p.format.name} has offsets, scales of two levels or"
                " was quantised under vmap, which no update rule rewrites; store it with tensor,"
                " row, block or mx scaling"
            )
    if low and update == "none":
        name = low[0].format.name if is_quantized(low[0]) else dtype_name(low[0].dtype)
        raise ConfigError(
            f"update: weights are stored in {name}, which needs an update"
            " rule; set update=master (float32 copy) or update=nearest, stochastic or kahan"
        )
    if update not in ("none", "master") and not low:
        raise ConfigError(
            f"update: {update!r} needs weights stored low, all are float32 and are their own"
            " master; store them in p=bf16 or set update=none"
        )
    if update == "master":
        return {"master": map_weights(lambda p: _wide(p) if is_low(p) else None, params)}
    if update == "kahan":
        return {"kahan": map_weights(lambda p: compensation(p) if is_low(p) else None, params)}
    if update == "stochastic":
        key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), zlib.crc32(b"update"))
        return {"draws": jnp.int32(0), "key": jax.random.key_data(key)}
    return {}


def _wide(p: Weight) -> Array:
    """A weight in float32."""
    if isinstance(p, Quantized):
        return p.dequantize(jnp.float32)
    return p.astype(jnp.float32) if is_low(p) else p


def float32_view(params: Params, update_state: UpdateState) -> Params:
    """Returns the float32 weights that the optimizer sees: the master copy where there is one."""
    if "master" not in update_state:
        return map_weights(_wide, params)
    return map_weights(lambda p, m: _wide(p) if m is None else m, params, update_state["master"])


def _write(p: Weight, full: Array, rounding: str = "nearest", key: Key | None = None) -> Weight:
    """A float32 value in the storage of weight p, rounded on integer bits."""
    if isinstance(p, Quantized):
        return rewrite(p, full, rounding, key)
    if not is_low(p):
        return full
    rounded = round_to(full, Format(p.dtype.name), rounding, key, saturate=False)
    return rounded.astype(p.dtype)  # exact: it is one of that dtype's numbers


def _kahan(p: Weight, w: Array, u: Array, c: Array | None) -> tuple[Weight, Array | None]:
    """y = u - c; s = low(w + y); c = low(low(s - w) - y)."""
    if c is None:
        return w + u, None
    low = Format(c.dtype.name)
    y = u - c.astype(jnp.float32)
    s = _write(p, w + y)
    gained = round_to(_wide(s) - w, low, saturate=False)
    return s, round_to(gained - y, low, saturate=False).astype(c.dtype)


def apply_update_rule(
    updates: Grads, full: Params, params: Params, update_state: UpdateState, update: str
) -> tuple[Params, UpdateState]:
    r"""Returns the weights after their updates, as stored, and the update rule's state.

    `nearest` and `master` store $\mathrm{low}(w + u)$, the latter with a float32 $w$;
    `stochastic` rounds $w + u$ up or down at random so that its mean is $w + u$; `kahan` carries
    what rounding lost: $y = u - c,\ s = \mathrm{low}(w + y),\ c = \mathrm{low}(\mathrm{low}(s - w)
    - y)$.

    Args:
      updates: float32.
      full: the weights from `float32_view`.
      params: the weights as stored.
      update_state: the update rule's state.
      update: the update rule.

    Raises:
      ConfigError: the state is that of another update rule.

    References:
      Gupta et al. 2015, Deep Learning with Limited Numerical Precision, section 3; Zamirai et al.
      2020, Revisiting BFloat16 Training, algorithms 2 and 3.
    """
    if set(update_state) != _STATE[update]:
        held = next(rule for rule, names in _STATE.items() if names == set(update_state))
        raise ConfigError(
            f"update: the optimizer state is one of update={held}, the optimizer has"
            f" update={update}; make the state with this optimizer's init"
        )
    if update == "kahan":
        pairs = map_weights(_kahan, params, full, updates, update_state["kahan"])
        stored = map_weights(lambda _, pair: pair[0], params, pairs)
        return stored, {"kahan": map_weights(lambda _, pair: pair[1], params, pairs)}
    new = jax.tree.map(lambda w, u: w + u, full, updates)
    if update == "stochastic":
        key = jax.random.wrap_key_data(update_state["key"], impl=PRNG)
        key = jax.random.fold_in(key, update_state["draws"])

        def draw(path: jax.tree_util.KeyPath, p: Weight, f: Array) -> Weight:
            return _write(p, f, "stochastic", key_at(key, path))

        stored = jax.tree_util.tree_map_with_path(draw, params, new, is_leaf=is_quantized)
        return stored, update_state | {"draws": update_state["draws"] + 1}
    stored = map_weights(
        lambda p, f: rewrite(p, f) if is_quantized(p) else f.astype(p.dtype), params, new
    )
    if update == "master":
        return stored, {"master": map_weights(lambda p, f: f if is_low(p) else None, params, new)}
    return stored, update_state


def delta(new: Array, old: Array, update: Array) -> Array:
    """Returns the float32 delta from a low weight to its new value; of others, the update."""
    if not is_low(old):
        return update
    difference = new.astype(jnp.float32) - old.astype(jnp.float32)
    return jnp.where(bits(new) == bits(old), jnp.float32(-0.0), difference)


def _add(old: Array, update: Array) -> Array:
    if is_low(old):
        new = (old.astype(jnp.float32) + update).astype(old.dtype)
    else:
        new = old + update
    return choose((update == 0) & jnp.signbit(update), old, new)


def apply_updates(params: Tree, updates: Grads) -> Tree:
    """Returns params + float32 deltas, each in the weight's storage dtype.

    A delta of -0.0 leaves every bit of its weight alone.

    Example:
      >>> apply_updates(jnp.ones(1, jnp.bfloat16), jnp.full(1, 0.25)).dtype.name
      'bfloat16'

    Raises:
      ConfigError: updates of another structure or shape, or scaled gradients.
    """
    check_plain("updates", updates)
    check_like("updates", updates, params)
    return jax.tree.map(_add, params, updates)
