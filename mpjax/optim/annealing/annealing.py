"""Simulated annealing inside the train step: weights are proposed, and accepted by their loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.optim import checks
from mpjax.optim.annealing.cooling import Cooling
from mpjax.optim.annealing.proposals import Proposal, updates_of
from mpjax.optim.gate import no_update, select
from mpjax.optim.pruning.magnitude import Pruned
from mpjax.optim.update_rules import PRNG, float32_view
from mpjax.typing import Array, ArrayLike, Grads, Metrics, Params, PyTree

# updates -> the weights as stored, and the update rule's state
Write = Callable[[Grads], tuple[Params, PyTree]]
# (weights as stored, whether gradients too) -> loss, gradients as `Write` takes them or None
Evaluate = Callable[[Params, bool], tuple[Array, Grads | None]]


class AnnealState(NamedTuple):
    """State of annealing; every leaf is an array.

    Args:
      step: steps taken, of both kinds.
      age: proposals since the start or the last reheating.
      proposed: proposals so far.
      accepted: of them, those that were accepted.
      rejected: rejections in a row.
      best_loss: the lowest loss so far, each on the batch of its step.
      best: the weights that had it, as stored; None where they are not kept.
      proposal: of the proposal.
      descent: of the optimizer between the proposals, None without one.
      key: raw key data.
    """

    step: Array
    age: Array
    proposed: Array
    accepted: Array
    rejected: Array
    best_loss: Array
    best: Params | None
    proposal: PyTree
    descent: PyTree
    key: Array


def _always(step: Array) -> Array:
    del step
    return jnp.bool_(True)


@dataclasses.dataclass(frozen=True)
class Annealing:
    """What `annealed`, `alternate` and `anneal_then_descend` return; `wrap` and `build` take it."""

    proposal: Proposal
    cooling: Cooling
    metropolis: bool
    reheat: int
    keep_best: bool
    seed: int
    descent: optax.GradientTransformation | None = None
    anneals: Callable[[Array], Array] = _always  # step -> whether it is a proposal

    def init(self, params: Params, full: Params, seed: ArrayLike) -> AnnealState:
        """Returns the state before the first step.

        Args:
          params: the weights as stored.
          full: their float32 view.
          seed: of proposals and decisions.
        """
        key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), self.seed)
        zero = jnp.int32(0)
        return AnnealState(
            step=zero,
            age=zero,
            proposed=zero,
            accepted=zero,
            rejected=zero,
            best_loss=jnp.float32(jnp.inf),
            best=params if self.keep_best else None,
            proposal=self.proposal.init(full),
            descent=None if self.descent is None else self.descent.init(full),
            key=jax.random.key_data(key),
        )

    def reads_gradient(self, state: AnnealState) -> bool | Array:
        """Returns whether this step uses the gradients that it is given."""
        if self.proposal.gradient or self.descent is None:
            return self.proposal.gradient
        return ~self.anneals(state.step)

    def advance(
        self, grads: Grads, state: AnnealState, full: Params, params: Params, update_state: PyTree,
        write: Write, evaluate: Evaluate | None, extra: dict[str, Any],
    ) -> tuple[Params, Grads, AnnealState, PyTree, Metrics]:  # fmt: skip
        r"""Takes one step: a proposal that is accepted or not, or one of the descent.

        A proposal $\theta'$ is accepted with probability $\min(1, \alpha)$,
        $$\ln \alpha = -\frac{L(\theta') - L(\theta)}{T} + \ln q(\theta | \theta') - \ln q(\theta' |
        \theta),$$ where both losses are float32, of one batch and one dropout key, and of weights
        as they are stored.

        Args:
          grads: unscaled and clipped.
          state: from `init` or the last step.
          full: float32 view of the weights.
          params: the weights as stored.
          update_state: of the update rule.
          write: stores updates by the update rule.
          evaluate: judges stored weights.
          extra: `value`, the loss; the rest is the optimizer's.

        Raises:
          ConfigError: there is no value or no function to evaluate.
        """
        if evaluate is None or "value" not in extra:
            raise ConfigError(
                "annealing: a step needs the loss and a function to judge new weights; train with"
                " mpjax.train.make_train_step or build, or write step(grads, state, params,"
                " value=loss, evaluate=fn)"
            )
        judge, value = evaluate, jnp.asarray(extra["value"], jnp.float32)
        value = jnp.where(jnp.isfinite(value), value, jnp.inf)  # anything finite is better
        temperature = jnp.asarray(self.cooling(state.age), jnp.float32)

        def propose() -> tuple[Any, ...]:
            key = jax.random.wrap_key_data(state.key, impl=PRNG)
            draws, decides = jax.random.split(jax.random.fold_in(key, state.proposed))
            updates, proposal = self.proposal.draw(
                grads, state.proposal, full, draws, temperature, extra
            )
            checks.check_updates(updates, full)
            new, rule = write(updates)
            accepted, loss = jnp.bool_(True), value
            if self.metropolis:
                density = self.proposal.log_density
                loss, other = judge(new, density is not None)
                loss = loss.astype(jnp.float32)
                ratio = (value - loss) / jnp.maximum(temperature, jnp.float32(1e-30))
                if density is not None:
                    there = float32_view(new, rule)
                    ratio += density(there, full, other, temperature)
                    ratio -= density(full, there, grads, temperature)
                # log of a number in (0, 1]: a ratio of 0 is always accepted
                threshold = jnp.log1p(-jax.random.uniform(decides))
                accepted = jnp.isfinite(loss) & (threshold <= ratio)
                new, updates, proposal, rule = select(
                    accepted,
                    (new, updates, proposal, rule),
                    (params, no_update(updates), state.proposal, update_state),
                )
            rejected = jnp.where(accepted, 0, state.rejected + 1)
            again = (rejected >= self.reheat) if self.reheat else jnp.bool_(False)
            moved = state._replace(
                age=jnp.where(again, 0, state.age + 1),
                proposed=state.proposed + 1,
                accepted=state.accepted + accepted,
                rejected=jnp.where(again, 0, rejected),
                proposal=proposal,
            )
            won = accepted & self.metropolis  # whose loss is known
            return new, updates, rule, moved, won, jnp.where(won, loss, value)

        def descend() -> tuple[Any, ...]:
            assert self.descent is not None
            updates, descent = checks.update(self.descent, grads, state.descent, full, extra)
            new, rule = write(updates)
            return new, updates, rule, state._replace(descent=descent), jnp.bool_(False), value

        if self.descent is None:
            found = propose()
        else:
            found = jax.lax.cond(self.anneals(state.step), propose, descend)
        new, updates, rule, moved, won, loss = found
        better = loss < state.best_loss
        best = state.best
        if self.keep_best:
            best = select(better, select(won, new, params), best)
        moved = moved._replace(
            step=state.step + 1, best=best, best_loss=jnp.where(better, loss, state.best_loss)
        )
        metrics = {
            "temperature": temperature,
            "acceptance": moved.accepted / jnp.maximum(moved.proposed, 1),
            "best_loss": moved.best_loss,
        }
        return new, updates, moved, rule, metrics


def annealed(
    proposal: Proposal | optax.GradientTransformation,
    cooling: Cooling,
    *,
    metropolis: bool = True,
    reheat: int = 0,
    keep_best: bool = True,
    seed: int = 0,
) -> Annealing:
    r"""Returns simulated annealing of weights, for `mpjax.optim.wrap` and `mpjax.train.build`.

    Each step proposes new weights and accepts them with probability $\min(1, e^{-(L' - L) / T})$;
    what is rejected leaves every bit of weights, moments and update rule. A proposal whose loss is
    not finite is rejected.

    Args:
      proposal: `gaussian`, `langevin`, `random_rate`, or a raw optax optimizer.
      cooling: proposals -> temperature: `affine`, `logarithmic`, `cosine`, any optax schedule.
      metropolis: whether proposals are judged; False takes all (`langevin` is then SGLD).
      reheat: rejections in a row after which the cooling begins anew; 0 never.
      keep_best: whether the weights of the lowest loss are kept, `opt_state.inner.best`.
      seed: of proposals and decisions, beside that of the run.

    Raises:
      ConfigError: no proposal, no cooling, or a count that is none.

    Example:
      >>> from mpjax.optim import wrap
      >>> from mpjax.optim.annealing import affine, gaussian
      >>> opt = wrap(annealed(gaussian(0.1), affine(1.0, 0.9)), "fp32")
      >>> loss = lambda w: jnp.sum(w**2)
      >>> w = jnp.ones(3)
      >>> state = opt.init(w)
      >>> w, state = opt.step(
      ...     jnp.zeros(3), state, w, value=loss(w), evaluate=lambda w, _: (loss(w), None)
      ... )
      >>> int(state.inner.proposed)
      1

    References:
      Kirkpatrick et al. 1983, Optimization by Simulated Annealing; Metropolis et al. 1953.
    """
    if not isinstance(proposal, Proposal):
        proposal = updates_of(proposal)
    if not callable(cooling):
        raise ConfigError(
            f"cooling: {brief(cooling)} is no function of the number of proposals; write"
            " affine(1.0, 0.999)"
        )
    if not is_whole(reheat, 0):
        raise ConfigError(f"reheat: {brief(reheat)} is not a whole number of 0 or above")
    checks.check_seed(seed)
    return Annealing(proposal, cooling, bool(metropolis), reheat, bool(keep_best), seed)


def _hybrid(
    annealing: Annealing,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    anneals: Callable[[Array], Array],
) -> Annealing:
    if not isinstance(annealing, Annealing) or annealing.descent is not None:
        raise ConfigError(
            f"annealing: {brief(annealing)} is not what annealed(proposal, cooling) returns"
        )
    optimizer = checks.as_transformation(optimizer)
    if isinstance(optimizer, Pruned):
        raise ConfigError(
            "annealing: a proposal moves pruned weights away from 0; anneal first, and prune then"
        )
    return dataclasses.replace(annealing, descent=optimizer, anneals=anneals)


def alternate(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    annealing: Annealing,
    *,
    descend: int,
    anneal: int,
) -> Annealing:
    """Returns `descend` steps of an optimizer, then `anneal` proposals, and so on.

    Proposals that read no gradient do without the backward pass.

    Args:
      optimizer: a raw optax optimizer; its moments stand still at proposals.
      annealing: from `annealed`.
      descend: gradient steps in a row.
      anneal: proposals in a row.

    Raises:
      ConfigError: no optimizer, no annealing, or counts below 1.

    Example:
      >>> from mpjax.optim.annealing import affine, gaussian
      >>> cooling = affine(1.0, 0.99)
      >>> both = alternate(optax.adam(1e-3), annealed(gaussian(0.01), cooling), descend=3, anneal=1)
      >>> [bool(both.anneals(jnp.int32(step))) for step in range(5)]
      [False, False, False, True, False]
    """
    for name, value in (("descend", descend), ("anneal", anneal)):
        checks.check_whole("annealing", name, value, 1)
    return _hybrid(annealing, optimizer, lambda step: step % (descend + anneal) >= descend)


def anneal_then_descend(
    annealing: Annealing,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    after: int,
) -> Annealing:
    """Returns `after` proposals, and then steps of an optimizer.

    Args:
      annealing: from `annealed`.
      optimizer: a raw optax optimizer.
      after: proposals before the first gradient step.

    Raises:
      ConfigError: no optimizer, no annealing, or a count below 1.

    Example:
      >>> from mpjax.optim.annealing import affine, gaussian
      >>> cooling = affine(1.0, 0.99)
      >>> both = anneal_then_descend(annealed(gaussian(0.1), cooling), optax.sgd(0.1), after=2)
      >>> [bool(both.anneals(jnp.int32(step))) for step in range(4)]
      [True, True, False, False]
    """
    checks.check_whole("annealing", "after", after, 1)
    return _hybrid(annealing, optimizer, lambda step: step < after)
