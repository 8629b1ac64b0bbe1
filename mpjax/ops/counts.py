"""How many targets a mean loss is over: microbatches that are accumulated weigh by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

Loss = TypeVar("Loss", bound=Callable[..., Any])


def counted(
    count: Callable[[Any], Any], parts: Callable[..., tuple[dict[str, Any], Any]] | None = None
) -> Callable[[Loss], Loss]:
    r"""Says of a loss function how many targets of a batch its mean is over.

    `mpjax.train.make_train_step(accumulate=n)` then takes
    $\sum_i n_i L_i \big/ \sum_i n_i$ of the microbatches, the mean of the whole batch. A sum of
    means over different targets has a count for each,
    $\sum_j \big(\sum_i n_{ij} L_{ij} \big/ \sum_i n_{ij}\big)$.

    Args:
      count: batch -> the number of targets, or the sum of their weights; None if rows count alike.
        With `parts`, name -> number.
      parts: takes what the loss function takes; returns the parts whose sum is the loss, name ->
        loss, and the state.

    Returns:
      A decorator; it sets the attributes `count` and `parts`.

    Example:
      >>> @counted(lambda batch: jnp.sum(batch["weights"]))
      ... def loss(params, batch, *, state, key, train):
      ...     total = jnp.sum(batch["weights"] * params * batch["x"])
      ...     return total / jnp.sum(batch["weights"]), state
      >>> float(loss.count({"weights": jnp.array([1.0, 0.5])}))
      1.5
    """

    def mark(loss: Loss) -> Loss:
        loss.count, loss.parts = count, parts  # type: ignore[attr-defined]
        return loss

    return mark


def weight_sum(batch: Any) -> Any:
    """Returns the sum of a batch's `weights`; None where it has none, and all count alike.

    Args:
      batch: name -> array.

    Example:
      >>> weight_sum({"targets": jnp.ones((2, 3))}) is None
      True
    """
    weights = batch.get("weights") if isinstance(batch, Mapping) else None
    return None if weights is None else jnp.sum(jnp.asarray(weights, jnp.float32))
