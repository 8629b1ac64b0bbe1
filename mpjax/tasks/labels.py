"""The loss of labels of which some are no target, and what an encoder reads of a batch.

Shapes: B batch, T tokens, C classes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
import jmp

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import as_array
from mpjax.models import Encoder
from mpjax.models.core.batch_fields import encoder_batch
from mpjax.models.core.checks import field, keep_of
from mpjax.models.core.metadata import NONE
from mpjax.ops.cross_entropy import check_targets
from mpjax.typing import Array, Batch, Key, ModelState, Params

logger = logging.getLogger("mpjax.tasks")

Outputs = dict[str, Array]  # of an encoder, by name
T = TypeVar("T")


def encoder_inputs(batch: Batch) -> dict[str, Array]:
    """Returns the part of a batch that an encoder reads; labels stay out of its sight.

    Raises:
      ConfigError: there are no `ids`, or `keep` and `attention_mask`.
    """
    batch = encoder_batch(batch)
    inputs = {"ids": batch["ids"]}
    own = {name: batch.get(name) for name in ("types", "segments")}
    own["keep"] = keep_of(batch, "encoder")
    return inputs | {name: value for name, value in own.items() if value is not None}


def target_weight(labels: Array, weights: Array | None = None) -> Array:
    """Returns the sum of the weights of labels that are targets, float32; each is 1 by default."""
    known = jnp.asarray(labels) != IGNORE
    if weights is None:
        return jnp.sum(known, dtype=jnp.float32)
    return jnp.sum(jnp.where(known, jnp.asarray(weights).astype(jnp.float32), 0.0))


def check_labels(model: Encoder, names: tuple[str, ...], what: str, output: str) -> None:
    """Checks that a task numbers its classes as a model does.

    Args:
      model: whose config may have `labels`, as of a checkpoint.
      names: of the task's classes.
      what: what the task calls them.
      output: which of the model's outputs the task reads.

    Raises:
      ConfigError: another order, other names, too few outputs, or a model that was trained for
        something else.
    """
    if not hasattr(model, "precision"):
        raise ConfigError(
            f"{what}: the model is {brief(model)}; make one with mpjax.models.encoder"
        )
    config = getattr(model, "config", None)
    if (outputs := task_outputs(model, output)) is not None:
        if outputs < len(names):
            raise ConfigError(
                f"{what}: the task has {len(names)}, the model's head {output!r} {outputs}; make"
                " the model with as many"
            )
        return  # the head of a task names no classes
    labels = tuple(getattr(config, "labels", ()))
    problem = getattr(model, "metadata", NONE).config.get("problem_type")
    if problem not in (None, "single_label_classification"):
        raise ConfigError(
            f"{what}: the checkpoint's problem_type is {problem!r}, not one class for each; draw a"
            " new head with load_checkpoint(..., new=['encoder/class/**'], unused=['classifier.*'])"
        )
    if (outputs := getattr(config, "classes", len(names))) < len(names):
        raise ConfigError(
            f"{what}: the task has {len(names)}, the model {outputs} output(s); make the model with"
            f" classes={len(names)}"
        )
    if not labels or labels == names:
        return
    numbers = tuple(map(str, range(len(labels))))
    if labels != tuple(f"LABEL_{i}" for i in range(len(labels))):
        raise ConfigError(
            f"{what}: the task has {names}, the model {labels}; make the task with"
            " model.config.labels, whose order its logits have: it takes the data's by name"
        )
    if names != numbers[: len(names)]:
        logger.warning(
            "%s: the checkpoint does not name its own; its outputs are taken for %s in this order"
            " (load_checkpoint(..., labels=...) names them)", what, " ".join(names),
        )  # fmt: skip


def check_names(what: str, names: Any) -> None:
    """Checks that classes are at least two texts, each once.

    Raises:
      ConfigError: they are not.
    """
    listed = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    if not listed or len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"{what}: {brief(names)}; expected at least two texts, each once")


def task_outputs(model: Encoder, output: str) -> int | None:
    """Returns the classes of a model's task head, None if it has none of that name."""
    shapes = getattr(getattr(model, "config", None), "task_shapes", {})
    return shapes[output][1] if output in shapes else None


