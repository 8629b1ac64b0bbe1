"""One optimizer for the whole step: unscale, finite gate, clip, optimizer, weight update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax.errors import ConfigError, TrainingStopped, brief, explains_calls, is_whole
from mpjax.formats import is_quantized, weight_view
from mpjax.optim import checks, update_rules
from mpjax.optim.annealing.annealing import Annealing, Evaluate
from mpjax.optim.buffers import distinct
from mpjax.optim.gate import GateState, finite_by_leaf, leaf_path, no_update, record, select
from mpjax.optim.gradient_norm import global_norm
from mpjax.optim.loss_scale.from_settings import make_loss_scale
from mpjax.optim.loss_scale.loss_checks import check_function
from mpjax.optim.loss_scale.multi_loss import MultiLossScale
from mpjax.optim.loss_scale.scaled import ScaledGradients, bare, check_plain, check_scaled
from mpjax.optim.loss_scale.scalers import LossScale
from mpjax.optim.moments.low_moments import low_moments
from mpjax.optim.per_layer.layer_stacks import LAYERS
from mpjax.optim.per_layer.layer_view import each_layer
from mpjax.optim.pruning.magnitude import Pruned
from mpjax.optim.value_and_grad import Value, value_and_scaled_grad
from mpjax.precision import Precision, get_precision
from mpjax.typing import Array, ArrayLike, Grads, Metrics, Params, PyTree


class OptState(NamedTuple):
    """State of a wrapped optimizer: all arrays.

    Args:
      inner: the optax optimizer's state, moments in their storage dtypes.
      update_state: of the update rule: float32 copies, a count of draws, compensations, or empty.
      loss_scale: the loss scale, or a `MultiLossScale`; its settings are static.
      gate: skip counters.
    """

    inner: PyTree
    update_state: update_rules.UpdateState
    loss_scale: Any  # LossScale, or MultiLossScale with `wrap(..., losses=n)`
    gate: GateState


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What `wrap` returns; see there."""

    inner: optax.GradientTransformation | Annealing
    precision: Precision
    clip: float | None
    gate: bool
    patience: int
    seed: int = 0
    losses: int = 0

    def first_loss_scale(self, params: Params) -> LossScale | MultiLossScale:
        """Returns the loss scale before the first step, or those of several losses."""
        scale = make_loss_scale(self.precision.loss_scale, params)
        return (MultiLossScale([scale] * self.losses) if self.losses else scale).of_optimizer()

    def init(self, params: Params, seed: ArrayLike | None = None) -> OptState:
        """Returns the state for these weights.

        Args:
          params: weights as stored.
          seed: of stochastic rounding, if it is to be another than `wrap` was given.

        Raises:
          ConfigError: the weights' storage dtypes do not fit the update rule, a leaf is no array
            of floating-point numbers, or a wrapped optimizer lies inside this one.
        """
        seed = self.seed if seed is None else seed
        update_state = update_rules.init_update_state(params, self.precision.update, seed)
        full = update_rules.float32_view(params, update_state)
        if isinstance(self.inner, Annealing):
            inner: PyTree = self.inner.init(params, full, seed)
        else:
            inner = self.inner.init(full)
        nodes = jax.tree.leaves(inner, is_leaf=lambda x: isinstance(x, OptState))
        if any(isinstance(x, OptState) for x in nodes):
            raise ConfigError(
                "optimizer: a part of it is wrapped already; pass the raw optax optimizer, chained"
                " first and wrapped once"
            )
        scale = self.first_loss_scale(params)
        # Some optimizers keep the first weights: as arrays of their own, which may be donated.
        inner, update_state = distinct((inner, update_state), besides=params)
        return OptState(inner, update_state, scale, GateState.zero())

    def _advance(
        self, scaled: Grads, state: OptState, params: Params, extra: Mapping[str, object]
    ) -> tuple[Params, Grads, OptState, Metrics]:
        checks.check_state(state, OptState)
        exchanged: Any = extra.get("exchanged", False)
        each: Any = extra.get("finite_losses")
        own = ("exchanged", "finite_losses")
        extra = {name: value for name, value in extra.items() if name not in own}
        self._check_exchanged(exchanged, scaled)
        scaled = bare(scaled)
        checks.check_like("gradients", scaled, params)
        metrics: Metrics = {}
        unscaled = scaled if exchanged else state.loss_scale.unscale(scaled)
        finite_leaves = finite_by_leaf(unscaled) if self.gate else None
        grads = unscaled
        if self.clip is not None:
            grads, metrics["grad_norm"], factor = self._clipped(unscaled)
            if finite_leaves is not None:  # the norm is too large for a factor in float32: skip
                finite_leaves &= ~(jnp.all(finite_leaves) & (factor < 2.0**-126))
        new, found = self._moved(grads, state, params, extra)
        metrics |= found
        if finite_leaves is not None:
            finite = jnp.all(finite_leaves)
            still = (params, no_update(new[1]), state.inner, state.update_state)
            new = select(finite, new, still)
            told: Any = (finite, unscaled)
            if each is not None:  # where each is finite and not their sum, all scales are too large
                told = (jnp.where(jnp.all(each), finite, each),)
            gate = record(state.gate, finite_leaves, state.loss_scale.at_minimum(told[-1]))
            scale = state.loss_scale.adjust(*told)
            if (reads := self.reads_gradient(state)) is not True:  # zeros in its place say nothing
                scale = select(jnp.asarray(reads), scale, state.loss_scale)
            state = state._replace(gate=gate, loss_scale=scale)
            metrics["finite"] = finite
        new_params, updates, inner, update_state = new
        state = state._replace(inner=inner, update_state=update_state)
        return new_params, updates, state, metrics

    def _check_exchanged(self, exchanged: object, grads: Grads) -> None:
        """Checks that gradients are scaled, or the mean that the Precision asks for."""
        compression = self.precision.compression
        if exchanged is not (compression.kind != "none"):
            raise ConfigError(
                f"compression: {compression} is of replicas, whose gradients"
                " mpjax.train.build exchanges; in a loop of your own write"
                " Exchange(...).mean(opt_state.loss_scale.unscale(grads), state) inside a shard_map"
                " and step(..., exchanged=True), or set compression=none"
                if not exchanged
                else f"exchanged: {brief(exchanged)}, and the Precision compresses nothing; leave"
                " it out"
            )
        if exchanged:
            check_plain("step", grads)
        elif self.precision.loss_scale.kind != "none" and not self.losses:
            check_scaled(grads)

    def _clipped(self, grads: Grads) -> tuple[Grads, Array, Array]:
        """Gradients of at most the norm `clip`, the norm before, and their ratio."""
        norm = global_norm(grads)
        assert self.clip is not None
        factor = jnp.minimum(jnp.float32(1), self.clip / norm)
        return jax.tree.map(lambda g: g * factor, grads), norm, factor

    def _moved(
        self, grads: Grads, state: OptState, params: Params, extra: Mapping[str, object]
    ) -> tuple[tuple[Params, Grads, PyTree, update_rules.UpdateState], Metrics]:
        """New weights, updates, inner state and the update rule's, as if all were finite."""
        full = update_rules.float32_view(params, state.update_state)
        extra = {"grad": grads, **extra}
        evaluate: Any = extra.pop("evaluate", None)

        def write(updates: Grads) -> tuple[Params, update_rules.UpdateState]:
            return update_rules.apply_update_rule(
                updates, full, params, state.update_state, self.precision.update
            )

        # optax mixes float32 with weak Python scalars and int32 counts, which strict promotion
        # refuses; it is relaxed around this one call.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            if not isinstance(self.inner, Annealing):
                updates, inner = checks.update(self.inner, grads, state.inner, full, extra)
                new, rule = write(updates)
                return (new, updates, inner, rule), {}
            judged = None if evaluate is None else self._judged(evaluate, state.loss_scale)
            new, updates, inner, rule, metrics = self.inner.advance(
                grads, state.inner, full, params, state.update_state, write, judged, extra
            )
            return (new, updates, inner, rule), metrics

    def _judged(self, evaluate: Callable[..., Any], scale: LossScale) -> Evaluate:
        """The same with gradients that are unscaled and clipped, as those of the step are."""

        def judged(params: Params, with_gradient: bool) -> tuple[Array, Grads | None]:
            loss, grads = evaluate(params, with_gradient)
            if grads is None:
                return loss, None
            grads = scale.unscale(bare(grads))
            return loss, grads if self.clip is None else self._clipped(grads)[0]

        return judged

    def reads_gradient(self, state: OptState) -> bool | Array:
        """Returns whether the next step uses gradients; proposals of annealing may do without.

        Args:
          state: current state.
        """
        if isinstance(self.inner, Annealing):
            return self.inner.reads_gradient(state.inner)
        return True

    def value_and_grad(
        self, loss_fn: Callable[..., Value], *, has_aux: bool = False
    ) -> Callable[..., tuple[Value, ScaledGradients]]:
        r"""Transforms a loss into one that returns its value and the gradients that `step` takes.

        $$L(\theta),\quad \nabla_\theta\,(s\,L(\theta))$$ with the loss scale $s$ of the state.

        Args:
          loss_fn: `loss_fn(params, *args) -> loss` or `(loss, aux)`; a scalar loss.
          has_aux: whether it returns `(loss, aux)`.

        Returns:
          `fn(opt_state, params, *args) -> (value, grads)`; value is the unscaled loss in float32,
          or `(loss, aux)`; grads are `ScaledGradients`, a pytree. Weights stored in fp8 are given
          to the loss dequantised.

        Raises:
          ConfigError: no function; at the call, a state that is not of `init` or `step`, or what
            `scaled_grad` refuses.

        Example:
          >>> opt = wrap(optax.sgd(0.5), "fp16")
          >>> params = {"w": jnp.ones(2)}
          >>> state = opt.init(params)
          >>> loss, grads = opt.value_and_grad(lambda p: jnp.sum(p["w"]))(state, params)
          >>> params, state = opt.step(grads, state, params)
          >>> float(loss), params["w"].tolist()
          (2.0, [0.5, 0.5])
        """
        check_function(loss_fn)

        def fn(state: OptState, params: Params, *args: object) -> tuple[Value, ScaledGradients]:
            if not isinstance(state, OptState):
                raise ConfigError(
                    f"loss: the optimizer's state is {brief(state)}; write"
                    " opt.value_and_grad(loss_fn)(opt_state, params, ...)"
                )
            scale, weights = state.loss_scale, weight_view(params)
            value, grads = value_and_scaled_grad(loss_fn, has_aux, scale, weights, args)
            return value, ScaledGradients(grads)

        return fn

    def step_with_metrics(
        self, scaled_grads: Grads, state: OptState, params: Params, **extra: object
    ) -> tuple[Params, OptState, Metrics]:
        """Like `step`; also returns `grad_norm` (with clip) and `finite` (with gate)."""
        new_params, _, state, metrics = self._advance(scaled_grads, state, params, extra)
        return new_params, state, metrics

    def step(
        self, scaled_grads: Grads, state: OptState, params: Params, **extra: object
    ) -> tuple[Params, OptState]:
        """Takes one step.

        Args:
          scaled_grads: from `value_and_grad`, or `ScaledGradients(g)` with the gradients g of
            `state.loss_scale.scale(loss)`; without a loss scale any tree of gradients.
          state: from `init` or the last step.
          params: weights as stored.
          extra: what the optimizer asks of a step, such as `value` (the loss) of optax's
            `reduce_on_plateau`; `exchanged=True` where the Precision compresses gradients: they are
            unscaled, and the mean that `mpjax.optim.Exchange` returns.

        Raises:
          ConfigError: gradients of another structure or shape than params or, under a loss scale,
            not marked as scaled, a state that is not of this optimizer, or an argument of the
            optimizer that is missing.

        Returns:
          The new weights and state; at a non-finite step both are unchanged bit for bit, but for
          the loss scale and the skip counters.
        """
        return self.step_with_metrics(scaled_grads, state, params, **extra)[:2]

    def as_optax(self) -> optax.GradientTransformationExtraArgs:
        """Returns an optax transformation from scaled gradients to float32 deltas.

        Add the deltas with `mpjax.optim.apply_updates`, which keeps the weights' storage dtype. A
        skipped step leaves the weights bit for bit, and the state is always `step`'s. The weights
        are `step`'s up to the rounding of the delta: XLA may fuse `step`'s last product into its
        sum. Under `master` such a difference is gone at the next step.
        """

        if isinstance(self.inner, Annealing):
            raise ConfigError(
                "as_optax: annealing judges new weights as they are stored; use Optimizer.step"
            )

        def update(
            grads: Grads, state: OptState, params: Params = None, **extra: object
        ) -> tuple[Grads, OptState]:
            if params is None:
                raise ConfigError("update: params are missing; call update(grads, state, params)")
            if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
                raise ConfigError(
                    "as_optax: weights stored in fp8 have scales, which no delta can renew; use"
                    " Optimizer.step"
                )
            new_params, updates, state, _ = self._advance(grads, state, params, extra)
            if state.update_state:  # the weight does not follow its own update, rounded to nearest
                updates = jax.tree.map(update_rules.delta, new_params, params, updates)
            return updates, state

        return Wrapped(self.init, update)

    def check_alive(self, state: OptState, params: PyTree, stuck: int | None = None) -> None:
        """Stops a run that cannot recover.

        Args:
          state: current state; read on the host.
          params: weights, or any tree of their structure.
          stuck: `state.gate.stuck`, if the caller has fetched it.

        Raises:
          TrainingStopped: `patience` non-finite steps in a row at the smallest loss scale.
        """
        stuck = int(state.gate.stuck) if stuck is None else stuck
        if self.gate and stuck >= self.patience:
            path = leaf_path(
                update_rules.map_weights(lambda _: 0, params), int(state.gate.bad_leaf)
            )
            lowest = float(np.min(state.loss_scale.value))
            raise TrainingStopped(
                f"{path}: gradient is not finite, {stuck} steps in a row, and the loss scale"
                f" {lowest:g} cannot fall further; lower the learning rate"
                f" or give this path more range, such as --rule '**/{path.split('/')[-2:][0]}=fp32'"
            )


