"""From a model and a raw optimizer to the first state and the compiled step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.ops import LossFn, Objective
from mpjax.optim import wrap
from mpjax.precision import PrecisionSchedule, get_schedule
from mpjax.train.checkpoint import leaves
from mpjax.train.diloco import (
    DiLoCo,
    check_local,
    inner_precision,
    make_local_step,
)
from mpjax.train.gradients import check_combine
from mpjax.train.local_state import LocalState
from mpjax.train.replicas import DATA, ReplicaExchange
from mpjax.train.room import require_room
from mpjax.train.schedule.switch import make_switching_step
from mpjax.train.schedule.switch_state import require_alike, whole_state
from mpjax.train.sharding import ShardActivations, parse_mesh, state_shardings, whole
from mpjax.train.step import TrainState, TrainStep, as_objective, init_state, make_train_step
from mpjax.typing import ArrayLike, Key, Model, ModelState, Params, PyTree, Settings


class _Part(NamedTuple):
    """The step of one precision, and its state before the first step."""

    step: TrainStep
    draw: Callable[[ArrayLike], Params]  # seed -> weights
    start: Callable[[Params, ArrayLike], TrainState]  # weights, seed -> state
    first: Callable[[], ModelState]  # the model's own state
    abstract: TrainState
    axes: PyTree
    own: Callable[[Key], Params] | None  # the objective's weights


@explains_calls
def build(
    model: Model,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    mesh: Mesh | str | None = None,
    *,
    seed: int = 0,
    clip: float | None = None,
    gate: bool = True,
    patience: int = 50,
    accumulate: int = 1,
    objective: Callable[[Any], LossFn | Objective] = Objective.of_model,
    schedule: PrecisionSchedule | str | Settings | None = None,
    params: Params | None = None,
    diloco: DiLoCo | str | None = None,
) -> tuple[TrainState, TrainStep]:
    """Initialises a model on a mesh and compiles its train step.

    Args:
      model: a `mpjax.typing.Model`, such as `mpjax.models.decoder`; its Precision decides loss
        scale, update rule and moments.
      optimizer: a raw optax optimizer; it is wrapped here, once.
      mesh: a Mesh, its text (`data=2,fsdp=4`), or None for one device.
      seed: of the weights and of dropout.
      clip: largest global gradient norm.
      gate: whether non-finite steps are skipped.
      patience: see `mpjax.optim.wrap`.
      accumulate: microbatches a step.
      objective: from the model, sharded on the mesh, to its loss function or `mpjax.ops.Objective`;
        by default its own loss, a mean by the batch's `weights` if it has any.
      schedule: of Precision over the run, anything that `get_schedule` reads; the model carries its
        first precision. With two precisions the step is a `mpjax.train.SwitchingStep`.
      params: the model's weights to begin with, such as those of a checkpoint, in the dtypes of
        its Precision; they are copied onto the mesh. By default they are drawn by the seed.
      diloco: how replicas of the axis `data` train apart, a `mpjax.train.DiLoCo` or its text, such
        as `every=20`; None exchanges gradients in every step.

    Returns:
      The first state, sharded, and the step.

    Raises:
      ConfigError: settings that do not fit each other, weights of another model, or a state that
        does not fit in memory.

    Example:
      >>> import jax.numpy as jnp
      >>> from mpjax.models import decoder
      >>> state, step = build(decoder("tiny", layers=1, width=16, heads=2), optax.sgd(0.1))
      >>> batch = {"inputs": jnp.zeros((1, 4), jnp.int32), "targets": jnp.ones((1, 4), jnp.int32)}
      >>> state, metrics = step(state, batch)
      >>> int(state.step), int(metrics["skipped"])
      (1, 0)
    """
    if diloco is not None:
        diloco = DiLoCo.parse(diloco)
        if schedule is not None:
            raise ConfigError(
                "diloco: replicas that train apart keep one precision; leave schedule out"
            )
    model, mesh = _on_mesh(model, mesh, objective, diloco is not None)

    settings: Settings = dict(clip=clip, gate=gate, patience=patience)

    def part(model: Model) -> _Part:
        return _part(model, optimizer, mesh, settings, accumulate, objective, seed, diloco=diloco)

    begin = part(model)
    step, start = begin.step, begin.start
    if schedule is not None:
        schedule = get_schedule(schedule)
        if model.precision != schedule.first:
            raise ConfigError(
                f"precision schedule: it begins in {schedule.labels[0]} and the model carries"
                f" {model.precision.name}; make the model with schedule.first"
            )
        if len(schedule.precisions) > 1:
            others = [
                dataclasses.replace(model, precision=p)  # type: ignore[type-var]  # see Model
                for p in schedule.precisions[1:]
            ]
            step, start = _switching(schedule, [begin, *map(part, others)])
    cut = step.shardings
    # Two programs: whatever the optimizer, the weights of a model are drawn by the same one, which
    # takes longest to compile.
    draw = jax.jit(begin.draw, out_shardings=None if cut is None else cut.params)
    rest = jax.jit(start, out_shardings=cut, donate_argnums=0)

    if params is not None:
        _check_given(params, model)

    def init(seed: ArrayLike) -> TrainState:
        if params is None:
            return rest(draw(seed), seed)
        # A copy: the first step donates its state, and the caller keeps the weights.
        held = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        if begin.own is not None:
            held = _joined(held, begin.own(jax.random.key(seed)))
        return rest(held if cut is None else jax.device_put(held, cut.params), seed)

    return init(seed), dataclasses.replace(step, init=init)


@explains_calls
def build_abstract(
    model: Model,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    mesh: Mesh | str | None = None,
    *,
    clip: float | None = None,
    gate: bool = True,
    patience: int = 50,
    accumulate: int = 1,
    objective: Callable[[Any], LossFn | Objective] = Objective.of_model,
) -> tuple[TrainState, TrainStep]:
    """As `build`, without numbers: the state is one of shapes, and no device need be here.

    `step.compiled.lower(state, batch).compile()` is the program that `build` would run, for the
    devices of the mesh, which may be those of `jax.experimental.topologies`.

    Args:
      model: a `mpjax.typing.Model`.
      optimizer: a raw optax optimizer.
      mesh: a Mesh, its text, or None for one device.
      clip: largest global gradient norm.
      gate: whether non-finite steps are skipped.
      patience: see `mpjax.optim.wrap`.
      accumulate: microbatches a step.
      objective: as in `build`; one with arrays that no step changes needs its devices here.

    Returns:
      The state, of `jax.ShapeDtypeStruct` with its shardings, and the step.

    Raises:
      ConfigError: settings that do not fit each other.

    Example:
      >>> from mpjax.models import decoder
      >>> state, step = build_abstract(decoder("llama-7b", "bf16"), optax.adamw(1e-4))
      >>> f"{sum(x.size for x in jax.tree.leaves(state.params)):.3g}"
      '6.74e+09'
    """
    model, mesh = _on_mesh(model, mesh, objective)
    settings: Settings = dict(clip=clip, gate=gate, patience=patience)
    part = _part(model, optimizer, mesh, settings, accumulate, objective, here=False)
    if part.step.shardings is None:
        return part.abstract, part.step
    state = jax.tree.map(
        lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut),
        part.abstract, part.step.shardings,
    )  # fmt: skip
    return state, part.step


def _on_mesh(
    model: Model,
    mesh: Mesh | str | None,
    objective: Callable[[Any], LossFn | Objective],
    apart: bool = False,
) -> tuple[Model, Mesh | None]:
    """A model as it runs on a mesh, and the mesh: None if it is one device of this process."""
    if not callable(objective) or isinstance(objective, Objective):
        raise ConfigError(
            f"objective: {brief(objective)}; give a function from the model to its objective, such"
            " as task.objective"
        )
    parts = ("init", "precision", "axes")
    if isinstance(model, type) or not all(hasattr(model, part) for part in parts):
        raise ConfigError(
            f"model: {brief(model)} is no model; give one of mpjax.models, such as"
            " decoder('tiny', 'bf16'), or what mpjax.typing.Model describes"
        )
    if objective == Objective.of_model and not hasattr(model, "loss"):
        raise ConfigError(
            f"model: {type(model).__name__} has no loss of its own; give objective=, such as"
            " TextClassification(classes).objective of mpjax.tasks"
        )
    if isinstance(mesh, str):
        mesh = parse_mesh(mesh)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh: {brief(mesh)} is no mesh; write data=2,fsdp=4, or None")
    if mesh is not None and mesh.size == 1 and mesh.devices.flat[0] in jax.devices():
        mesh = None
    if mesh is None:
        return model, None
    apart = apart or model.precision.compression.kind != "none"
    return model.sharded(ShardActivations(mesh, replicas=apart)), mesh


def _part(
    model: Model,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    mesh: Mesh | None,
    settings: Settings,
    accumulate: int,
    objective: Callable[[Any], LossFn | Objective],
    seed: int = 0,
    here: bool = True,
    diloco: DiLoCo | None = None,
) -> _Part:
    """The step of a model in one precision; with its devices here, that its state fits there."""
    first = getattr(model, "init_state", lambda: None)
    trained = objective(model)
    own, combine, frozen, average = None, None, None, False
    if isinstance(trained, Objective):
        own, combine, frozen = trained.init, trained.combine, trained.frozen
        average = trained.average is not None
        check_combine(trained, jax.eval_shape(first))
    losses = len(combine.names) if combine is not None and combine.own_scales else 0
    precision, outer = model.precision, None
    if diloco is not None:
        outer = diloco.outer(precision, settings["patience"])
        precision = inner_precision(precision)
    wrapped = wrap(optimizer, precision, losses=losses, **settings)
    if diloco is not None:
        check_local(wrapped, mesh, trained if isinstance(trained, Objective) else None)

    def draw(seed: ArrayLike) -> Params:
        key = jax.random.key(seed)
        return model.init(key) if own is None else _joined(model.init(key), own(key))

    def begin(params: Params, seed: ArrayLike) -> TrainState:
        held = None if combine is None else combine.init()
        return init_state(
            params, wrapped, seed=seed, model_state=first(), combine=held, average=average
        )

    def start(params: Params, seed: ArrayLike) -> TrainState:
        state = begin(params, seed)
        if outer is not None:
            assert mesh is not None
            own_state = state.params, state.opt_state, state.model_state
            local = LocalState.first(*own_state, mesh.shape[DATA])
            state = state._replace(opt_state=outer.init(state.params, seed), local=local)
        if exchange is None:
            return state
        return state._replace(exchange=exchange.init(state.params))

    abstract = jax.eval_shape(lambda seed: begin(draw(seed), seed), seed)
    axes = model.axes
    if own is not None and axes is not None:
        axes = axes | whole(jax.eval_shape(own, jax.random.key(0)))
    shardings = None if mesh is None else state_shardings(abstract, axes, mesh)
    exchange = ReplicaExchange.of(outer or wrapped, mesh, abstract.params, shardings)
    if exchange is not None or outer is not None:
        abstract = jax.eval_shape(lambda seed: start(draw(seed), seed), seed)
        shardings = None if mesh is None else state_shardings(abstract, axes, mesh)
    if here:
        require_room(abstract, shardings, frozen)
    elif frozen is not None and mesh is not None:
        if not set(mesh.devices.flat) <= set(jax.devices()):
            raise ConfigError(
                "build_abstract: the objective reads arrays that no step changes, which need"
                " devices that are here; give a mesh of jax.devices()"
            )
    if outer is None:
        step = make_train_step(
            trained, wrapped, mesh=mesh, shardings=shardings, accumulate=accumulate
        )
    else:
        assert diloco is not None and mesh is not None and shardings is not None
        whole_of = as_objective(trained, None, accumulate)
        step = make_local_step(whole_of, wrapped, outer, diloco, mesh, shardings, accumulate)
    return _Part(step, draw, start, first, abstract, axes, own)


def _joined(params: Params, own: Params) -> Params:
    """The weights of a model and those of its objective, as one tree."""
    if not isinstance(params, dict) or (shared := sorted(set(params) & set(own))):
        found = f"the names {shared} too" if isinstance(params, dict) else brief(params)
        raise ConfigError(
            f"objective: it has weights {sorted(own)} of its own, which stand beside the model's,"
            f" and the model has {found}; give a model whose weights are a dict without them"
        )
    return params | own


def _check_given(params: Params, model: Model) -> None:
    """Checks that weights are a model's, in the dtypes that it stores."""
    trees = params, jax.eval_shape(model.init, jax.random.key(0))
    held, wanted = (
        {
            name: leaves.describe(x) if hasattr(x, "dtype") else brief(x)
            for name, x in leaves.named_leaves(tree).items()
        }
        for tree in trees
    )
    if odd := sorted(n for n in held.keys() | wanted.keys() if held.get(n) != wanted.get(n)):
        first, others = odd[0], len(odd) - 1
        raise ConfigError(
            f"params: {first} is {held.get(first, 'absent')}, and the model has"
            f" {wanted.get(first, 'none')}" + f" ({others} more differ)" * bool(others) + "; give"
            " weights of this model in its Precision, as load_checkpoint returns them"
        )


def _switching(
    schedule: PrecisionSchedule, parts: list[_Part]
) -> tuple[TrainStep, Callable[[Params, ArrayLike], TrainState]]:
    """Returns the step of all precisions, and what makes the first state from its weights."""
    require_alike(schedule.labels, [part.abstract for part in parts])
    steps = [part.step for part in parts]

    def start(params: Params, seed: ArrayLike) -> TrainState:
        plain = parts[0].start(params, seed)
        scales: Any = [step.optimizer.first_loss_scale(plain.params) for step in steps]
        return whole_state(plain, schedule.window, scales, [part.first() for part in parts])

    mesh = steps[0].mesh
    abstract = jax.eval_shape(start, parts[0].abstract.params, 0)
    shardings = None if mesh is None else state_shardings(abstract, parts[0].axes, mesh)
    return make_switching_step(schedule, steps, shardings), start
