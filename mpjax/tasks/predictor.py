"""From examples to the logits of each, in the order of the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from mpjax.data.buckets import eval_batches
from mpjax.data.tokenizers.wordpiece import Example
from mpjax.models import Encoder
from mpjax.models.core.batch_fields import check_batch, encoder_batch
from mpjax.tasks.labels import encoder_inputs
from mpjax.typing import ArrayLike, ModelState, Params

Predict = Callable[..., list[np.ndarray]]


def predictor(
    model: Encoder, output: str, *, batch: int, lengths: Sequence[int], padding: int = 0
) -> Predict:
    """Returns a function from (params, examples) to the logits of each example.

    It is compiled once for each length that occurs. What comes back is float32, (C,) or (T, C)
    without padding.

    Args:
      model: with `apply(params, inputs) -> (outputs, state)`.
      output: which of the outputs.
      batch: examples at a time.
      lengths: what they are padded to.
      padding: id that fills them up.
    """
    run = jax.jit(lambda params, inputs, state: model.apply(params, inputs, state=state)[0][output])

    def predict(
        params: Params, examples: Sequence[Example], state: ModelState = None
    ) -> list[np.ndarray]:
        examples = [encoder_batch(example, "predictor: example") for example in examples]
        found: list[np.ndarray] = [np.zeros(0)] * len(examples)
        batches = eval_batches(examples, batch=batch, lengths=lengths, padding={"ids": padding})
        for rows, inputs in batches:
            check_batch(model, inputs)
            logits = np.asarray(run(params, encoder_inputs(inputs), state)).astype(np.float32)
            for row, one in zip(rows, logits, strict=False):
                # (T, C): padding is dropped; (C,) has none
                found[row] = one[: len(examples[row]["ids"])] if one.ndim == 2 else one
        return found

    return predict


def softmax(logits: ArrayLike) -> np.ndarray:
    """Returns probabilities in float64."""
    shifted = np.asarray(logits, np.float64)
    powers = np.exp(shifted - shifted.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
