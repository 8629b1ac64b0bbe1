"""Mixup: texts and their classes, two by two.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError, brief
from mpjax.models import Encoder
from mpjax.models.core.checks import field
from mpjax.tasks.classify import TextClassification
from mpjax.tasks.labels import encoder_inputs, label_loss, target_weight
from mpjax.typing import Array, Batch, Key, ModelState, Params


@dataclasses.dataclass(frozen=True)
class Mixup:
    r"""The task of a classifier that learns from mixtures of two encoded texts.

    Row $i$ of a batch meets row $j$, the one before it, with $\lambda_i \sim
    \text{Beta}(\alpha, \alpha)$:
    $$L_i = \lambda_i\,\ell(m_i, y_i) + (1 - \lambda_i)\,\ell(m_i, y_j), \quad
    m_i = W(\lambda_i h_i + (1 - \lambda_i) h_j) + b$$
    with the encoded texts $h$, the last layer $W, b$ and the cross-entropy $\ell$. As that layer is
    linear, $m_i$ is taken as the mixture of the rows' logits, in float32. The mean is over rows, by
    the `weights` of $i$; a row whose own or other label is no target is not mixed. In judging
    nothing is.

    Args:
      task: the classification.
      alpha: $\alpha$; small numbers mix little.

    Raises:
      ConfigError: another task, or an $\alpha$ that is not above 0; when trained, no key.

    Example:
      >>> from mpjax.models import encoder
      >>> model = encoder("bert-tiny", layers=1, width=16, heads=2, head="class")
      >>> objective = Mixup(TextClassification(("no", "yes"))).objective(model)
      >>> params, key = model.init(jax.random.key(0)), jax.random.key(1)
      >>> batch = {"ids": jnp.array([[1, 2], [3, 4]]), "labels": jnp.array([0, 1])}
      >>> loss, _ = objective(params, batch, key=key, train=True)
      >>> bool(abs(loss - 0.7) < 0.3)
      True

    References:
      Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, section 2; Guo et al. 2019,
      Augmenting Data with Mixup for Sentence Classification, section 3 (senMixup).
    """

    task: TextClassification
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.task, TextClassification):
            raise ConfigError(f"mixup: the task is {brief(self.task)}; give TextClassification")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (number and 0 < self.alpha < math.inf):
            raise ConfigError(f"mixup: alpha={brief(self.alpha)}; expected a number above 0")

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`."""
        own, task = self.task.objective(model), self.task
        policy = model.precision.policy(task.loss)

        def loss(
            params: Params,
            batch: Batch,
            *,
            state: ModelState = None,
            key: Key | None = None,
            train: bool = False,
        ) -> tuple[Array, ModelState]:
            if not train:
                return own(params, batch, state=state, key=key, train=train)
            if key is None:
                raise ConfigError("mixup: the shares are drawn, which needs a key; give one")
            outputs, state = model.apply(
                params, encoder_inputs(batch), state=state, key=key, train=True
            )
            labels = jnp.asarray(field(batch, "labels", task.loss))
            weights = batch.get("weights")
            # A mixture of bfloat16 logits, rounded again, would lose a difference as large as it.
            logits = outputs[task.output].astype(jnp.float32)
            # The model folds the names of its parts into the key; this number is none of theirs.
            drawn = jax.random.beta(
                jax.random.fold_in(key, 2**32 - 1), self.alpha, self.alpha, labels.shape
            )
            other = jnp.roll(labels, 1)
            both = (labels != IGNORE) & (other != IGNORE)
            share = jnp.where(both, drawn, jnp.ones_like(drawn))
            mixed = share[:, None] * logits + (1 - share)[:, None] * jnp.roll(logits, 1, axis=0)
            total = jnp.zeros((), jnp.float32)
            weight = jnp.ones_like(share) if weights is None else weights.astype(jnp.float32)
            for targets, part in ((labels, share), (jnp.where(both, other, IGNORE), 1 - share)):
                mean = label_loss(mixed, targets, policy, weight * part).astype(jnp.float32)
                total += mean * target_weight(targets, weight * part)
            found = total / jnp.maximum(target_weight(labels, weight), 1e-30)
            return found.astype(policy.output_dtype), state

        return ops.Objective(loss, own.count, check=own.check)
