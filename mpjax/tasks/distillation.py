"""Distillation: a student learns what a teacher answers, beside or instead of the labels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import jmp

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError, brief
from mpjax.models import Encoder, Seq2Seq
from mpjax.models.core.checks import field, language_inputs, targets_of
from mpjax.models.core.network import LanguageModel
from mpjax.tasks.classify import TextClassification
from mpjax.tasks.divergence import check_divergence, divergence
from mpjax.tasks.labels import encoder_inputs, label_loss
from mpjax.tasks.language import Language
from mpjax.tasks.tag import TokenClassification
from mpjax.typing import Array, Batch, Key, ModelState, Params, PyTree

Teacher = Encoder | LanguageModel | Seq2Seq
Task = TextClassification | TokenClassification | Language


@dataclasses.dataclass(frozen=True)
class Distillation:
    r"""The task of a student whose soft targets are a teacher's.

    $$L = w_s\,\tau^2 D(p, q) + w_h L_h$$ with the teacher's distribution $p$ and the student's $q$
    at temperature $\tau$ (see `divergence`), and the task's own loss $L_h$. Each is the mean over
    targets of its own. The teacher runs in the same compiled step, under its own Precision,
    without dropout and without gradients; its weights may be quantised.

    Args:
      task: `TextClassification`, `TokenClassification` or `Language` (decoders and
        encoder-decoders too).
      teacher: a model with as many classes, or tokens, as the student.
      params: the teacher's weights.
      temperature: $\tau$.
      soft: $w_s$.
      hard: $w_h$; at 0 the labels need not be there.
      kind: `forward`, `reverse` or `jensen-shannon`.
      mix: $\beta$ of `jensen-shannon`.

    Raises:
      ConfigError: settings out of range, a task or a teacher of another kind.

    Example:
      >>> import jax
      >>> from mpjax.models import encoder
      >>> small = dict(layers=1, width=16, heads=2, head="class")
      >>> teacher = encoder("bert-tiny", "bf16", **small)
      >>> task = TextClassification(("no", "yes"))
      >>> distilled = Distillation(task, teacher, teacher.init(jax.random.key(0)), hard=0.0)
      >>> student = encoder("bert-tiny", **small)
      >>> objective = distilled.objective(student)
      >>> batch = {"ids": jnp.ones((2, 4), jnp.int32)}
      >>> loss, _ = objective(teacher.init(jax.random.key(0)), batch)  # of the same weights
      >>> bool(loss < 1e-4)
      True

    References:
      Hinton et al. 2015, Distilling the Knowledge in a Neural Network; Sanh et al. 2019,
      DistilBERT.
    """

    task: Task
    teacher: Teacher
    params: Params = dataclasses.field(repr=False, compare=False)
    temperature: float = 2.0
    soft: float = 1.0
    hard: float = 1.0
    kind: str = "forward"
    mix: float = 0.5

    def __post_init__(self) -> None:
        check_divergence(self.kind, self.temperature, self.mix)
        for name in ("soft", "hard"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value < math.inf):
                raise ConfigError(f"distillation: {name}={brief(value)} is not 0 or a number above")
        if not self.soft:
            raise ConfigError("distillation: soft=0 leaves the teacher out; train the task alone")
        if not isinstance(self.task, Task):
            raise ConfigError(
                f"distillation: the task is {brief(self.task)}; give TextClassification,"
                " TokenClassification or Language"
            )
        self._check("teacher", self.teacher)

    def _check(self, who: str, model: object) -> None:
        speaks, wanted = isinstance(model, LanguageModel | Seq2Seq), isinstance(self.task, Language)
        if speaks == wanted and hasattr(model, "apply"):
            return
        taken = "a model" if speaks == wanted else "a language model" if wanted else "an encoder"
        raise ConfigError(
            f"distillation: the {who} is {brief(type(model).__name__)}, and"
            f" {type(self.task).__name__} takes {taken}"
        )

    def _logits(
        self, model: Any, params: Params, batch: Batch, **options: Any
    ) -> tuple[Array, ModelState]:
        """The logits of the task, (..., V), and the model's state."""
        if not isinstance(self.task, Language):
            found, state = model.apply(params, encoder_inputs(batch), **options)
            return found[self.task.output], state
        if isinstance(model, Seq2Seq):
            return model.apply(params, batch, **options)
        ids, keep = language_inputs(batch, model.root)
        return model.apply(params, ids, keep=keep, **options)

    def _weights(self, batch: Batch, shape: tuple[int, ...]) -> Array:
        """Which positions have soft targets, and how much they count; (...) of the logits."""
        weights = batch.get("weights")
        if isinstance(self.task, TokenClassification):
            labels = batch.get("labels")
            chosen = encoder_inputs(batch).get("keep") if labels is None else labels != IGNORE
            weights = chosen if weights is None or chosen is None else weights * chosen
        if weights is None:
            return jnp.ones(shape, jnp.float32)
        return jnp.broadcast_to(jnp.asarray(weights).astype(jnp.float32), shape)

    def objective(self, model: Teacher) -> ops.Objective:
        """Returns the objective of a student, for `mpjax.train.build(objective=...)`.

        Raises:
          ConfigError: a student of another kind or, at the first step, of another vocabulary.
        """
        self._check("student", model)
        own = self.task.objective(model)  # type: ignore[arg-type]  # checked above
        policy = model.precision.policy(self._path(model))

        def terms(
            params: Params,
            batch: Batch,
            *,
            frozen: PyTree,
            state: ModelState = None,
            key: Key | None = None,
            train: bool = False,
        ) -> ops.Terms:
            answers, _ = self._logits(self.teacher, frozen, batch)
            logits, state = self._logits(model, params, batch, state=state, key=key, train=train)
            if logits.shape[-1] != answers.shape[-1]:
                raise ConfigError(
                    f"distillation: the student has {logits.shape[-1]} classes or tokens, the"
                    f" teacher {answers.shape[-1]}; both need the same, of one tokenizer"
                )
            found = {"soft": self.soft * self._soft(logits, answers, batch)}
            if self.hard:
                found["hard"] = self.hard * self._hard(model, logits, batch, policy, train)
            losses = {name: x.astype(policy.output_dtype) for name, x in found.items()}
            return ops.Terms(losses, state)

        def count(batch: Batch) -> dict[str, Array]:
            shape = self._positions(batch)
            found = {"soft": jnp.sum(self._weights(batch, shape))}
            if self.hard:
                number: Any = own.count(batch)
                found["hard"] = jnp.float32(math.prod(shape)) if number is None else number
            return found

        return ops.Objective.of_terms(terms, count, frozen=self.params)

    def _path(self, model: Any) -> str:
        """Whose policy the loss takes."""
        if isinstance(self.task, Language):
            return f"{model.stateless_product.split('/')[0]}/loss"
        return self.task.loss

    def _soft(self, logits: Array, answers: Array, batch: Batch) -> Array:
        found = divergence(
            logits, answers, temperature=self.temperature, kind=self.kind, mix=self.mix
        )
        weights = self._weights(batch, found.shape)
        # Not the product alone: logits at padding are undefined.
        total = jnp.sum(jnp.where(weights != 0, weights * found, 0.0))
        return total / jnp.maximum(jnp.sum(weights), 1e-30)

    def _hard(
        self, model: Any, logits: Array, batch: Batch, policy: jmp.Policy, train: bool
    ) -> Array:
        weights = batch.get("weights")
        if not isinstance(self.task, Language):
            return label_loss(logits, field(batch, "labels", self.task.loss), policy, weights)
        targets = targets_of(batch, logits.shape[:2], self._path(model).split("/")[0])
        z_loss = model.config.z_loss if train else 0.0
        return ops.cross_entropy(
            logits, targets, lambda x: x, policy, chunk=logits.shape[1], z_loss=z_loss,
            weights_BT=weights,
        )  # fmt: skip

    def _positions(self, batch: Batch) -> tuple[int, ...]:
        """The shape of the targets: of texts (B,), of tokens (B, T)."""
        if isinstance(self.task, Language):
            return tuple(field(batch, "targets", "distillation").shape)
        ids = field(batch, "ids", "encoder")
        return tuple(ids.shape[:1] if isinstance(self.task, TextClassification) else ids.shape)