class Wrapped(optax.GradientTransformationExtraArgs):
    """Marks what `Optimizer.as_optax` returns, so that it is not wrapped twice."""


@explains_calls
def wrap(
    optimizer: optax.GradientTransformation | optax.MultiSteps | Annealing | Optimizer,
    precision: str | Precision,
    *,
    clip: int | float | None = None,
    gate: bool = True,
    patience: int = 50,
    seed: int = 0,
    stacked: str | Sequence[str] = LAYERS,
    losses: int = 0,
) -> Optimizer:
    r"""Wraps an optax optimizer once: unscale -> finite gate -> clip -> optimizer -> weights.

    All in float32: $g \leftarrow g / s$; if any $g$ is not finite the step is skipped;
    $g \leftarrow g \min(1, c / \|g\|_2)$; the optimizer's update is added to the float32 view of
    the weights, and the update rule writes them in their storage dtype.

    Args:
      optimizer: a raw optax optimizer, schedule included, or `mpjax.optim.annealing`.
      precision: a Precision, or what `get_precision` reads, such as `bf16`; its loss scale, update
        rule and moments are used.
      clip: largest global gradient norm $c$, or None.
      gate: whether a non-finite step is skipped.
      patience: non-finite steps in a row, at the smallest scale, after which `check_alive` raises.
      seed: of stochastic rounding.
      stacked: path patterns of subtrees whose arrays have a leading axis of layers, as below
        `layers` in our models. An optimizer that reads shapes (Muon, LAMB, a mask by `ndim`) sees
        each layer as weights of its own.
      losses: how many losses have a loss scale each, of the Precision's kind; 0 is one scale for
        all. `step` then takes the unscaled sum of their gradients, and `finite_losses=`, a bool for
        each.

    Returns:
      An Optimizer: `init(params) -> state` and `step(grads, state, params) -> params, state`.

    Raises:
      ConfigError: no optimizer or one that is wrapped already, a Precision that cannot be read, a
        clip that is not positive, or a dynamic loss scale without the gate.

    Example:
      >>> from mpjax.precision import get_precision
      >>> opt = wrap(optax.sgd(0.5), get_precision("fp16"))
      >>> params = {"w": jnp.ones(2)}
      >>> state = opt.init(params)
      >>> _, grads = opt.value_and_grad(lambda p: jnp.sum(p["w"]))(state, params)
      >>> opt.step(grads, state, params)[0]["w"].tolist()
      [0.5, 0.5]
    """
    precision = get_precision(precision)
    checks.check_seed(seed)
    checks.check_whole("optimizer", "losses", losses, 0)
    if isinstance(optimizer, Optimizer | Wrapped):
        raise ConfigError(
            "optimizer: it is wrapped already; pass the raw optax optimizer, it is wrapped once"
        )
    if isinstance(optimizer, Pruned) and precision.update == "kahan":
        raise ConfigError(
            "prune: update=kahan adds its compensation to the zero of a pruned weight; set"
            " update=master or update=stochastic"
        )
    if clip is not None and not (checks.is_number(clip) and clip > 0):
        raise ConfigError(f"clip: {brief(clip)} is not positive; leave it out or write clip=1.0")
    if not is_whole(patience, 1):
        raise ConfigError(f"patience: {brief(patience)} is not positive; give at least 1")
    if not gate and precision.loss_scale.kind not in ("none", "static"):
        raise ConfigError(
            f"gate: a {precision.loss_scale.kind} loss scale needs the finite gate; leave gate on"
            " or set loss_scale=static:SCALE"
        )

    def lowered(
        optimizer: optax.GradientTransformation | optax.MultiSteps,
    ) -> optax.GradientTransformation:
        optimizer = checks.as_transformation(optimizer)
        if not isinstance(optimizer, Pruned):  # which applies each_layer to the optimizer inside it
            optimizer = each_layer(optimizer, stacked)
        return low_moments(optimizer, precision.moments)

    if not isinstance(optimizer, Annealing):
        return Optimizer(lowered(optimizer), precision, clip, gate, patience, seed, losses)
    if optimizer.descent is not None:
        optimizer = dataclasses.replace(optimizer, descent=lowered(optimizer.descent))
    return Optimizer(optimizer, precision, clip, gate, patience, seed, losses)
