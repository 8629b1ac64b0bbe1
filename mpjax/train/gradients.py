"""The gradients of a step: of one batch, or of microbatches that are weighed and summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from mpjax.formats.delayed import begin_step, end_step, observed_of, with_observed
from mpjax.ops import Objective
from mpjax.optim import scaled_grad, weight_view
from mpjax.typing import Array, Batch, Grads, Key, ModelState, Params, PyTree

if TYPE_CHECKING:
    from mpjax.train.step import TrainState

Shares: TypeAlias = dict[str, Array] | None  # of several losses, the weight of each


def gradients(
    objective: Objective, state: TrainState, batch: Batch, accumulate: int
) -> tuple[Grads, Array, ModelState]:
    """Returns scaled gradients, mean loss and model state; microbatches are summed in float32.

    Each weighs by its share of the targets; of several losses each by its own (see
    `mpjax.ops.Objective`).
    """
    scale, weights = state.opt_state.loss_scale, weight_view(state.params)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    begun = begin_step(state.model_state, scale.value)

    def loss_of(
        params: Params, amax: list[Array], micro: Batch, state: ModelState, key: Key, shares: Shares
    ) -> tuple[Array, tuple[Array, ModelState]]:
        loss, state = _loss(objective, params, micro, with_observed(state, amax), key, shares)
        return loss, (loss, state)

    # The amax of gradients is the cotangent of the observed amax; an empty list costs nothing.
    grad = scaled_grad(scale, loss_of, argnums=(0, 1))
    if accumulate == 1:
        (grads, amax), (loss, model_state) = grad(
            weights, observed_of(begun), batch, begun, key, None
        )
        return grads, loss, end_step(model_state, state.model_state, amax, scale.value)

    def body(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
        total, total_loss, largest, model_state = carry
        index, micro, share, several = part
        (grads, amax), (loss, model_state) = grad(
            weights, observed_of(model_state), micro, model_state, jax.random.fold_in(key, index),
            several,
        )  # fmt: skip

        def add(total: Array, x: Array) -> Array:
            x = x.astype(jnp.float32)
            return total + (x if share is None else share * x)

        total, total_loss = jax.tree.map(add, (total, total_loss), (grads, loss))
        largest = jax.tree.map(jnp.maximum, largest, amax)  # gradients add up, magnitudes do not
        return (total, total_loss, largest, model_state), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), weights)
    carry = (zeros, jnp.float32(0), jax.tree.map(jnp.zeros_like, observed_of(begun)), begun)
    parts = (jnp.arange(accumulate), *_microbatches(objective, batch, accumulate))
    (grads, loss, amax, model_state), _ = jax.lax.scan(body, carry, parts)
    model_state = end_step(model_state, state.model_state, amax, scale.value)
    return jax.tree.map(lambda g: g / accumulate, grads), loss / accumulate, model_state


def _loss(
    objective: Objective, params: Params, batch: Batch, state: ModelState, key: Key, shares: Shares
) -> tuple[Array, ModelState]:
    """The loss of a (micro)batch and the state; of several losses their sum by `shares`."""
    run: Any = objective.loss if shares is None else objective.parts
    loss, state = run(params, batch, state=state, key=key, train=True)
    if shares is not None:
        loss = sum(shares[name] * part.astype(jnp.float32) for name, part in loss.items())
    return loss, state


def _microbatches(
    objective: Objective, batch: Batch, accumulate: int
) -> tuple[Batch, Array | None, Shares]:
    """A batch cut along a new first axis, the weight of each part, and its weights of each loss.

    With several losses the second is None, with one loss the third; both are where parts weigh
    alike.
    """

    def split(x: Array) -> Array:  # strided, so that a batch cut over devices stays cut evenly
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    micros = jax.tree.map(split, batch)
    counts = jax.vmap(objective.count)(micros)
    # Of no count there are no leaves, of several losses as many.
    shares = jax.tree.map(lambda n: n * (accumulate / jnp.maximum(jnp.sum(n), 1e-30)), counts)
    return (micros, None, shares) if isinstance(shares, dict) else (micros, shares, None)


def loss_at(
    objective: Objective, state: TrainState, batch: Batch, accumulate: int
) -> Callable[[Params], Array]:
    """Returns the loss of a batch as a function of weights, for searches along a line.

    The model's state and key are those of the step.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    def value(full: Params) -> Array:
        stored = weight_view(state.params)
        # A weight that is stored low is tried as it would be stored.
        params = jax.tree.map(lambda w, p: w.astype(p.dtype), full, stored)

        def of(part: PyTree) -> Array:
            key, micro, share, several = part
            model_state = begin_step(state.model_state, jnp.float32(1))
            loss, _ = _loss(objective, params, micro, model_state, key, several)
            return loss.astype(jnp.float32) * (1 if share is None else share)

        if accumulate == 1:
            return of((key, batch, None, None))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(accumulate))
        return jnp.mean(jax.lax.map(of, (keys, *_microbatches(objective, batch, accumulate))))

    return value
