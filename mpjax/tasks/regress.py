"""Regression of texts and of pairs of texts: a number for each, as of cross-encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax import ops
from mpjax.data.tokenizers.wordpiece import Example, WordPiece
from mpjax.errors import ConfigError
from mpjax.models import Encoder
from mpjax.models.core.checks import field
from mpjax.tasks.labels import Outputs, encoder_fn, task_outputs
from mpjax.tasks.predictor import Predict, predictor
from mpjax.typing import Array, Batch


@dataclasses.dataclass(frozen=True)
class TextRegression:
    r"""One number for each text, or for each pair of texts.

    The loss is $\frac{1}{B} \sum_b (l_b - y_b)^2$ of the model's only output $l$, as transformers
    has it where `problem_type` is `regression`; a mean by the batch's `weights` (B,) if it has any.

    Args:
      output: name of the model's output that holds the numbers, (B, 1).
      loss: path whose policy the loss takes.

    Example:
      >>> from mpjax.models import encoder
      >>> model = encoder("bert-tiny", layers=1, width=16, heads=2, head="class", classes=1)
      >>> loss = TextRegression().objective(model)
    """

    output: str = "class"
    loss: str = "encoder/loss"

    def examples(
        self, pieces: WordPiece, texts: Sequence[str], values: Sequence[float],
        seconds: Sequence[str] = (), *, longest: int,
    ) -> list[Example]:  # fmt: skip
        """Returns the encoded texts, each with its number as `values`.

        Args:
          pieces: the tokenizer.
          texts: the texts.
          values: a number for each.
          seconds: the second text of each pair, or empty.
          longest: tokens at most.

        Raises:
          ConfigError: numbers that are not finite or not one for each text, or what
            `WordPiece.encode` raises.
        """
        found = np.asarray(values)
        if found.dtype.kind not in "iuf" or found.shape != (len(texts),):
            raise ConfigError(
                f"values: {found.dtype} of shape {found.shape} for {len(texts)} texts; give a"
                " number for each"
            )
        if not np.isfinite(found).all():
            raise ConfigError(
                f"values: number {int(np.argmin(np.isfinite(found)))} is"
                f" {found[~np.isfinite(found)][0]}; leave such texts out"
            )
        encoded = pieces.encode(texts, seconds, longest=longest)
        return [e | {"values": np.float32(y)} for e, y in zip(encoded, found, strict=True)]

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`.

        Raises:
          ConfigError: a model with classes.
        """
        self._check(model)
        policy = model.precision.policy(self.loss)

        def loss(outputs: Outputs, batch: Batch) -> Array:
            right = jnp.asarray(field(batch, "values", self.loss)).astype(policy.compute_dtype)
            error = outputs[self.output][:, 0].astype(policy.compute_dtype) - right
            # A sum over the batch, and squares that leave float16 beyond 256.
            squares = jnp.square(error.astype(jnp.float32))
            if (weights := batch.get("weights")) is not None:
                weights = jnp.asarray(weights).astype(jnp.float32)
                total = jnp.maximum(jnp.sum(weights), 1e-30)
                # Not the product alone: numbers of rows without a target are undefined.
                weighted = jnp.where(weights != 0, weights * squares, 0.0)
                return (jnp.sum(weighted) / total).astype(policy.output_dtype)
            return jnp.mean(squares).astype(policy.output_dtype)

        def count(batch: Batch) -> Array:
            if (weights := ops.weight_sum(batch)) is not None:
                return weights
            return jnp.float32(field(batch, "values", self.loss).shape[0])

        check = getattr(model, "check_batch", None)
        return ops.Objective(encoder_fn(model, loss), count, check=check)

    def predictor(self, model: Encoder, **settings: Any) -> Predict:
        """Returns a function (params, examples) -> the number (1,) of each; see `predictor`."""
        self._check(model)
        return predictor(model, self.output, **settings)

    def evaluate(
        self, predicted: Sequence[np.ndarray], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Returns the mean squared error as `loss`, and the correlations of Pearson and Spearman.

        All in float64, by SciPy; where one side is constant, correlations are 0.
        """
        from scipy import stats  # here, because it takes half a second

        right = np.array([e["values"] for e in examples], np.float64)
        found = np.stack(list(predicted)).astype(np.float64)[:, 0]
        varies = right.std() > 0 and found.std() > 0
        return {
            "loss": float(np.mean((found - right) ** 2)),
            "pearson": float(stats.pearsonr(found, right).statistic) if varies else 0.0,
            "spearman": float(stats.spearmanr(found, right).statistic) if varies else 0.0,
        }

    def _check(self, model: Encoder) -> None:
        outputs = task_outputs(model, self.output)
        if outputs is None:
            outputs = getattr(getattr(model, "config", None), "classes", 1)
        if outputs != 1:
            raise ConfigError(
                f"regression: the model has {outputs} outputs, expected 1; make it with classes=1,"
                " or take TextClassification"
            )
