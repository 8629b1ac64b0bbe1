"""Loss scales: no-op, static and dynamic, each a pytree that survives jit, donation and orbax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey
from jaxtyping import Array, Bool, Float, Int

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.optim.loss_scale.scaled import bare
from mpjax.precision import LossScaleSettings
from mpjax.typing import ArrayLike, Grads, Metrics, PyTree, Tree

Class = TypeVar("Class", bound=type)
Kind = TypeVar("Kind", bound="LossScale")
# Scale, good steps and hysteresis left; of one scale, or of a vector of them.
DynamicState: TypeAlias = tuple[Float[Array, "..."], Int[Array, "..."], Int[Array, "..."]]


def _array(x: ArrayLike) -> Array:
    """An array; a loss may be a Python number."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _to_float32(x: ArrayLike) -> Array:
    x = _array(x)
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def as_flag(finite: object) -> Bool[Array, ""]:
    """Returns whether a step was finite as a bool scalar.

    Raises:
      ConfigError: it is something else.
    """
    known = isinstance(finite, bool | np.bool_ | np.ndarray | jax.Array)
    flag = jnp.asarray(finite) if known else None
    if flag is None or flag.shape != () or flag.dtype != jnp.bool_:
        raise ConfigError(
            f"loss scale: finite is {brief(finite)}; write adjust(finite) with one bool, such as"
            " jnp.all(finite)"
        )
    return flag


def as_pytree(kind: Class) -> Class:
    """Registers a loss scale: its state gives the leaves, its settings belong to the structure."""

    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda x: (
            tuple(zip(map(GetAttrKey, x.names), x.state, strict=True)),
            (x.settings, x.owned),
        ),
        lambda static, state: rebuild(kind, static[0], tuple(state), static[1]),
        lambda x: (x.state, (x.settings, x.owned)),
    )
    return kind


def rebuild(
    kind: type[Kind], settings: LossScaleSettings, state: Sequence[PyTree], owned: bool = False
) -> Kind:
    """Returns a loss scale of this kind with this state: arrays, or what a pytree has for them."""
    out = object.__new__(kind)
    out.settings, out.state, out.owned = settings, tuple(state), owned
    return out


@as_pytree
class LossScale:
    """The protocol `scale / unscale / adjust`, as in jmp; also the scale that does nothing.

    Settings are static (part of the tree structure), the running state is arrays. In this class
    there is no state; `scale` and `unscale` only cast to float32.

    Example:
      >>> NoOpLossScale().unscale({"w": jnp.ones(2, jnp.float16)})["w"].dtype.name
      'float32'
    """

    names: tuple[str, ...] = ()  # of the state's arrays
    settings: LossScaleSettings
    state: tuple[Array, ...]
    owned: bool = False  # by an optimizer, whose step unscales

    def __init__(self) -> None:
        self.settings, self.state = LossScaleSettings("none"), ()

    def _begin(self, kind: str, init: int | float | None, *values: Any, **named: Any) -> None:
        """Sets the settings, which check their values, and the state before the first step."""
        if init is None:  # which settings take for their default
            raise ConfigError(
                "loss scale: init=None is no number; leave it out or write init=65536"
            )
        self.settings = LossScaleSettings(kind, init, *values, **named)
        self.state = self.first_state(self.settings)

    @classmethod
    def from_settings(cls: type[Kind], settings: LossScaleSettings) -> Kind:
        """Returns the loss scale of this kind that settings describe, before the first step."""
        return rebuild(cls, settings, cls.first_state(settings))

    @staticmethod
    def first_state(settings: LossScaleSettings) -> tuple[Array, ...]:
        """Returns the state before the first step."""
        del settings
        return ()

    def of_optimizer(self: Kind) -> Kind:
        """Returns the same loss scale as part of an optimizer's state."""
        return rebuild(type(self), self.settings, self.state, owned=True)

    @property
    def value(self) -> Any:  # NumPy's in a state on the host
        """The current scale, float32; of NumPy in a state that was fetched to the host."""
        return jnp.float32(1)

    def scale(self, tree: Tree) -> Tree:
        """Returns loss * scale in float32: a float16 loss would overflow."""
        return jax.tree.map(_to_float32, tree)

    def unscale(self, tree: Tree) -> Tree:
        """Returns gradients / scale in float32; exact where the scale is a power of two."""
        return jax.tree.map(_to_float32, bare(tree))

    def adjust(self, finite: Bool[Array, ""] | bool, grads: Grads = None) -> LossScale:
        """Returns the loss scale of the next step.

        Args:
          finite: whether all gradients of this step were, a bool scalar.
          grads: these gradients, unscaled; some kinds read them.

        Raises:
          ConfigError: `finite` is no bool scalar.
        """
        del grads
        as_flag(finite)
        return self

    def at_minimum(self, grads: Grads = None) -> Bool[Array, ""]:
        """Returns whether a step with these gradients can no longer lower the scale."""
        del grads
        return jnp.bool_(True)

    def metrics(self) -> Metrics:
        """Returns scalars worth a curve: `loss_scale`, and what else this kind knows."""
        return {"loss_scale": self.value}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings}, state={self.state})"


