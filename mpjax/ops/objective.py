"""An objective: a mean loss, and how many targets of a batch the mean is over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax.numpy as jnp

from mpjax.typing import (
    Array,
    Batch,
    Grads,
    Key,
    LossFn,
    LossModel,
    Metrics,
    ModelState,
    Params,
    PyTree,
)

# batch -> number of targets, or of several losses name -> number; None if rows count alike
Count: TypeAlias = Callable[[Batch], Array | dict[str, Array] | None]


class Terms(NamedTuple):
    """What a loss is the sum of.

    Args:
      losses: name -> loss; the loss is their sum.
      state: of the model.
      metrics: name -> float32 scalar that a step reports beside each loss of several; of
        microbatches the mean.
    """

    losses: dict[str, Array]
    state: ModelState
    metrics: dict[str, Array] = {}  # never changed


TermsFn: TypeAlias = Callable[..., Terms]  # takes what a loss function takes


class Combine(Protocol):
    """How the gradients of several losses become one, where that is not their sum.

    The step then pulls the gradients of each loss apart: one forward pass, a backward pass for
    each. They are float32, of all microbatches together and without a loss scale.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The losses, in the order in which `__call__` takes them."""

    @property
    def own_scales(self) -> bool:
        """Whether each loss has a loss scale of its own."""

    def init(self) -> PyTree:
        """Returns the state before the first step, arrays; None without any."""

    def __call__(
        self, grads: Sequence[Grads], losses: Array, key: Key, state: PyTree, /
    ) -> tuple[Grads, PyTree, Metrics]:
        """Returns the gradients of the step, the next state and metrics.

        Args:
          grads: of each loss.
          losses: their values, float32 (losses,).
          key: for random choices.
          state: of the last step; a skipped step leaves it as it was.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    r"""A mean loss, and how many targets of a batch the mean is over.

    `mpjax.train.make_train_step(accumulate=n)` takes
    $\sum_i n_i L_i \big/ \sum_i n_i$ of the microbatches, the mean of the whole batch. A sum of
    means over different targets has a count for each,
    $\sum_j \big(\sum_i n_{ij} L_{ij} \big/ \sum_i n_{ij}\big)$.

    Args:
      loss: `loss(params, batch, *, state, key, train) -> (loss, state)`.
      count: batch -> the number of targets, or the sum of their weights; None if rows count alike.
        With `terms`, name -> number.
      terms: takes what `loss` takes; returns the `Terms` whose sum is the loss.
      frozen: arrays that the loss reads and that are not trained, such as a teacher's weights;
        `loss` and `terms` then take `frozen=` too. The compiled step has them as an argument, not
        as constants of its program.
      init: key -> weights of the objective's own, such as projections, a dict of names that the
        model's weights do not have; `mpjax.train.build` trains them, in float32, beside the
        model's. None without any.
      takes_scale: whether `loss` and `terms` take `loss_scale=` too, the float32 scalar by which
        gradients that they take themselves are to be scaled.
      combine: how the gradients of the terms become one; None adds them, by one backward pass.
      average: decay b of a moving average of the weights, a <- b a + (1 - b) w after each step,
        which `TrainState.average` keeps in float32; `loss` and `terms` then take `average=` too, in
        the dtypes of the weights. None keeps none.
      check: called with each batch on the host before its step; raises a ConfigError for one that
        the loss cannot take, such as with ids that are no tokens. None checks nothing.

    Example:
      >>> def loss(params, batch, *, state=None, key=None, train=False):
      ...     total = jnp.sum(batch["weights"] * params * batch["x"])
      ...     return total / jnp.sum(batch["weights"]), state
      >>> objective = Objective(loss, weight_sum)
      >>> batch = {"x": jnp.ones(2), "weights": jnp.array([1.0, 0.5])}
      >>> float(objective(2.0, batch)[0]), float(objective.count(batch))
      (2.0, 1.5)
    """

    loss: LossFn
    count: Count
    terms: TermsFn | None = None
    frozen: PyTree = dataclasses.field(default=None, compare=False, repr=False)
    init: Callable[[Key], Params] | None = None
    takes_scale: bool = False
    combine: Combine | None = None
    average: float | None = None
    check: Callable[[Batch], None] | None = None

    @classmethod
    def of_model(cls, model: LossModel) -> Objective:
        """Returns a model's own `loss`, a mean by a batch's `weights` if it has any.

        A model may say more: `target_weight(batch)`, what it is a mean over, and
        `check_batch(batch)`.
        """
        count = getattr(model, "target_weight", weight_sum)
        return cls(model.loss, count, check=getattr(model, "check_batch", None))

    @classmethod
    def of_terms(
        cls,
        terms: TermsFn,
        count: Count,
        *,
        frozen: PyTree = None,
        init: Callable[[Key], Params] | None = None,
        takes_scale: bool = False,
        combine: Combine | None = None,
        average: float | None = None,
        check: Callable[[Batch], None] | None = None,
    ) -> Objective:
        """Returns the objective whose loss is the sum of its terms."""

        def loss(params: Params, batch: Batch, **options: PyTree) -> tuple[Array, ModelState]:
            found = terms(params, batch, **options)
            total: Any = sum(found.losses.values())
            return total, found.state

        return cls(loss, count, terms, frozen, init, takes_scale, combine, average, check)

    def bound(self, frozen: PyTree, average: Params | None = None) -> Objective:
        """Returns the objective with its frozen arrays and average in place, those it reads."""
        more: dict[str, PyTree] = {} if self.frozen is None else {"frozen": frozen}
        if self.average is not None:
            more["average"] = average
        if not more:
            return self
        loss: Any = self.loss  # which takes them too
        terms = self.terms and functools.partial(self.terms, **more)
        bound = functools.partial(loss, **more)
        return dataclasses.replace(self, loss=bound, terms=terms, frozen=None, average=None)

    def __call__(self, params: Params, batch: Batch, **options: object) -> tuple[Array, ModelState]:
        """Returns the loss and the state; an average is None here."""
        return self.bound(self.frozen).loss(params, batch, **options)  # type: ignore[arg-type]


def weight_sum(batch: Batch) -> Array | None:
    """Returns the sum of a batch's `weights`; None where it has none, and all count alike.

    Args:
      batch: name -> array.

    Example:
      >>> weight_sum({"targets": jnp.ones((2, 3))}) is None
      True
    """
    weights = batch.get("weights") if isinstance(batch, Mapping) else None
    return None if weights is None else jnp.sum(jnp.asarray(weights, jnp.float32))


def rows_alike(batch: Batch) -> None:
    """The count of a mean over the rows of a batch: all count alike.

    Example:
      >>> rows_alike({"x": jnp.ones(3)}) is None
      True
    """
    del batch
