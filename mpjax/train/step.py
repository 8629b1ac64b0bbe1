"""Train state and the compiled train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt

from mpjax.errors import ConfigError, brief, explains_calls, is_whole
from mpjax.formats.checks import as_batch, batch_rows
from mpjax.ops.objective import Count, LossFn, Objective, rows_alike
from mpjax.ops.target import traced_for
from mpjax.optim import (
    ExchangeState,
    Optimizer,
    OptState,
    ScaledGradients,
    copied,
    float32_view,
    select,
    weight_view,
    without_repeats,
)
from mpjax.optim.checks import check_seed
from mpjax.train.gradients import Judged, gradients, loss_at
from mpjax.train.local_state import LocalState
from mpjax.train.replicas import ReplicaExchange, check_replicas, whole_batch_only
from mpjax.typing import ArrayLike, Batch, Grads, Metrics, ModelState, Params, PyTree, Settings

if TYPE_CHECKING:
    from mpjax.train.schedule.switch_state import SwitchState


class TrainState(NamedTuple):
    """All that changes while training; every leaf is an array.

    Args:
      step: steps taken, skipped ones included.
      params: weights as stored.
      opt_state: moments, master weights, loss scale, skip counters.
      model_state: what the model threads through itself (None for a decoder in training).
      key: raw key data; dropout folds in the step.
      switch: what a schedule of Precision keeps (`mpjax.train.schedule`), None without one.
      combine: what an objective keeps that combines the gradients of several losses, or None.
      average: moving average of the weights in float32, of an objective that reads one, or None.
      exchange: what replicas keep of compressed gradients, or None.
      local: what replicas have that train apart (`DiLoCo`), or None; `params` and `opt_state` are
        then those of the outer steps.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: OptState
    model_state: ModelState
    key: UInt[Array, " words"]
    switch: SwitchState | None = None
    combine: PyTree = None
    average: Params | None = None
    exchange: ExchangeState | None = None
    local: LocalState | None = None


