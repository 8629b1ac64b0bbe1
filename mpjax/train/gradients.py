"""The gradients of a step: of one batch, or of microbatches that are weighed and summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats.delayed import (
    AmaxHistory,
    begin_step,
    end_step,
    observed_of,
    with_observed,
)
from mpjax.ops import Combine, Objective
from mpjax.optim import all_finite, scaled_grad, weight_view
from mpjax.optim.loss_scale.multi_loss import scaled_grads
from mpjax.typing import Array, Batch, Grads, Key, Metrics, ModelState, Params, PyTree

if TYPE_CHECKING:
    from mpjax.train.step import TrainState

Shares: TypeAlias = dict[str, Array] | None  # of several losses, the weight of each

TERM = "loss/"  # begins the metric of one loss of several
COMBINED = 2**31 - 1  # of the key of combined gradients; no microbatch has this number


class Replicas(NamedTuple):
    """Replicas that take gradients apart, each of its rows of the batch, in a `jax.shard_map`.

    Args:
      axis: the mesh axis that tells them apart.
      size: of the axis.
    """

    axis: str
    size: int

    def total(self, x: PyTree) -> PyTree:
        """The sum over all of them."""
        return jax.tree.map(lambda a: jax.lax.psum(a, self.axis), x)

    def mean(self, x: PyTree) -> PyTree:
        """The mean of all of them."""
        return jax.tree.map(lambda a: jax.lax.pmean(a, self.axis), x)

    def largest(self, x: PyTree) -> PyTree:
        """The maximum of all of them."""
        return jax.tree.map(lambda a: jax.lax.pmax(a, self.axis), x)


class Judged(NamedTuple):
    """What a loss came to.

    Args:
      loss: the mean; inside of `gradients` each of several, where they are combined.
      metrics: of its terms.
      state: the model's next state.
      combine: the next state of the objective's `combine`.
      finite: whether the gradients of each loss are, where each has its own loss scale.
    """

    loss: Array
    metrics: Metrics
    state: ModelState
    combine: PyTree = None
    finite: Array | None = None


def gradients(
    objective: Objective,
    state: TrainState,
    batch: Batch,
    accumulate: int,
    replicas: Replicas | None = None,
) -> tuple[Grads, Judged]:
    """Returns scaled gradients, and what was judged; microbatches are summed in float32.

    Each weighs by its share of the targets; of several losses each by its own (see
    `mpjax.ops.Objective`). With replicas the gradients are this one's, weighed so that their mean
    over all is the batch's, and all that was judged is the batch's.
    """
    scale, weights = state.opt_state.loss_scale, weight_view(state.params)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    if replicas is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(replicas.axis))

    combine = objective.combine
    check_combine(objective, state.model_state)
    begun = begin_step(state.model_state, scale.value)

    def loss_of(
        params: Params, amax: list[Array], micro: Batch, state: ModelState, key: Key, shares: Shares
    ) -> tuple[Array, Judged]:
        observed = with_observed(state, amax)
        judged = _judge(objective, params, micro, observed, key, shares, scale.value, apart=True)
        return judged.loss, judged

    # The amax of gradients is the cotangent of the observed amax; an empty list costs nothing.
    if combine is None:
        grad = scaled_grad(scale, loss_of, argnums=(0, 1))
    else:
        grad = scaled_grads(scale, loss_of, len(combine.names))

    def joined(grads: PyTree, judged: Judged) -> tuple[Grads, Judged]:
        if combine is None:
            return grads, judged
        return _combined(combine, state, grads, judged, jax.random.fold_in(key, COMBINED))

    def ended(model_state: ModelState, amax: list[Array]) -> ModelState:
        if replicas is not None:
            amax = replicas.largest(amax)
            observed = replicas.largest(observed_of(model_state))
            model_state = with_observed(_averaged(model_state, replicas), observed)
        return end_step(model_state, state.model_state, amax, scale.value)

    def of_all(judged: Judged) -> Judged:
        if replicas is None:
            return judged
        loss, metrics = replicas.mean((judged.loss, judged.metrics))
        return judged._replace(loss=loss, metrics=metrics)

    if accumulate == 1:
        share, several = None, None
        if replicas is not None:
            share, several = _one_share(_shares(objective.count(batch), 1, replicas))
        (grads, amax), judged = grad(weights, observed_of(begun), batch, begun, key, several)
        if share is not None:
            grads = jax.tree.map(lambda g: share * g.astype(jnp.float32), grads)
            metrics = _weighed_terms(judged.metrics, lambda x: share * x)
            judged = judged._replace(loss=share * judged.loss.astype(jnp.float32), metrics=metrics)
        judged = judged._replace(state=ended(judged.state, amax))
        return joined(grads, of_all(judged))

    def body(carry: PyTree, part: PyTree) -> tuple[PyTree, Metrics]:
        total, total_loss, largest, model_state = carry
        index, micro, share, several = part
        (grads, amax), judged = grad(
            weights, observed_of(model_state), micro, model_state, jax.random.fold_in(key, index),
            several,
        )  # fmt: skip

        def weighed(x: Array) -> Array:
            x = x.astype(jnp.float32)
            return x if share is None else share * x

        sums = (total, total_loss), (grads, judged.loss)
        total, total_loss = jax.tree.map(lambda total, x: total + weighed(x), *sums)
        largest = jax.tree.map(jnp.maximum, largest, amax)  # gradients add up, magnitudes do not
        metrics = _weighed_terms(judged.metrics, weighed)
        return (total, total_loss, largest, judged.state), metrics

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), weights)
    no_loss = jnp.float32(0)
    if combine is not None:
        zeros, no_loss = [zeros] * len(combine.names), jnp.zeros(len(combine.names), jnp.float32)
    carry = (zeros, no_loss, jax.tree.map(jnp.zeros_like, observed_of(begun)), begun)
    parts = (jnp.arange(accumulate), *_microbatches(objective, batch, accumulate, replicas))
    (grads, loss, amax, model_state), metrics = jax.lax.scan(body, carry, parts)
    model_state = ended(model_state, amax)
    metrics = {name: jnp.mean(x, axis=0) for name, x in metrics.items()}
    grads = jax.tree.map(lambda g: g / accumulate, grads)
    return joined(grads, of_all(Judged(loss / accumulate, metrics, model_state)))


def _averaged(model_state: ModelState, replicas: Replicas) -> ModelState:
    """What a model threads through itself besides amax histories, such as running means."""

    def average(x: PyTree) -> PyTree:
        plain = not isinstance(x, AmaxHistory) and jnp.issubdtype(x.dtype, jnp.floating)
        return replicas.mean(x) if plain else x

    return jax.tree.map(average, model_state, is_leaf=lambda x: isinstance(x, AmaxHistory))


def check_combine(objective: Objective, model_state: ModelState) -> None:
    """Checks that the gradients of several losses can be taken apart.

    Raises:
      ConfigError: losses that have a loss scale each, with delayed scaling, whose magnitudes are
        known at one, or in an objective that scales gradients of its own.
    """
    if objective.combine is None or not objective.combine.own_scales:
        return
    leaves = jax.tree.leaves(model_state, is_leaf=lambda x: isinstance(x, AmaxHistory))
    if any(isinstance(x, AmaxHistory) for x in leaves):
        raise ConfigError(
            "own_scales: each loss has its own loss scale, and delayed scaling keeps the amax of"
            " gradients at one; take a recipe with current scaling, such as fp8, or one loss scale"
        )
    if objective.takes_scale:
        raise ConfigError(
            "own_scales: each loss has its own loss scale, and the objective takes gradients of its"
            " own at one; leave own_scales out"
        )


def _combined(
    combine: Combine, state: TrainState, grads: list[Grads], judged: Judged, key: Key
) -> tuple[Grads, Judged]:
    """The gradients of several losses as one, at the loss scale that the optimizer expects."""
    scale, finite, told = state.opt_state.loss_scale, None, {}
    if state.combine is None and combine.init() is not None:
        raise ConfigError(
            "state: the objective keeps a state to combine gradients; pass"
            " combine=objective.combine.init() to init_state"
        )
    if combine.own_scales:
        grads = [one.unscale(g) for one, g in zip(scale.scales, grads, strict=True)]
        finite = jnp.stack([all_finite(g) for g in grads])
        told = {f"loss_scale/{n}": s for n, s in zip(combine.names, scale.value, strict=True)}
    else:
        grads = [scale.unscale(g) for g in grads]
    total, new, metrics = combine(grads, judged.loss, key, state.combine)
    if not combine.own_scales:  # exact where the scale is a power of two
        total = scale.scale(total)
    metrics = judged.metrics | metrics | told
    return total, Judged(jnp.sum(judged.loss), metrics, judged.state, new, finite)


def _judge(
    objective: Objective, params: Params, batch: Batch, state: ModelState, key: Key,
    shares: Shares, scale: Array, apart: bool = False,
) -> Judged:  # fmt: skip
    """The loss of a (micro)batch, of several losses their sum by `shares`, or each if combined."""
    options: Any = dict(state=state, key=key, train=True)
    options |= {"loss_scale": scale} if objective.takes_scale else {}
    if objective.terms is None:
        loss, state = objective.loss(params, batch, **options)
        return Judged(loss, {}, state)
    losses, state, metrics = objective.terms(params, batch, **options)
    if shares is not None:
        losses = {name: shares[name] * x.astype(jnp.float32) for name, x in losses.items()}
    if len(losses) > 1:
        metrics = metrics | {TERM + name: x.astype(jnp.float32) for name, x in losses.items()}
    if apart and objective.combine is not None:
        each = [losses[name].astype(jnp.float32) for name in objective.combine.names]
        return Judged(jnp.stack(each), metrics, state)
    total: Any = sum(losses.values())
    return Judged(total, metrics, state)


def _weighed_terms(metrics: Metrics, weighed: Callable[[Array], Array]) -> Metrics:
    """Metrics of a microbatch, in which each loss counts as the whole one does."""
    return {n: weighed(x) if n.startswith(TERM) else x for n, x in metrics.items()}


def _shares(counts: PyTree, parts: int, replicas: Replicas | None) -> PyTree:
    """By how much each part counts, 1 on average: its share of the targets.

    Of no count there are no leaves, of several losses as many.
    """
    total = jax.tree.map(jnp.sum, counts)
    if replicas is not None:
        total, parts = replicas.total(total), parts * replicas.size
    return jax.tree.map(lambda n, t: n * (parts / jnp.maximum(t, 1e-30)), counts, total)


def _one_share(shares: PyTree) -> tuple[Array | None, Shares]:
    """Shares of one loss, or of several."""
    return (None, shares) if isinstance(shares, dict) else (shares, None)


def _microbatches(
    objective: Objective, batch: Batch, accumulate: int, replicas: Replicas | None = None
) -> tuple[Batch, Array | None, Shares]:
    """A batch cut along a new first axis, the weight of each part, and its weights of each loss.

    With several losses the second is None, with one loss the third; both are where parts weigh
    alike.
    """

    def split(x: Array) -> Array:  # strided, so that a batch cut over devices stays cut evenly
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    micros = jax.tree.map(split, batch)
    counts = jax.vmap(objective.count)(micros)
    return micros, *_one_share(_shares(counts, accumulate, replicas))


def loss_at(
    objective: Objective, state: TrainState, batch: Batch, accumulate: int
) -> Callable[[Params], tuple[Array, Metrics]]:
    """Returns the loss of a batch and its metrics as a function of weights, without gradients.

    The model's state and key are those of the step.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    scale = state.opt_state.loss_scale.value

    def value(full: Params) -> tuple[Array, Metrics]:
        stored = weight_view(state.params)
        # A weight that is stored low is tried as it would be stored.
        params = jax.tree.map(lambda w, p: w.astype(p.dtype), full, stored)

        def of(part: PyTree) -> tuple[Array, Metrics]:
            key, micro, share, several = part
            model_state = begin_step(state.model_state, jnp.float32(1))
            judged = _judge(objective, params, micro, model_state, key, several, scale)
            weight = 1 if share is None else share
            metrics = _weighed_terms(judged.metrics, lambda x: weight * x)
            return judged.loss.astype(jnp.float32) * weight, metrics

        if accumulate == 1:
            return of((key, batch, None, None))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(accumulate))
        each = jax.lax.map(of, (keys, *_microbatches(objective, batch, accumulate)))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), each)

    return value