@as_pytree
class NoOpLossScale(LossScale):
    """No scale."""


@as_pytree
class StaticLossScale(LossScale):
    r"""A constant scale $s$: gradients of $s L$, divided by $s$.

    Args:
      scale: $s$, positive.

    Raises:
      ConfigError: the scale is not a positive finite number.

    Example:
      >>> StaticLossScale(8.0).scale(jnp.float16(2.0)).item()
      16.0
    """

    names: tuple[str, ...] = ("scale",)

    @explains_calls
    def __init__(self, scale: int | float) -> None:
        self._begin("static", scale)

    @staticmethod
    def first_state(settings: LossScaleSettings) -> tuple[Array, ...]:
        return (jnp.float32(settings.init),)

    @property
    def value(self) -> Any:  # NumPy's in a state on the host
        return self.state[0]

    def scale(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda x: _array(x).astype(jnp.float32) * self.value, tree)

    def unscale(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda x: _array(x).astype(jnp.float32) / self.value, bare(tree))


def step_dynamic(
    settings: LossScaleSettings, state: Sequence[Array], finite: Bool[Array, "..."]
) -> DynamicState:
    """Returns the next (scale, good steps, hysteresis left), of one scale or of a vector of them.

    Args:
      settings: factors, interval, hysteresis and bounds.
      state: of this step.
      finite: bool, of the scale's shape.
    """
    s = settings
    scale, good, left = state
    good = jnp.where(finite, good + 1, 0)
    grow = good >= s.growth_interval  # a restored run may be past it
    back_off = ~finite & (left == 1)
    grown = jnp.minimum(scale * s.growth_factor, s.max_scale)
    lowered = jnp.maximum(scale * s.backoff_factor, s.min_scale)
    return (
        jnp.where(grow, grown, jnp.where(back_off, lowered, scale)),
        jnp.where(grow, 0, good),
        jnp.where(grow, s.hysteresis, jnp.where(finite | back_off, left, left - 1)),
    )


@as_pytree
class DynamicLossScale(StaticLossScale):
    r"""A scale that grows after a run of finite steps and backs off at a non-finite one.

    $$s \leftarrow \min(s\,g, s_{max})$$ after `growth_interval` finite steps in a row;
    $$s \leftarrow \max(s\,b, s_{min})$$ at a non-finite step, once `hysteresis` of them have been
    seen since the last growth (the growth interval ends a run even at `max_scale`).

    Args:
      init: first scale.
      growth_factor: $g > 1$.
      backoff_factor: $b < 1$.
      growth_interval: finite steps between growths.
      hysteresis: non-finite steps until the first backoff; 1 backs off at once.
      min_scale: $s_{min}$.
      max_scale: $s_{max}$.

    Raises:
      ConfigError: a value outside its range.

    Example:
      >>> scale = DynamicLossScale(init=1024.0, growth_interval=2)
      >>> for finite in (True, True, False):
      ...     scale = scale.adjust(jnp.bool_(finite))
      ...     print(scale.value.item())
      1024.0
      2048.0
      1024.0

    References:
      Micikevicius et al. 2018, section 3.2; hysteresis as in DeepSpeed's DynamicLossScaler.
    """

    names = ("scale", "good_steps", "hysteresis_left")

    @explains_calls
    def __init__(
        self,
        init: int | float = 2.0**16,
        growth_factor: int | float = 2.0,
        backoff_factor: int | float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        min_scale: int | float = 1.0,
        max_scale: int | float = 2.0**24,
    ) -> None:
        factors = growth_factor, backoff_factor, growth_interval, hysteresis
        self._begin("dynamic", init, *factors, min_scale, max_scale)

    @staticmethod
    def first_state(settings: LossScaleSettings) -> tuple[Array, ...]:
        return jnp.float32(settings.init), jnp.int32(0), jnp.int32(settings.hysteresis)

    def adjust(self, finite: Bool[Array, ""] | bool, grads: Grads = None) -> DynamicLossScale:
        del grads
        state = step_dynamic(self.settings, self.state, as_flag(finite))
        return rebuild(type(self), self.settings, state, self.owned)

    def at_minimum(self, grads: Grads = None) -> Bool[Array, ""]:
        del grads
        return self.value <= self.settings.min_scale
