"""Mixup: texts and their classes, two by two.

Shapes: B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError, brief
from mpjax.formats import weight_view
from mpjax.formats.checks import did_you_mean
from mpjax.models import Encoder
from mpjax.models.core.checks import below, field
from mpjax.tasks.classify import TextClassification
from mpjax.tasks.labels import encoder_inputs, label_loss, target_weight
from mpjax.typing import Array, Batch, Key, ModelState, Params

LEVELS = ("sentence", "word")


@dataclasses.dataclass(frozen=True)
class Mixup:
    r"""The task of a classifier that learns from mixtures of two texts.

    Row $i$ of a batch meets row $j$, the one before it, with $\lambda_i \sim
    \text{Beta}(\alpha, \alpha)$:
    $$L_i = \lambda_i\,\ell(m_i, y_i) + (1 - \lambda_i)\,\ell(m_i, y_j)$$ with the cross-entropy
    $\ell$. Of `sentence` the encoded texts $h$ are mixed, $m_i = W(\lambda_i h_i + (1 - \lambda_i)
    h_j) + b$; as the last layer $W, b$ is linear, $m_i$ is taken as the mixture of the rows'
    logits, in float32. Of `word` the rows of the token table are mixed, place by place, $m_i =
    f(\lambda_i E_i + (1 - \lambda_i) E_j)$, with zeros where one of the texts has ended. The mean
    is over rows, by the `weights` of $i$; a row whose own or other label is no target is not mixed.
    In judging nothing is.

    Args:
      task: the classification.
      alpha: $\alpha$; small numbers mix little.
      level: what is mixed, `sentence` or `word`.

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
      Augmenting Data with Mixup for Sentence Classification, section 3 (senMixup, wordMixup).
    """

    task: TextClassification
    alpha: float = 0.2
    level: str = "sentence"

    def __post_init__(self) -> None:
        if not isinstance(self.task, TextClassification):
            raise ConfigError(f"mixup: the task is {brief(self.task)}; give TextClassification")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (number and 0 < self.alpha < math.inf):
            raise ConfigError(f"mixup: alpha={brief(self.alpha)}; expected a number above 0")
        if self.level not in LEVELS:
            hint = did_you_mean(str(self.level), LEVELS)
            raise ConfigError(
                f"mixup: unknown level {brief(self.level)}; {hint}known: {' '.join(LEVELS)}"
            )

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`."""
        own, task = self.task.objective(model), self.task
        words = self.level == "word"
        if words and not isinstance(model, Encoder):
            raise ConfigError(
                f"mixup: words are mixed in the token table of an Encoder, and the model is"
                f" {brief(type(model).__name__)}; take level='sentence'"
            )
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
            labels = jnp.asarray(field(batch, "labels", task.loss))
            weights = batch.get("weights")
            # The model folds the names of its parts into the key; this number is none of theirs.
            drawn = jax.random.beta(
                jax.random.fold_in(key, 2**32 - 1), self.alpha, self.alpha, labels.shape
            )
            other = jnp.roll(labels, 1)
            both = (labels != IGNORE) & (other != IGNORE)
            share = jnp.where(both, drawn, jnp.ones_like(drawn))
            inputs = encoder_inputs(batch)
            if words:
                inputs = _mixed_words(params, inputs, share)
            outputs, state = model.apply(params, inputs, state=state, key=key, train=True)
            # A mixture of bfloat16 logits, rounded again, would lose a difference as large as it.
            mixed = outputs[task.output].astype(jnp.float32)
            if not words:
                mixed = share[:, None] * mixed + (1 - share)[:, None] * jnp.roll(mixed, 1, axis=0)
            total = jnp.zeros((), jnp.float32)
            weight = jnp.ones_like(share) if weights is None else weights.astype(jnp.float32)
            for targets, part in ((labels, share), (jnp.where(both, other, IGNORE), 1 - share)):
                mean = label_loss(mixed, targets, policy, weight * part).astype(jnp.float32)
                total += mean * target_weight(targets, weight * part)
            found = total / jnp.maximum(target_weight(labels, weight), 1e-30)
            return found.astype(policy.output_dtype), state

        return ops.Objective(loss, own.count, check=own.check)


def _mixed_words(params: Params, inputs: Batch, share_B: Array) -> Batch:
    """Inputs with an offset that turns each row's embeddings into the mixture, in float32."""
    if "segments" in inputs:
        raise ConfigError(
            "mixup: segments pack several texts into one row; give one a row, as bucket_batches"
            " does"
        )
    ids = jnp.asarray(inputs["ids"])
    table_VD = below(weight_view(params), "encoder")["embed"]["table"].astype(jnp.float32)
    rows_BTD = table_VD.at[ids].get(mode="fill", fill_value=jnp.nan)
    keep = inputs.get("keep")
    keep_BT = jnp.ones(ids.shape, bool) if keep is None else jnp.asarray(keep).astype(bool)
    there_BTD = jnp.where(keep_BT[..., None], rows_BTD, 0.0)
    share = share_B[:, None, None]
    mixed_BTD = share * there_BTD + (1 - share) * jnp.roll(there_BTD, 1, axis=0)
    both = {"keep": keep_BT | jnp.roll(keep_BT, 1, axis=0) & (share_B < 1)[:, None]}
    if "types" in inputs:  # where the own text has ended, the other's
        types = jnp.asarray(inputs["types"])
        both["types"] = jnp.where(keep_BT, types, jnp.roll(types, 1, axis=0))
    return inputs | both | {"offset": mixed_BTD - rows_BTD}