def label_loss(
    logits: Array, labels: Array, policy: jmp.Policy, weights: Array | None = None
) -> Array:
    r"""Mean over targets of $\log \sum_c e^{l_c} - l_y$; a batch without a target has loss 0.

    Args:
      logits: (B, T, C), or (B, C) of one label a row.
      labels: (B, T) or (B,) classes $y$, `IGNORE` where there is no target; any other number
        outside of 0 .. C - 1 gives NaN.
      policy: of the loss: logits in its compute dtype, the mean in its output dtype.
      weights: of the labels in the mean, of their shape; None is all alike.

    Returns:
      A scalar.

    Raises:
      ConfigError: labels that are no integers or none, or labels or weights of another shape.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> logits = jnp.log(jnp.array([[[1.0, 3.0], [9.0, 1.0]]]))
      >>> loss = label_loss(logits, jnp.array([[1, IGNORE]]), parse_policy("f32"))
      >>> round(float(jnp.exp(-loss)), 6)
      0.75
    """
    logits, labels = jnp.asarray(logits), as_array(labels, "labels")
    check_targets(labels, logits.shape[:-1], "labels")
    chosen = labels != IGNORE
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != labels.shape:
            raise ConfigError(
                f"weights: shape {weights.shape} is not {labels.shape}, that of the labels"
            )
        chosen = jnp.where(chosen, weights, jnp.zeros_like(weights))
    if labels.ndim == 1:
        logits, labels, chosen = logits[:, None], labels[:, None], chosen[:, None]
    return ops.cross_entropy(
        logits, labels, lambda x: x, policy, chunk=labels.shape[1], weights_BT=chosen
    )


@dataclasses.dataclass(frozen=True)
class OutputsOf:
    """Stands for an encoder that has run: `apply` returns its outputs, which are its weights here.

    One forward pass then serves the objectives of several tasks, or a loss and what else is asked
    of the outputs.

    Args:
      model: whose precision and config the tasks read.
    """

    model: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def apply(
        self, params: Outputs, inputs: object, *, state: ModelState = None, **options: object
    ) -> tuple[Outputs, ModelState]:
        """Returns the outputs and the state."""
        return params, state


def encoder_fn(
    model: Encoder, value: Callable[[Outputs, Batch], T]
) -> Callable[..., tuple[T, ModelState]]:
    """Returns a function (params, batch, *, state, key, train) -> a value of the outputs, state.

    Args:
      model: with `apply(params, inputs, *, state, key, train) -> outputs, state`.
      value: function (outputs, batch) -> what is wanted of them, such as a loss.
    """

    def run(
        params: Params,
        batch: Batch,
        *,
        state: ModelState = None,
        key: Key | None = None,
        train: bool = False,
    ) -> tuple[T, ModelState]:
        batch = encoder_batch(batch)
        inputs = encoder_inputs(batch)
        outputs, state = model.apply(params, inputs, state=state, key=key, train=train)
        return value(outputs, batch), state

    return run


def label_objective(model: Encoder, output: str, path: str) -> ops.Objective:
    """Returns the objective of a batch's `labels` under one output of an encoder.

    `weights` of the labels, of their shape, say which count more than others.

    Args:
      model: with `precision` and `apply(params, inputs, *, state, key, train)`.
      output: which of the outputs holds the logits.
      path: whose policy the loss takes.
    """
    policy = model.precision.policy(path)

    def labels_of(batch: Batch) -> tuple[Array, Array | None]:
        return field(batch, "labels", path), batch.get("weights")

    def loss(outputs: Outputs, batch: Batch) -> Array:
        labels, weights = labels_of(batch)
        return label_loss(outputs[output], labels, policy, weights)

    return ops.Objective(
        encoder_fn(model, loss), lambda batch: target_weight(*labels_of(batch)),
        check=getattr(model, "check_batch", None),
    )  # fmt: skip