@explains_calls
def init_state(
    params: Params,
    optimizer: Optimizer,
    *,
    seed: ArrayLike = 0,
    model_state: ModelState = None,
    combine: PyTree = None,
    average: bool = False,
    exchange: ExchangeState | None = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: the weights, in their storage dtypes; they are copied, since a step donates its state.
      optimizer: from `mpjax.optim.wrap`.
      seed: of dropout and of stochastic rounding.
      model_state: what the loss function takes and gives as `state`; None if it has none.
      combine: `objective.combine.init()`, of an objective that has one.
      average: whether the objective reads a moving average of the weights.
      exchange: what replicas keep of compressed gradients, as `mpjax.train.build` makes it.
    """
    _check_wrapped(optimizer)
    check_seed(seed)
    key = jax.random.key_data(jax.random.key(seed))
    params, model_state = copied((params, model_state))
    opt_state = optimizer.init(params, seed)
    mean = first_average(params, opt_state) if average else None
    return TrainState(
        jnp.int32(0), params, opt_state, model_state, key, None, combine, mean, exchange
    )


def first_average(params: Params, opt_state: OptState) -> Params:
    """Returns the moving average of weights before the first step, in arrays of its own."""
    return copied(float32_view(params, opt_state.update_state))


def with_weights(state: TrainState, params: Params, opt_state: OptState) -> TrainState:
    """Returns a state before its first step that begins with other weights.

    Args:
      state: from `init_state` or `build`.
      params: in the dtypes and shardings of the state's.
      opt_state: of these weights.
    """
    average = state.average
    if average is not None:
        first = first_average(params, opt_state)
        average = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), first, average)
    local = state.local
    if local is not None:
        new = local.with_weights(params, opt_state.update_state)
        local = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), new, local)
    return state._replace(params=params, opt_state=opt_state, average=average, local=local)


def check_batch(batch: int, accumulate: int, mesh: Mesh | None) -> None:
    """Checks a global batch size before anything is built.

    Raises:
      ConfigError: it is not divided by microbatches times the mesh's data and fsdp axes, or is no
        whole number.
    """
    for name, value in (("batch", batch), ("accumulate", accumulate)):
        if not is_whole(value, 1):
            raise ConfigError(f"{name}: {brief(value)} must be a whole number of at least 1")
    parts = accumulate * (1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"])
    if batch % parts:
        raise ConfigError(
            f"batch: {batch} is not a multiple of {parts} = accumulate {accumulate} x"
            f" data x fsdp devices; take {max(1, batch // parts) * parts}"
        )


def _check_wrapped(optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer: {brief(optimizer)} is not wrapped; give mpjax.optim.wrap(optax.adam(1e-3),"
            " precision)"
        )


def _check_losses(objective: Objective, optimizer: Optimizer) -> None:
    """Checks that an optimizer has a loss scale for each loss that is to have its own."""
    combine = objective.combine
    losses = len(combine.names) if combine is not None and combine.own_scales else 0
    if losses != optimizer.losses:
        raise ConfigError(
            f"loss scale: {losses} losses have one each and the optimizer has {optimizer.losses};"
            f" write wrap(..., losses={losses}), or take mpjax.train.build"
        )
    if combine is not None and optimizer.precision.loss_scale.kind == "leaf":
        raise ConfigError(
            "loss scale: leaf scales groups of weights, and gradients of several losses are"
            " combined; set loss_scale=dynamic"
        )


StepFn: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled step: `step(state, batch) -> (state, metrics)`; the old state is donated.

    Args:
      function: the same, neither compiled nor donating.
      compiled: `jax.jit` of it.
      optimizer: the wrapped optimizer.
      mesh: the mesh, or None on one device.
      shardings: of the state, or None on one device.
      accumulate: microbatches a step.
      init: `init(seed)`, a fresh state on the mesh; None when the step was not made by `build`.
      frozen: arrays that the objective reads and no step changes, None without any; `function`
        takes others as a third argument.
      check: the objective's check of each batch, or None.
    """

    function: Callable[..., tuple[TrainState, Metrics]]
    compiled: Any  # a StepFn with the methods of `jax.jit`, or one that chooses among several
    optimizer: Optimizer
    mesh: Mesh | None
    shardings: TrainState | None
    accumulate: int
    init: Callable[[ArrayLike], TrainState] | None = None
    frozen: PyTree = None
    check: Callable[[Batch], None] | None = None

    def place(self, batch: Batch) -> Batch:
        """Puts this process's part of a global batch on its devices.

        Raises:
          ConfigError: the batch is not divided by the mesh and the microbatches, is empty, holds
            something else than arrays, or what the objective's check refuses.
        """
        batch = as_batch(batch)
        found = batch_rows(batch, "step")
        if self.check is not None:
            self.check(batch)
        if len(found) > 1 and (self.accumulate > 1 or self.mesh is not None):
            raise ConfigError(
                f"step: the batch has arrays of {' and '.join(map(str, sorted(found)))} rows, and"
                " is cut by rows; give all as many"
            )
        for rows in found:
            self.check_batch(rows * jax.process_count())
        if self.mesh is None:
            return batch
        sharding = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def check_batch(self, batch: int) -> None:
        """Checks a global batch size.

        Raises:
          ConfigError: it is not divided by microbatches times the mesh's data and fsdp axes.
        """
        check_batch(batch, self.accumulate, self.mesh)

    def active(self, state: TrainState) -> tuple[TrainStep, TrainState]:
        """Returns the step of one precision that comes next, and the state as it sees it."""
        return self, state

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # One array in two places, such as a weight in params and in a moment, is donated once.
        return self.compiled(without_repeats(state), self.place(batch))


class WithFrozen:
    """A compiled step that also takes arrays which no step changes.

    Args:
      jitted: `jax.jit` of `function(state, batch, frozen) -> (state, metrics)`.
      frozen: the arrays.
    """

    def __init__(self, jitted: Any, frozen: PyTree) -> None:
        self._jitted, self._frozen = jitted, frozen

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._jitted(state, batch, self._frozen)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """See `jax.stages.Wrapped`."""
        return self._jitted.lower(state, batch, self._frozen)

    def _cache_size(self) -> int:
        return self._jitted._cache_size()


def compile_step(
    function: Callable[..., tuple[TrainState, Metrics]],
    mesh: Mesh | None,
    shardings: TrainState | None,
    frozen: PyTree = None,
) -> StepFn:
    """Returns `jax.jit` of `function(state, batch) -> (state, metrics)`; the state is donated.

    Args:
      function: takes `frozen` too, if there is some.
      mesh: devices; None is one.
      shardings: of the state.
      frozen: arrays on the mesh that no step changes.
    """
    more = () if frozen is None else (jax.tree.map(lambda x: x.sharding, frozen),)
    if mesh is None:
        jitted = jax.jit(function, donate_argnums=0)
    else:
        jitted = jax.jit(
            traced_for(mesh, function),
            donate_argnums=0,
            in_shardings=(shardings, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), *more),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        )
    return jitted if frozen is None else WithFrozen(jitted, frozen)


