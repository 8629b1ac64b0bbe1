"""Gradients that replicas take apart and exchange in the form that a Precision names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.formats import is_quantized
from mpjax.ops import Objective
from mpjax.optim import GateState, Optimizer, OptState, finite_by_leaf, global_norm, weight_view
from mpjax.optim.annealing.annealing import Annealing
from mpjax.optim.compression import Exchange, ExchangeState, compressed_paths
from mpjax.paths import leaves_with_names, path_name
from mpjax.train.gradients import Judged, Replicas, gradients
from mpjax.typing import Array, Batch, Grads, Params, PyTree

if TYPE_CHECKING:
    from mpjax.train.step import TrainState

DATA = "data"  # the mesh axis that tells replicas apart


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)


def _lifted(state: ExchangeState) -> ExchangeState:
    """A replica's state as one of many: what it holds has an axis of replicas.

    Factors of parts of a weight, which need no common shape, have one of devices besides.
    """
    residual, momentum = ({n: x[None] for n, x in part.items()} for part in state[:2])
    basis = {n: x[None, None] for n, x in state.basis.items()}
    return ExchangeState(residual, momentum, basis, state.steps)


def _lowered(state: ExchangeState) -> ExchangeState:
    """Undoes `_lifted`."""
    residual, momentum = ({n: x[0] for n, x in part.items()} for part in state[:2])
    basis = {n: x[0, 0] for n, x in state.basis.items()}
    return ExchangeState(residual, momentum, basis, state.steps)


def exchange_spec(path: str, weight: PartitionSpec) -> PartitionSpec:
    """Returns how a leaf of the state of all replicas is cut.

    Args:
      path: its path in an `ExchangeState`, such as `residual/decoder/embed/table`.
      weight: how the weight that it belongs to is cut.
    """
    part = path.split("/")[0]
    if part == "steps":
        return PartitionSpec()
    cut = (("fsdp", "tensor"),) if part == "basis" else weight
    return PartitionSpec(DATA, *cut)


def check_replicas(optimizer: Optimizer, mesh: Mesh | None, objective: Objective) -> None:
    """Checks that there are replicas that can take gradients apart, where a Precision asks for it.

    Raises:
      ConfigError: one replica, or an optimizer or objective that needs the whole batch's gradients.
    """
    compression = optimizer.precision.compression
    if compression.kind == "none":
        return
    Exchange(compression, DATA, 1 if mesh is None else mesh.shape[DATA])  # refuses a single one
    if isinstance(optimizer.inner, Annealing):
        raise ConfigError(
            "compression: annealing judges weights on the whole batch, and replicas take theirs"
            " apart; set compression=none"
        )
    if objective.combine is not None:
        raise ConfigError(
            "compression: the objective combines the gradients of several losses, those of the"
            " whole batch; leave combine out, or set compression=none"
        )


def whole_batch_only(params: Params) -> Array:
    """Stands for the loss at other weights, which replicas do not take.

    Raises:
      ConfigError: always.
    """
    raise ConfigError(
        "compression: the optimizer asks for the loss at other weights, of the whole batch; take"
        " one that does not search a line, or set compression=none"
    )


@dataclasses.dataclass(frozen=True)
class ReplicaExchange:
    """Takes each replica's gradients and their compressed mean.

    Args:
      exchange: of a replica's own numbers.
      mesh: the mesh; the axis `data` tells replicas apart, the others cut each.
      specs: how the weights are cut, in their structure.
      clip: largest norm of the mean gradient, or None.
    """

    exchange: Exchange
    mesh: Mesh
    specs: PyTree
    clip: float | None

    @classmethod
    def of(
        cls, optimizer: Optimizer, mesh: Mesh | None, params: Params, shardings: TrainState | None
    ) -> ReplicaExchange | None:
        """Returns the exchange of an optimizer's Precision, None where nothing is compressed.

        Args:
          optimizer: from `mpjax.optim.wrap`.
          mesh: devices; None is one.
          params: weights as stored, or their shapes.
          shardings: of the state.
        """
        compression = optimizer.precision.compression
        if compression.kind == "none" or mesh is None or shardings is None:
            return None
        paths = compressed_paths(jax.eval_shape(weight_view, params), compression)
        exchange = Exchange(compression, DATA, mesh.shape[DATA], paths)
        held = jax.tree.map(
            lambda x: x.values if is_quantized(x) else x, shardings.params, is_leaf=is_quantized
        )
        return cls(exchange, mesh, jax.tree.map(lambda x: x.spec, held), optimizer.clip)

    def init(self, params: Params) -> ExchangeState:
        """Returns the state of all replicas before the first step.

        Args:
          params: weights as stored.
        """
        view = weight_view(params)
        specs = self._state_specs(view)
        split = jax.shard_map(
            lambda p: _lifted(self.exchange.init(p)), mesh=self.mesh, in_specs=(self.specs,),
            out_specs=specs, check_vma=False,
        )  # fmt: skip
        found: ExchangeState = split(view)
        return found

    def _state_specs(self, view: Params) -> ExchangeState:
        names = [name for name, _ in leaves_with_names(view)]
        specs = dict(zip(names, jax.tree.leaves(self.specs, is_leaf=_is_spec), strict=True))

        def spec(path: jax.tree_util.KeyPath, leaf: object) -> PartitionSpec:
            name = path_name(path)
            return exchange_spec(name, specs.get(name.partition("/")[2], PartitionSpec()))

        shapes = jax.eval_shape(self.exchange.init, view)
        found: ExchangeState = jax.tree_util.tree_map_with_path(spec, shapes)
        return found

    def gradients(
        self,
        bound: Callable[[PyTree, Params | None], Objective],
        state: TrainState,
        batch: Batch,
        accumulate: int,
        frozen: PyTree,
        average: Params | None,
    ) -> tuple[Grads, Judged, ExchangeState]:
        """Returns the mean of the unscaled gradients, what was judged, and the next state.

        A number that is not finite in one replica makes its weight's gradient NaN in all; the
        state that comes with it is not to be used.

        Args:
          bound: the objective of its frozen arrays and of the moving average.
          state: of the step.
          batch: of all replicas.
          accumulate: microbatches of each.
          frozen: see `Objective`.
          average: see `Objective`.
        """
        replicas = Replicas(DATA, self.exchange.replicas)
        scale = state.opt_state.loss_scale
        # What gradients depend on: moments need not enter.
        slim = state._replace(
            opt_state=OptState((), {}, scale, GateState.zero()), average=None, exchange=None
        )

        def apart(
            state: TrainState, batch: Batch, frozen: PyTree, average: Params | None
        ) -> tuple[Grads, Judged]:
            objective = bound(frozen, average)
            grads, judged = gradients(objective, state, batch, accumulate, replicas)
            return jax.tree.map(lambda g: g[None], grads), judged

        whole, rows = PartitionSpec(), PartitionSpec(DATA)
        split = jax.shard_map(
            apart, mesh=self.mesh, in_specs=(whole, rows, whole, whole), out_specs=(rows, whole),
            axis_names={DATA}, check_vma=False,
        )  # fmt: skip
        stacked, judged = split(slim, batch, frozen, average)
        stacked = scale.unscale(stacked)
        finite = finite_by_leaf(stacked)  # of all replicas, before anything is rounded
        if state.exchange is None:
            raise ConfigError(
                "state: the Precision compresses gradients, and the state keeps nothing of them;"
                " take mpjax.train.build, or pass exchange= to init_state"
            )
        means, exchanged = self.mean(self._clipped(stacked), state.exchange)
        leaves, tree = jax.tree.flatten(means)
        pairs = zip(finite, leaves, strict=True)
        marked = [jnp.where(ok, g, jnp.float32(jnp.nan)) for ok, g in pairs]
        return jax.tree.unflatten(tree, marked), judged, exchanged

    def _clipped(self, stacked: Grads) -> Grads:
        r"""Gradients by one factor for all replicas, so that no residual takes up what is clipped.

        $$f = \min(1, 2 c \sqrt N / r), \quad r^2 = \frac{1}{N} \sum_i \|g_i\|^2$$ Where errors of
        replicas are independent, $r$ is at most $\sqrt N$ times the norm of the mean, about: the
        mean is left at least as long as $c$, and the optimizer, which clips it to $c$, takes the
        step that it would have taken. (Lin et al. 2018, section 3.2, clip each replica alone.)
        """
        if self.clip is None:
            return stacked
        largest = jnp.float32(2 * self.clip * self.exchange.replicas)
        factor = jnp.minimum(jnp.float32(1), largest / global_norm(stacked))
        return jax.tree.map(lambda g: g * factor, stacked)

    def mean(self, stacked: Grads, state: ExchangeState) -> tuple[Grads, ExchangeState]:
        """Returns the mean over replicas, alike in all, and the next state.

        Args:
          stacked: float32, each with a first axis of replicas.
          state: of all replicas.
        """
        view = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), stacked)
        held = self._state_specs(view)
        rows = jax.tree.map(lambda s: PartitionSpec(DATA, *s), self.specs, is_leaf=_is_spec)

        def own(stacked: Grads, state: ExchangeState) -> tuple[Grads, ExchangeState]:
            grads = jax.tree.map(lambda g: g[0], stacked)
            means, state = self.exchange.mean(grads, _lowered(state))
            return means, _lifted(state)

        split = jax.shard_map(
            own, mesh=self.mesh, in_specs=(rows, held), out_specs=(self.specs, held),
            check_vma=False,
        )  # fmt: skip
        found: tuple[Grads, ExchangeState] = split(stacked, state)
        return found
