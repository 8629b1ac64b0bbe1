"""The loss of labels of which some are no target, and what an encoder reads of a batch.

Shapes: B batch, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jmp

from mpjax import ops
from mpjax.data.buckets import IGNORE

_INPUTS = ("ids", "types", "keep")


def encoder_inputs(batch: Any) -> dict[str, Any]:
    """Returns the part of a batch that an encoder reads; labels stay out of its sight."""
    return {name: batch[name] for name in _INPUTS if name in batch}


def label_loss(logits: Any, labels: Any, policy: jmp.Policy) -> Any:
    r"""Mean over targets of $\log \sum_c e^{l_c} - l_y$; a batch without a target has loss 0.

    Args:
      logits: (B, T, C), or (B, C) of one label a row.
      labels: (B, T) or (B,) classes $y$, `IGNORE` where there is no target; any other number
        outside of 0 .. C - 1 gives NaN.
      policy: of the loss: logits in its compute dtype, the mean in its output dtype.

    Returns:
      A scalar.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> logits = jnp.log(jnp.array([[[1.0, 3.0], [9.0, 1.0]]]))
      >>> loss = label_loss(logits, jnp.array([[1, IGNORE]]), parse_policy("f32"))
      >>> round(float(jnp.exp(-loss)), 6)
      0.75
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    return ops.cross_entropy(
        logits, labels, lambda x: x, policy, chunk=labels.shape[1], weights_BT=labels != IGNORE
    )


def label_objective(model: Any, output: str, path: str) -> Callable[..., tuple[Any, Any]]:
    """Returns the loss function of a batch's `labels` under one output of an encoder.

    Args:
      model: with `precision` and `apply(params, inputs, *, state, key, train)`.
      output: which of the outputs holds the logits.
      path: whose policy the loss takes.
    """
    policy = model.precision.policy(path)

    @ops.counted(lambda batch: jnp.sum(jnp.asarray(batch["labels"]) != IGNORE, dtype=jnp.float32))
    def loss_fn(
        params: Any, batch: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        inputs = encoder_inputs(batch)
        outputs, state = model.apply(params, inputs, state=state, key=key, train=train)
        return label_loss(outputs[output], batch["labels"], policy), state

    return loss_fn
