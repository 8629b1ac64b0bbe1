"""Low-precision storage of an optimizer's moments; the update itself runs in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax.errors import ConfigError
from mpjax.precision import Moments

# Field names of optax's states: adam and lion call the mean mu, sgd trace, adafactor ema.
_FIRST = dict.fromkeys(("mu", "m", "trace", "momentum", "ema"), "first")
_SECOND = dict.fromkeys(("nu", "nu_max", "v", "v_row", "v_col", "sum_of_squares"), "second")
_MOMENTS = _FIRST | _SECOND


def _moment(path: tuple[Any, ...]) -> str | None:
    names = (getattr(key, "name", None) for key in path)
    # The state's field stands before those of a parameter tree of attributes.
    return next((_MOMENTS[name] for name in names if name in _MOMENTS), None)


def cast_moments(
    optimizer: optax.GradientTransformation, moments: Moments
) -> optax.GradientTransformation:
    """Returns an optimizer that stores its moments in other dtypes.

    Args:
      optimizer: any optax optimizer with moments (adam, lion, sgd with momentum, adafactor ...).
      moments: the storage dtypes; float32 for both returns the optimizer as it is.

    Raises:
      ConfigError: at init, when the optimizer keeps no moment of a kind that is to be low.

    Example:
      >>> tx = cast_moments(optax.adam(1e-3), Moments.parse("first=bf16"))
      >>> tx.init({"w": jnp.ones(2)})[0].mu["w"].dtype.name
      'bfloat16'
    """
    wanted = {"first": jnp.dtype(moments.first), "second": jnp.dtype(moments.second)}
    low = {kind for kind, dtype in wanted.items() if dtype != jnp.float32}
    if not low:
        return optimizer

    def cast(state: Any, store: bool) -> Any:
        def leaf(path: Any, x: Any) -> Any:
            kind = _moment(path)
            if kind is None or not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return x.astype(wanted[kind] if store else jnp.float32)

        return jax.tree_util.tree_map_with_path(leaf, state)

    def init(params: Any) -> Any:
        state = optimizer.init(params)
        found = {_moment(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
        if low - found:
            raise ConfigError(
                f"moments: {' and '.join(sorted(low - found))} moment is to be stored low, but"
                " this optimizer keeps none; set moments=f32 or choose another optimizer"
            )
        return cast(state, store=True)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, cast(state, store=False), params)
        return updates, cast(state, store=True)

    return optax.GradientTransformation(init, update)
