"""Replicas that train apart and exchange, now and then, how far they have come (DiLoCo)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.ops import Objective
from mpjax.optim import Optimizer, float32_view, select, wrap
from mpjax.optim.annealing.annealing import Annealing
from mpjax.optim.checks import is_number
from mpjax.precision import Compression, LossScaleSettings, Moments, Precision
from mpjax.train.local_state import LocalState
from mpjax.train.replicas import DATA, ReplicaExchange
from mpjax.train.step import (
    TrainState,
    TrainStep,
    compile_step,
    make_train_step,
    placed,
)
from mpjax.typing import Array, Batch, Metrics, PyTree

_HELP = "write every=20, then lr=0.7 and momentum=0.9"


@dataclasses.dataclass(frozen=True)
class DiLoCo:
    r"""Replicas take steps of their own; every H-th step their weights are brought together.

    $$\Delta = \frac{1}{N} \sum_i (\theta - \theta_i), \quad m \leftarrow \mu m + \Delta, \quad
    \theta \leftarrow \theta - \eta\,(\Delta + \mu m), \quad \theta_i \leftarrow \theta$$ with the
    common weights $\theta$ and each replica's $\theta_i$: SGD with Nesterov's momentum, whose
    gradient is how far the replicas have come. What is exchanged is $\theta - \theta_i$, in the
    form of the Precision's `compression`; inner steps send nothing but the loss.

    Args:
      every: H, inner steps of an outer one.
      lr: $\eta$ of the outer steps.
      momentum: $\mu$ of the outer steps.

    Raises:
      ConfigError: a value out of its range.

    Example:
      >>> str(DiLoCo.parse("every=50"))
      'every=50,lr=0.7,momentum=0.9'

    References:
      Douillard et al. 2023, DiLoCo: Distributed Low-Communication Training of Language Models,
      algorithm 1 and section 3 (the outer optimizer).
    """

    every: int = 20
    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not is_whole(self.every, 1):
            raise ConfigError(f"diloco: every={brief(self.every)} is no number of steps; {_HELP}")
        if not (is_number(self.lr) and 0 < self.lr < math.inf):
            raise ConfigError(f"diloco: lr={brief(self.lr)} is no number above 0; {_HELP}")
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ConfigError(f"diloco: momentum={brief(self.momentum)} is not in 0 .. 1; {_HELP}")

    @classmethod
    def parse(cls, value: str | DiLoCo) -> DiLoCo:
        """Reads `every=20,lr=0.7,momentum=0.9`; what is left out has its default.

        Raises:
          ConfigError: no such text.
        """
        if isinstance(value, DiLoCo):
            return value
        if not isinstance(value, str):
            raise ConfigError(f"diloco: {brief(value)} is no text; {_HELP}")
        found: dict[str, Any] = {}
        for part in value.split(","):
            key, _, number = part.partition("=")
            if key not in ("every", "lr", "momentum") or key in found:
                raise ConfigError(f"diloco: bad field {part!r} in {value!r}; {_HELP}")
            try:
                found[key] = int(number) if key == "every" else float(number)
            except ValueError:
                raise ConfigError(
                    f"diloco: {key}={number!r} in {value!r} is no number; {_HELP}"
                ) from None
        return cls(**found)

    def __str__(self) -> str:
        return f"every={self.every},lr={self.lr:g},momentum={self.momentum:g}"

    def outer(self, precision: Precision, patience: int) -> Optimizer:
        """Returns the optimizer of the common weights.

        Args:
          precision: of the training.
          patience: see `mpjax.optim.wrap`.
        """
        plain = dataclasses.replace(precision, loss_scale=LossScaleSettings(), moments=Moments())
        rule = optax.sgd(self.lr, momentum=self.momentum, nesterov=True)
        return wrap(rule, plain, patience=patience)


def inner_precision(precision: Precision) -> Precision:
    """Returns the Precision of steps that send nothing."""
    return dataclasses.replace(precision, compression=Compression())


def check_local(optimizer: Optimizer, mesh: Mesh | None, objective: Objective | None) -> None:
    """Checks that there are replicas which can train apart.

    Raises:
      ConfigError: one replica, or an optimizer or objective with a state that all would share.
    """
    size = 1 if mesh is None else mesh.shape[DATA]
    if size < 2:
        raise ConfigError(
            f"diloco: the replicas of the mesh axis {DATA!r} train apart, and it has {size}; give"
            " it at least 2, or leave diloco out"
        )
    if isinstance(optimizer.inner, Annealing):
        raise ConfigError("diloco: annealing has one state for all replicas; leave one of them out")
    own = [objective.combine, objective.average, objective.init] if objective is not None else []
    if any(part is not None for part in own):
        raise ConfigError(
            "diloco: the objective has a state or weights of its own beside the model's; leave"
            " diloco out"
        )


class OuterStep(NamedTuple):
    """Brings replicas together.

    Args:
      optimizer: of the common weights.
      exchange: of the distances in a narrow form; None takes their mean in float32.
    """

    optimizer: Optimizer
    exchange: ReplicaExchange | None

    def __call__(self, state: TrainState, local: LocalState) -> tuple[TrainState, LocalState]:
        """Returns the common state after an outer step, and what replicas go on from.

        Args:
          state: common weights, the outer optimizer's state, and what replicas have not sent.
          local: of the replicas, after their inner steps.
        """
        full = float32_view(state.params, state.opt_state.update_state)
        views = jax.vmap(float32_view)(local.params, local.opt_state.update_state)
        apart = jax.tree.map(lambda w, each: w[None] - each, full, views)
        exchanged = state.exchange
        if self.exchange is None:
            means = jax.tree.map(lambda x: jnp.mean(x, axis=0), apart)
            options = {}
        else:
            assert exchanged is not None
            means, exchanged = self.exchange.mean(apart, exchanged)
            options = {"exchanged": True}
        params, opt_state, metrics = self.optimizer.step_with_metrics(
            means, state.opt_state, state.params, **options
        )
        exchanged = select(metrics["finite"], exchanged, state.exchange)
        state = state._replace(
            params=params, opt_state=opt_state, exchange=exchanged,
            model_state=jax.tree.map(lambda x: x[0], local.model_state),
        )  # fmt: skip
        return state, local.with_weights(params, opt_state.update_state)


def inner_steps(
    function: Callable[..., tuple[TrainState, Metrics]],
    mesh: Mesh,
    state: TrainState,
    local: LocalState,
    batch: Batch,
    frozen: PyTree,
) -> tuple[LocalState, Metrics]:
    """Returns replicas after a step of each on its rows, and metrics of all.

    Losses and norms are means over the replicas, loss scales their smallest, counters of skips
    their largest.

    Args:
      function: `step(state, batch, frozen)` of a replica.
      mesh: the mesh.
      state: its counters and key are common.
      local: of the replicas.
      batch: of all replicas.
      frozen: see `Objective`.
    """

    def apart(
        local: LocalState, step: Array, key: Array, batch: Batch, frozen: PyTree
    ) -> tuple[LocalState, Metrics]:
        own: LocalState = jax.tree.map(lambda x: x[0], local)
        folded = jax.random.fold_in(jax.random.wrap_key_data(key), lax.axis_index(DATA))
        plain = state._replace(
            step=step, params=own.params, opt_state=own.opt_state, model_state=own.model_state,
            key=jax.random.key_data(folded), exchange=None, local=None,
        )  # fmt: skip
        new, metrics = function(plain, batch, frozen)
        after = LocalState(new.params, new.opt_state, new.model_state)
        return jax.tree.map(lambda x: x[None], after), _of_all(metrics)

    rows, whole = PartitionSpec(DATA), PartitionSpec()
    split = jax.shard_map(
        apart, mesh=mesh, in_specs=(rows, whole, whole, rows, whole), out_specs=(rows, whole),
        axis_names={DATA}, check_vma=False,
    )  # fmt: skip
    found: tuple[LocalState, Metrics] = split(local, state.step, state.key, batch, frozen)
    return found


def _of_all(metrics: Metrics) -> Metrics:
    def joined(name: str, x: Array) -> Array:
        if name.startswith("loss_scale"):
            return lax.pmin(x, DATA)
        return lax.pmax(x, DATA) if name in ("skipped", "stuck") else lax.pmean(x, DATA)

    return {name: joined(name, x) for name, x in metrics.items()}


def make_local_step(
    objective: Objective,
    inner: Optimizer,
    outer: Optimizer,
    diloco: DiLoCo,
    mesh: Mesh,
    shardings: TrainState,
    accumulate: int,
) -> TrainStep:
    """Returns the compiled step of replicas that train apart: an inner one, and an outer where due.

    Args:
      objective: of a replica's rows.
      inner: each replica's optimizer.
      outer: of the common weights.
      diloco: how often they are brought together.
      mesh: devices.
      shardings: of the state.
      accumulate: microbatches a step.
    """
    function = make_train_step(objective, inner, accumulate=accumulate).function
    held = placed(mesh, objective.frozen)

    def step(state: TrainState, batch: Batch, frozen: PyTree = held) -> tuple[TrainState, Metrics]:
        assert state.local is not None
        local, metrics = inner_steps(function, mesh, state, state.local, batch, frozen)
        bring = OuterStep(outer, ReplicaExchange.of(outer, mesh, state.params, shardings))
        common = state._replace(local=None)
        due = (state.step + 1) % diloco.every == 0
        common, local = lax.cond(
            due, lambda state, local: bring(state, local), lambda *same: same, common, local
        )
        # Of the replica that has skipped most: a run stops where one of them cannot go on.
        gate = jax.tree.map(lambda x: jnp.max(x, axis=0), local.opt_state.gate)
        opt_state = common.opt_state._replace(gate=gate)
        new = common._replace(step=state.step + 1, opt_state=opt_state, local=local)
        return new, metrics

    compiled = compile_step(step, mesh, shardings, held)
    return TrainStep(
        step, compiled, outer, mesh, shardings, accumulate, frozen=held, check=objective.check
    )