def placed(mesh: Mesh | None, frozen: PyTree) -> PyTree:
    """Returns arrays on the devices of a mesh, as they are cut on it, or whole on each of them."""

    def place(x: ArrayLike) -> Array:
        x = jnp.asarray(x)
        if mesh is None or x.sharding.device_set == set(mesh.devices.flat):
            return x
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(place, frozen)


def as_objective(loss_fn: LossFn | Objective, count: Count | None, accumulate: int) -> Objective:
    """Returns a loss function as an objective; see `make_train_step`."""
    if isinstance(loss_fn, Objective):
        if count is not None:
            raise ConfigError("count: the objective has its own; leave count out")
        return loss_fn
    if not callable(loss_fn):
        raise ConfigError(
            f"loss: {brief(loss_fn)} is no function; give loss_fn(params, batch, *, state, key,"
            " train) -> (loss, state), or an Objective"
        )
    if count is None and accumulate > 1:
        raise ConfigError(
            f"accumulate: {accumulate} microbatches count by their targets, and the loss does not"
            " say how many it is a mean over; pass count=mpjax.ops.rows_alike for a mean over rows,"
            " count=mpjax.ops.weight_sum for one by the batch's weights, or a function of yours"
        )
    return Objective(loss_fn, count or rows_alike)


@explains_calls
def make_train_step(
    loss_fn: LossFn | Objective,
    optimizer: Optimizer,
    *,
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
    accumulate: int = 1,
    count: Count | None = None,
) -> TrainStep:
    """Returns the compiled train step of any model.

    Gradients of the scaled loss, summed over microbatches in float32, go through the wrapped
    optimizer.

    Args:
      loss_fn: `loss_fn(params, batch, *, state, key, train) -> (loss, state)`, a mean over the
        targets of a batch; or a `mpjax.ops.Objective`, which also says how many there are.
      optimizer: from `mpjax.optim.wrap`.
      mesh: devices; None is one device.
      shardings: of the state, from `state_shardings`; needed with a mesh.
      accumulate: microbatches a step; each takes every accumulate-th row of the batch, and counts
        by its number of targets.
      count: batch -> number of targets, as in Objective, of a loss function that is none; needed
        with accumulate above 1. `mpjax.ops.rows_alike` for a mean over rows.

    Returns:
      `step(state, batch) -> (state, metrics)`; metrics are scalars on the device: `loss`,
      `loss_scale`, `skipped`, `stuck`, `grad_norm` when the optimizer clips, `loss/NAME` of each
      loss where there are several, and the objective's own.

    Raises:
      ConfigError: accumulate below 1, or above it without a count.

    Example:
      >>> import optax
      >>> from mpjax.ops import rows_alike
      >>> from mpjax.optim import wrap
      >>> from mpjax.precision import get_precision
      >>> def loss(params, batch, *, state, key, train):
      ...     return jnp.mean((params["w"] * batch["x"] - batch["y"]) ** 2), state
      >>> optimizer = wrap(optax.sgd(0.5), get_precision("fp32"))
      >>> state = init_state({"w": jnp.zeros(())}, optimizer)
      >>> step = make_train_step(loss, optimizer, accumulate=2, count=rows_alike)
      >>> state, metrics = step(state, {"x": jnp.ones(4), "y": jnp.ones(4)})
      >>> float(state.params["w"]), float(metrics["loss"])
      (1.0, 1.0)
    """
    _check_wrapped(optimizer)
    if not is_whole(accumulate):
        raise ConfigError(f"accumulate: {brief(accumulate)} is no whole number; 1 does not split")
    if accumulate < 1:
        raise ConfigError(f"accumulate: {accumulate} must be at least 1; 1 does not split")
    whole = as_objective(loss_fn, count, accumulate)
    _check_losses(whole, optimizer)
    held = placed(mesh, whole.frozen)

    check_replicas(optimizer, mesh, whole)

    def seen_average(state: TrainState) -> Params | None:
        if whole.average is None:
            return None
        if state.average is None:
            raise ConfigError(
                "state: the objective reads a moving average of the weights; pass average=True to"
                " init_state"
            )
        # As the model stores weights, so that it computes with both alike.
        weights = weight_view(state.params)
        return jax.tree.map(lambda a, w: a.astype(w.dtype), state.average, weights)

    def next_average(old: Params, params: Params, opt_state: OptState, finite: Any) -> Params:
        assert whole.average is not None
        decay = jnp.float32(whole.average)
        full = float32_view(params, opt_state.update_state)
        new = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, old, full)
        return new if finite is None else select(finite, new, old)

    def step(state: TrainState, batch: Batch, frozen: PyTree = held) -> tuple[TrainState, Metrics]:
        average = seen_average(state)
        objective, exchange = whole.bound(frozen, average), state.exchange
        compressed = ReplicaExchange.of(optimizer, mesh, state.params, shardings)

        def with_gradients() -> tuple[Grads, Judged]:
            return gradients(objective, state, batch, accumulate)

        def loss_alone() -> tuple[Grads, Judged]:
            like, told = jax.eval_shape(with_gradients)
            zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), (like, told.metrics))
            loss, metrics = judge(weight_view(state.params))
            finite = None if told.finite is None else jnp.ones(told.finite.shape, jnp.bool_)
            loss, metrics = loss.astype(told.loss.dtype), zeros[1] | metrics
            return zeros[0], Judged(loss, metrics, state.model_state, state.combine, finite)

        def evaluate(params: Params, with_gradient: bool) -> tuple[Array, Grads | None]:
            if not with_gradient:
                return judge(weight_view(params))[0], None
            moved = state._replace(params=params)
            grads, judged = gradients(objective, moved, batch, accumulate)
            return judged.loss, grads

        judge = loss_at(objective, state, batch, accumulate)
        more: Settings = {"value_fn": lambda params: judge(params)[0], "evaluate": evaluate}
        reads = optimizer.reads_gradient(state.opt_state)
        if compressed is not None:
            grads, judged, exchange = compressed.gradients(
                whole.bound, state, batch, accumulate, frozen, average
            )
            more = {"value_fn": whole_batch_only, "exchanged": True}
        elif isinstance(reads, bool):
            grads, judged = with_gradients() if reads else loss_alone()
        else:
            grads, judged = jax.lax.cond(reads, with_gradients, loss_alone)
        loss, model_state, combine = judged.loss.astype(jnp.float32), judged.state, judged.combine
        more |= {} if judged.finite is None else {"finite_losses": judged.finite}
        grads = grads if compressed else ScaledGradients(grads)
        params, opt_state, metrics = optimizer.step_with_metrics(
            grads, state.opt_state, state.params, value=loss, **more
        )
        finite = metrics.get("finite")
        if finite is not None and state.model_state is not None:
            model_state = select(finite, model_state, state.model_state)
        if finite is not None and combine is not None:
            combine = select(finite, combine, state.combine)
        if finite is not None and compressed is not None:
            exchange = select(finite, exchange, state.exchange)
        metrics = {
            "loss": loss,
            **judged.metrics,
            **state.opt_state.loss_scale.metrics(),
            "skipped": opt_state.gate.skipped,
            "stuck": opt_state.gate.stuck,
            **{key: value for key, value in metrics.items() if key != "finite"},
        }
        mean = state.average
        if whole.average is not None:
            mean = next_average(mean, params, opt_state, finite)
        new = TrainState(
            state.step + 1, params, opt_state, model_state, state.key, None, combine, mean, exchange
        )
        return new, metrics

    compiled = compile_step(step, mesh, shardings, held)
    return TrainStep(
        step, compiled, optimizer, mesh, shardings, accumulate, frozen=held, check=whole.check
    )
