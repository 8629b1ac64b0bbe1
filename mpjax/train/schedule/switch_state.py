"""The state of a run with a precision schedule, and how it changes at a switch.

All precisions take the same state: weights, moments and counters are stored alike in all of them
and are not changed. What belongs to one precision is in `TrainState.switch`:

  loss scale      each precision keeps its own, which does not change while another one runs.
  amax histories  are emptied when their precision becomes active again: old magnitudes would make
                  numbers saturate, and an empty history takes its scales from the current tensor.
  other state     of the model (running means) is carried over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mpjax.errors import ConfigError
from mpjax.formats.delayed import AmaxHistory, map_histories
from mpjax.optim import LossScale, NoOpLossScale
from mpjax.paths import leaves_with_names, path_name
from mpjax.train.checkpoint.leaves import describe, named_leaves
from mpjax.train.step import StepFn, TrainState, TrainStep
from mpjax.typing import ArrayLike, Batch, Metrics, ModelState, PyTree, Settings


class SwitchState(NamedTuple):
    """What a schedule keeps in the train state; every leaf is an array.

    Args:
      active: index of the precision that the last step was taken in.
      since: steps that had been taken when it became active.
      trips: promotions so far.
      skipped: skipped steps at the last decision.
      best: lowest mean loss of a window so far, inf before the first.
      spread: standard deviation of the losses of that window.
      losses: of the last steps, a step's at its number modulo the window; empty without triggers.
      loss_scales: of each precision.
      model_states: of each precision.
    """

    active: Int[Array, ""]
    since: Int[Array, ""]
    trips: Int[Array, ""]
    skipped: Int[Array, ""]
    best: Float[Array, ""]
    spread: Float[Array, ""]
    losses: Float[Array, " window"]
    loss_scales: tuple[LossScale, ...]
    model_states: tuple[ModelState, ...]


def switch_of(state: TrainState) -> SwitchState:
    """Returns what a schedule keeps in the state of its run."""
    assert state.switch is not None, "the state of a run without a schedule"
    return state.switch


def whole_state(
    plain: TrainState, window: int, scales: Sequence[LossScale], models: Sequence[ModelState]
) -> TrainState:
    """Returns the state of a scheduled run before its first step, from that of one precision."""
    zero, unknown = jnp.int32(0), jnp.float32(jnp.inf)
    switch = SwitchState(
        zero, zero, zero, zero, unknown, jnp.float32(0), jnp.zeros(window, jnp.float32),
        tuple(scales), tuple(models),
    )  # fmt: skip
    opt_state = plain.opt_state._replace(loss_scale=NoOpLossScale())
    return plain._replace(opt_state=opt_state, model_state=None, switch=switch)


def plain_state(state: TrainState, index: int) -> TrainState:
    """Returns the state as the step of one precision sees it."""
    switch = switch_of(state)
    opt_state = state.opt_state._replace(loss_scale=switch.loss_scales[index])
    model_state = switch.model_states[index]
    return state._replace(opt_state=opt_state, model_state=model_state, switch=None)


def scheduled(step: TrainStep, index: int) -> StepFn:
    """Returns the function of one precision's step, from and to the state of the whole run."""

    def function(state: TrainState, batch: Batch, *frozen: PyTree) -> tuple[TrainState, Metrics]:
        plain, metrics = step.function(plain_state(state, index), batch, *frozen)
        switch = switch_of(state)
        scales, models = list(switch.loss_scales), list(switch.model_states)
        scales[index], models[index] = plain.opt_state.loss_scale, plain.model_state
        losses = switch.losses
        if losses.size:
            losses = losses.at[state.step % losses.size].set(metrics["loss"])
        switch = switch._replace(
            losses=losses, loss_scales=tuple(scales), model_states=tuple(models)
        )
        opt_state = plain.opt_state._replace(loss_scale=NoOpLossScale())
        new = plain._replace(opt_state=opt_state, model_state=None, switch=switch)
        return new, metrics | {"precision": jnp.int32(index)}

    return function


def updated(switch: SwitchState, new: Settings) -> SwitchState:
    """Returns the state with these numbers, where and as committed as those that they replace."""

    def put(name: str, value: ArrayLike) -> Any:
        old = getattr(switch, name)
        value = np.asarray(value, old.dtype)
        # A committed array where there was none would make jit compile again.
        return jax.device_put(value, old.sharding) if old.committed else jnp.asarray(value)

    return switch._replace(**{name: put(name, value) for name, value in new.items()})


def joined(state: TrainState) -> TrainState:
    """Returns the state of a scheduled run that goes on from one without the schedule.

    Its windows begin here: losses and skips of before are not its own.
    """
    number, skipped = jax.device_get((state.step, state.opt_state.gate.skipped))
    return state._replace(switch=updated(switch_of(state), {"since": number, "skipped": skipped}))


def entered(switch: SwitchState, before: int, index: int, number: int) -> SwitchState:
    """Returns the state at the switch from one precision to another."""
    models = list(switch.model_states)
    known = _carried(models[before])

    def zeros(x: Array) -> Array:
        return jnp.zeros_like(x, device=x.sharding if x.committed else None)

    fresh = map_histories(lambda h: jax.tree.map(zeros, h), models[index])

    def carry(path: jax.tree_util.KeyPath, leaf: Array | AmaxHistory) -> Array | AmaxHistory:
        # A copy, because one buffer cannot be donated twice.
        return leaf if isinstance(leaf, AmaxHistory) else jnp.copy(known[path_name(path)])

    models[index] = jax.tree_util.tree_map_with_path(carry, fresh, is_leaf=_is_history)
    new = {"active": index, "since": number, "trips": int(switch.trips) + (index > before)}
    return updated(switch, new)._replace(model_states=tuple(models))


def _is_history(x: object) -> bool:
    return isinstance(x, AmaxHistory)


def _carried(model_state: ModelState) -> dict[str, Array]:
    """What a model threads through itself besides amax histories, by path."""
    leaves = leaves_with_names(model_state, _is_history)
    return {path: leaf for path, leaf in leaves if not _is_history(leaf)}


def require_alike(labels: Sequence[str], states: Sequence[TrainState]) -> None:
    """Checks that a state can be carried from each precision to each other one.

    Args:
      labels: names of the precisions.
      states: abstract, one a precision.

    Raises:
      ConfigError: a weight, a moment or an update rule's number is stored differently.
    """

    def stored(state: TrainState) -> tuple[PyTree, ...]:
        carried = _carried(state.model_state)
        carried_on = {"moments": state.opt_state.inner, "update": state.opt_state.update_state}
        return state.params, carried_on, carried

    for label, state in zip(labels[1:], states[1:], strict=True):
        first, other = stored(states[0]), stored(state)
        tables = [
            {name: describe(leaf) for part in parts for name, leaf in named_leaves(part).items()}
            for parts in (first, other)
        ]
        for name in tables[0] | tables[1]:
            was, now = (table.get(name, "missing") for table in tables)
            if was != now:
                raise ConfigError(
                    f"precision schedule: {name} is {was} in {labels[0]} and {now} in {label};"
                    " weights and moments are carried over a switch as they are stored, so give"
                    " both precisions the same p= (low-bf16 computes low and stores float32)"
                )
        structures: list[Any] = [jax.tree.structure(parts) for parts in (first, other)]
        if structures[0] != structures[1]:
            raise ConfigError(
                f"precision schedule: {labels[0]} and {label} store weights in formats of one dtype"
                " with other scales; give both precisions the same p="
            )
