"""What BERT is pre-trained on, both at once: masked tokens and next sentences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.formats.checks import batch_rows
from mpjax.models import Encoder
from mpjax.models.core.batch_fields import check_batch, encoder_batch
from mpjax.models.core.checks import each_batch, field
from mpjax.tasks.labels import Outputs, encoder_fn, label_loss, target_weight
from mpjax.tasks.mixture.task_gradients import gradient_shares
from mpjax.typing import Array, Batch, ModelState, Params, PyTree


@dataclasses.dataclass(frozen=True)
class MaskedLanguage:
    r"""Masked tokens and next sentences, $L = w_m L_m + w_n L_n$.

    A batch holds `labels` (B, T) for the masked tokens and `next` (B,) for the sentences. Each loss
    is the mean over targets of its own, however the batch is cut into microbatches.

    Args:
      masked: $w_m$.
      next: $w_n$; 0 leaves the second task out, and `next` may be absent.
      outputs: names of the model's outputs that hold the logits, (B, T, V) and (B, 2).
      loss: path whose policy both losses take.

    Raises:
      ConfigError: a weight that is negative or not finite, or both zero.

    References:
      Devlin et al. 2019, BERT, section 3.1.
    """

    masked: float = 1.0
    next: float = 1.0
    outputs: tuple[str, str] = ("masked", "next")
    loss: str = "encoder/loss"

    def __post_init__(self) -> None:
        weights = (self.masked, self.next)
        if not all(0 <= w < math.inf for w in weights) or not any(weights):
            raise ConfigError(
                f"weights: masked={self.masked:g} next={self.next:g}; give finite weights of 0 or"
                " above, one of them positive"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight of each task that has one."""
        both = {"masked": self.masked, "next": self.next}
        return {name: weight for name, weight in both.items() if weight}

    _labels: ClassVar[dict[str, str]] = {"masked": "labels", "next": "next"}

    def _pairs(
        self, model: Encoder
    ) -> Callable[..., tuple[dict[str, tuple[Array, Array]], ModelState]]:
        outputs = dict(zip(self._labels, self.outputs, strict=True))

        def pairs(found: Outputs, batch: Batch) -> dict[str, tuple[Array, Array]]:
            return {
                name: (found[outputs[name]], field(batch, self._labels[name], self.loss))
                for name in self.weights
            }

        return encoder_fn(model, pairs)

    def losses(self, model: Encoder) -> Callable[..., tuple[dict[str, Array], ModelState]]:
        """Returns a function to the loss of each task, by name and without its weight."""
        policy, pairs_fn = model.precision.policy(self.loss), self._pairs(model)

        def losses_fn(*args: PyTree, **options: PyTree) -> tuple[dict[str, Array], ModelState]:
            found, state = pairs_fn(*args, **options)
            return {name: label_loss(*pair, policy) for name, pair in found.items()}, state

        return losses_fn

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`."""
        losses_fn = self.losses(model)

        def count(batch: Batch) -> dict[str, Array]:
            batch = encoder_batch(batch)
            return {
                name: target_weight(field(batch, self._labels[name], self.loss))
                for name in self.weights
            }

        def terms(params: Params, batch: Batch, **options: PyTree) -> ops.Terms:
            losses, state = losses_fn(params, batch, **options)
            weighted = {name: weight * losses[name] for name, weight in self.weights.items()}
            return ops.Terms(weighted, state)

        return ops.Objective.of_terms(terms, count, check=getattr(model, "check_batch", None))

    def judge(
        self, model: Encoder
    ) -> Callable[..., tuple[dict[str, float], dict[str, np.ndarray]]]:
        """Returns a function (params, batches) -> scores, and which targets are right.

        Scores are by target, whatever batch it is in: `masked` and `next` are the mean losses,
        `masked accuracy` and `next accuracy` in 0 ... 1; which are right is bool, (targets,). A
        label that is no class, nor `IGNORE`, gives NaN.
        """
        policy, pairs_fn = model.precision.policy(self.loss), self._pairs(model)

        @jax.jit
        def measure(params: Params, batch: Batch) -> dict[str, tuple[Array, Array, Array]]:
            return {
                name: (
                    label_loss(logits, labels, policy),
                    jnp.argmax(logits, -1) == labels,
                    jnp.any((labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[-1]))),
                )
                for name, (logits, labels) in pairs_fn(params, batch)[0].items()
            }

        def evaluate(
            params: Params, batches: Sequence[Batch]
        ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
            batches = list(each_batch(batches, "judge"))
            if not batches:
                raise ConfigError("batches: none to judge; name more held-out data")
            for batch in batches:
                batch_rows(batch, "judge")
                check_batch(model, batch)
            batches = list(map(encoder_batch, batches))
            found = [jax.device_get(measure(params, batch)) for batch in batches]
            scores, right = {}, {}
            for name in self.weights:
                parts = [
                    np.ravel(one[name][1])[np.ravel(batch[self._labels[name]]) != IGNORE]
                    for one, batch in zip(found, batches, strict=True)
                ]
                right[name] = np.concatenate(parts)
                if not len(right[name]):
                    raise ConfigError(f"batches: no target of {name}; name more held-out data")
                counts = np.array([len(part) for part in parts])
                losses = np.array([one[name][0] for one in found], np.float64)
                scores[name] = float(losses @ counts / counts.sum())
                # A label that is no class has no loss, and is neither right nor wrong.
                wrong = any(one[name][2] for one in found)
                scores[f"{name} accuracy"] = math.nan if wrong else float(right[name].mean())
            return scores, right

        return evaluate

    def gradient_shares(self, model: Encoder) -> Callable[[Params, Batch], dict[str, float]]:
        """Returns a function (params, batch) -> what each task adds to the gradient.

        Of the weighted losses, without dropout; see `mpjax.tasks.gradient_shares`.
        """
        terms: Any = self.objective(model).terms
        return gradient_shares(lambda params, batch: terms(params, batch).losses)
