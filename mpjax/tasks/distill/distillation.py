"""Distillation: a student learns what a teacher answers, beside or instead of the labels."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jmp

from mpjax import ops
from mpjax.data.buckets import IGNORE, Example
from mpjax.errors import ConfigError, brief, is_whole
from mpjax.models import Encoder, Seq2Seq
from mpjax.models.core.batch_fields import read_batch
from mpjax.models.core.checks import field, language_inputs, real_tokens, targets_of
from mpjax.models.core.network import LanguageModel
from mpjax.tasks.classify import TextClassification
from mpjax.tasks.distill.answers import FIELDS, Answers, bucketed, likeliest, store_answers
from mpjax.tasks.distill.divergence import between, check_divergence, divergence
from mpjax.tasks.distill.intermediates import (
    Layers,
    check_layers,
    even_layers,
    hidden_loss,
    relation_loss,
    weighted_mean,
)
from mpjax.tasks.labels import encoder_inputs, label_loss
from mpjax.tasks.language import Language
from mpjax.tasks.tag import TokenClassification
from mpjax.typing import Array, Batch, Key, ModelState, Params, PyTree

Teacher = Encoder | LanguageModel | Seq2Seq
Task = TextClassification | TokenClassification | Language

OWN = "distillation"  # the weights of the projections stand here, beside the student's
_RELATED = ("queries", "keys", "values")


@dataclasses.dataclass(frozen=True)
class Distillation:
    r"""The task of a student whose soft targets are a teacher's.

    $$L = w_s\,\tau^2 D(p, q) + w_h L_h + w_m L_m + w_r L_r$$ with the teacher's distribution $p$
    and the student's $q$ at temperature $\tau$ (see `divergence`), the task's own loss $L_h$, the
    squared difference of hidden states $L_m$, mean of the pairs of layers, and the divergence of
    relations between tokens $L_r$, sum of those of queries, keys and values. Each is the mean over
    targets of its own. The teacher runs in the same compiled step, under its own Precision,
    without dropout and without gradients; its weights may be quantised.

    Args:
      task: `TextClassification`, `TokenClassification` or `Language` (decoders and
        encoder-decoders too).
      teacher: a model with as many classes, or tokens, as the student; None where batches hold its
        answers, see `answers`.
      params: the teacher's weights.
      temperature: $\tau$.
      soft: $w_s$.
      hard: $w_h$; at 0 the labels need not be there.
      kind: `forward`, `reverse` or `jensen-shannon`.
      mix: $\beta$ of `jensen-shannon`.
      hidden: $w_m$; the student's hidden states go through a projection for each pair of layers,
        which is trained in float32 as `params["distillation"]`.
      layers: (layer of the student, layer of the teacher) pairs, counted from 0; () has every layer
        of the student with the teacher's at the same share of the depth.
      relations: $w_r$.
      relation_layers: the pair of layers that relations are of; () is the last of both.
      relation_heads: of what queries, keys and values are divided into; divides their features.

    Raises:
      ConfigError: settings out of range, a task or a teacher of another kind.

    Example:
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
      DistilBERT; Jiao et al. 2020, TinyBERT; Wang et al. 2021, MiniLMv2.
    """

    task: Task
    teacher: Teacher | None = None
    params: Params = dataclasses.field(default=None, repr=False, compare=False)
    temperature: float = 2.0
    soft: float = 1.0
    hard: float = 1.0
    kind: str = "forward"
    mix: float = 0.5
    hidden: float = 0.0
    layers: Layers = ()
    relations: float = 0.0
    relation_layers: tuple[int, int] | tuple[()] = ()
    relation_heads: int = 12

    def __post_init__(self) -> None:
        check_divergence(self.kind, self.temperature, self.mix)
        for name in ("soft", "hard", "hidden", "relations"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value < math.inf):
                raise ConfigError(f"distillation: {name}={brief(value)} is not 0 or a number above")
        if not (self.soft or self._inside):
            raise ConfigError(
                "distillation: soft=0 leaves the teacher out, with hidden and relations at 0 too;"
                " train the task alone"
            )
        if self.layers and not self.hidden or self.relation_layers and not self.relations:
            name = "layers" if self.layers and not self.hidden else "relation_layers"
            weight = "hidden" if name == "layers" else "relations"
            raise ConfigError(f"distillation: {name} are given and {weight}=0; set its weight")
        if not isinstance(self.task, Task):
            raise ConfigError(
                f"distillation: the task is {brief(self.task)}; give TextClassification,"
                " TokenClassification or Language"
            )
        if self.teacher is None:
            if self._inside:
                raise ConfigError(
                    "distillation: hidden states and relations are not stored; give the teacher, or"
                    " leave hidden and relations at 0"
                )
            return
        self._check("teacher", self.teacher)
        if self.params is None:
            raise ConfigError("distillation: the teacher's weights are missing; pass params=")

    @property
    def _inside(self) -> bool:
        return bool(self.hidden or self.relations)

    def _check(self, who: str, model: object) -> None:
        speaks, wanted = isinstance(model, LanguageModel | Seq2Seq), isinstance(self.task, Language)
        if speaks == wanted and hasattr(model, "apply"):
            if self._inside and not hasattr(type(model), "collecting"):
                raise ConfigError(
                    f"distillation: the {who} is {brief(type(model).__name__)}, without the hidden"
                    " states and relations of a Transformer; leave hidden and relations at 0"
                )
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
        ids, masks = language_inputs(batch, model.root)
        return model.apply(params, ids, **masks, **options)

    def _weights(self, batch: Batch, shape: tuple[int, ...]) -> Array:
        """Which positions have soft targets, and how much they count; (...) of the logits."""
        weights = batch.get("weights")
        if isinstance(self.task, TokenClassification):
            labels = batch.get("labels")
            chosen = real_tokens(batch, "encoder") if labels is None else labels != IGNORE
            weights = chosen if weights is None or chosen is None else weights * chosen
        if weights is None:
            return jnp.ones(shape, jnp.float32)
        return jnp.broadcast_to(jnp.asarray(weights).astype(jnp.float32), shape)

    def _keep(self, batch: Batch) -> Array:
        """Which tokens are no padding, (B, T) bool."""
        ids = field(batch, "inputs" if isinstance(self.task, Language) else "ids", "distillation")
        keep = real_tokens(batch, "distillation")
        return jnp.ones(jnp.shape(ids), bool) if keep is None else keep

    def objective(self, model: Teacher) -> ops.Objective:
        """Returns the objective of a student, for `mpjax.train.build(objective=...)`.

        Raises:
          ConfigError: a student of another kind, layers or heads that it lacks or, at the first
            step, another vocabulary.
        """
        self._check("student", model)
        own = self.task.objective(model)  # type: ignore[arg-type]  # checked above
        policy = model.precision.policy(self._path(model))
        collect = (("hidden",) if self.hidden else ()) + (_RELATED if self.relations else ())
        pairs, related = self._pairs(model)
        student: Any = model
        teacher: Any = self.teacher
        if collect:
            student, teacher = (one.collecting(*collect) for one in (student, teacher))

        def terms(
            params: Params,
            batch: Batch,
            *,
            frozen: PyTree = None,
            state: ModelState = None,
            key: Key | None = None,
            train: bool = False,
        ) -> ops.Terms:
            batch = read_batch(student, batch)
            logits, state = self._logits(student, params, batch, state=state, key=key, train=train)
            answers, found = None, {}
            if teacher is not None:
                answers, told = self._logits(teacher, frozen, batch)
                if logits.shape[-1] != answers.shape[-1]:
                    raise ConfigError(
                        f"distillation: the student has {logits.shape[-1]} classes or tokens, the"
                        f" teacher {answers.shape[-1]}; both need the same, of one tokenizer"
                    )
            if self.soft:
                found["soft"] = self.soft * self._soft(logits, answers, batch)
            if self.hard:
                found["hard"] = self.hard * self._hard(model, logits, batch, policy, train)
            if collect:
                (own_layers, state), (their_layers, _) = map(_collected, (state, told))
                keep = self._keep(batch)
                if self.hidden:
                    found["hidden"] = self.hidden * _hidden(
                        params, own_layers, their_layers, pairs, keep
                    )
                if self.relations:
                    if "segments" in batch:
                        raise ConfigError(
                            "distillation: relations are between the tokens of a row, and segments"
                            " pack several texts into one; give one a row, or set relations=0"
                        )
                    one, other = related
                    each = [
                        relation_loss(
                            own_layers[name][one], their_layers[name][other], self.relation_heads,
                            keep,
                            isinstance(self.task, Language),
                        )
                        for name in _RELATED
                    ]  # fmt: skip
                    found["relations"] = self.relations * (each[0] + each[1] + each[2])
            losses = {name: x.astype(policy.output_dtype) for name, x in found.items()}
            return ops.Terms(losses, state)

        def count(batch: Batch) -> dict[str, Array]:
            batch = read_batch(student, batch)
            shape, found = self._positions(batch), {}
            if self.soft:
                found["soft"] = jnp.sum(self._weights(batch, shape))
            if self.hard:
                number: Any = own.count(batch)
                found["hard"] = jnp.float32(math.prod(shape)) if number is None else number
            for name in ("hidden", "relations"):
                if getattr(self, name):
                    found[name] = jnp.sum(self._keep(batch), dtype=jnp.float32)
            return found

        def draw(key: Key) -> Params:
            wide, wider = student.config.width, teacher.config.width

            def projection(layer: int) -> Array:
                own = jax.random.fold_in(key, layer)
                return jax.random.normal(own, (wide, wider), jnp.float32) * wide**-0.5

            return {OWN: {f"layer_{one}": projection(one) for one, _ in pairs}}

        init = draw if self.hidden else None
        return ops.Objective.of_terms(terms, count, frozen=self.params, init=init, check=own.check)

    def _pairs(self, student: Any) -> tuple[Layers, tuple[int, int]]:
        """The pairs of layers of hidden states, and that of relations."""
        if not self._inside:
            return (), (0, 0)
        teacher: Any = self.teacher
        counts = student.config.layers, teacher.config.layers
        pairs: Layers = ()
        if self.hidden:
            pairs = check_layers(self.layers or even_layers(*counts), *counts)
        related = check_layers((self.relation_layers or (counts[0] - 1, counts[1] - 1),), *counts)
        heads = self.relation_heads
        for who, config in (("student", student.config), ("teacher", teacher.config)):
            for features in {config.heads * config.per_head, config.groups * config.per_head}:
                whole = is_whole(heads, 1)
                if self.relations and (not whole or features % heads):
                    raise ConfigError(
                        f"distillation: relation_heads={brief(heads)} does not divide the"
                        f" {features} features of the {who}'s queries or keys; give a divisor of"
                        " both models'"
                    )
        return pairs, related[0]

    def answers(
        self,
        examples: Sequence[Example],
        folder: str | os.PathLike[str] | None = None,
        *,
        batch: int,
        lengths: Sequence[int],
        top: int = 64,
        padding: Mapping[str, int] = {},
    ) -> Answers:
        """Asks the teacher once; returns the examples with its answers, which lie on the disk.

        Train on them with `teacher=None`. Of each position the likeliest classes are kept, at this
        temperature, and what all others have together. A call that is interrupted, or made again
        with more examples, asks what is not stored yet.

        Args:
          examples: name -> number or array, as `mpjax.data.bucket_batches` takes them.
          folder: for the files; None is the cache folder.
          batch: examples at a time.
          lengths: what examples are padded to.
          top: classes of a position, at most all.
          padding: name -> what fills it up, as `mpjax.data.pad` takes it.

        Raises:
          ConfigError: no teacher, no examples, a `top` below 1, or a folder that cannot be written.
        """
        model = self.teacher
        if model is None:
            raise ConfigError("answers: there is no teacher to ask; give teacher= and params=")
        if not is_whole(top, 1):
            raise ConfigError(f"answers: top={brief(top)} is no whole number from 1 on")
        name = self._target
        sizes = [len(example[name]) if name in example else 0 for example in examples]
        if 0 in sizes:
            raise ConfigError(
                f"answers: examples[{sizes.index(0)}] has no {name!r}; give its tokens"
            )
        one_each = isinstance(self.task, TextClassification)
        sizes = [1] * len(sizes) if one_each else sizes
        config: Any = model.config
        top = min(top, config.vocabulary if isinstance(self.task, Language) else self._classes)

        def answer(params: Params, batch: Batch) -> tuple[Array, Array, Array]:
            logits, _ = self._logits(model, params, batch)
            return likeliest(logits[:, None] if one_each else logits, self.temperature, top)

        what = f"{self.task} {model.config} {model.precision.to_json()} at {self.temperature}"
        return store_answers(
            answer, self.params, what, examples, sizes, folder=folder, batch=batch,
            lengths=lengths, top=top, padding=padding,
        )  # fmt: skip

    @property
    def _classes(self) -> int:
        assert not isinstance(self.task, Language)
        task = self.task
        return len(task.classes if isinstance(task, TextClassification) else task.names)

    @property
    def _target(self) -> str:
        """The field that has an entry a position."""
        return "targets" if isinstance(self.task, Language) else "ids"

    def _path(self, model: Any) -> str:
        """Whose policy the loss takes."""
        if isinstance(self.task, Language):
            return f"{model.stateless_product.split('/')[0]}/loss"
        return self.task.loss

    def _soft(self, logits: Array, answers: Array | None, batch: Batch) -> Array:
        tau = self.temperature
        if answers is not None:
            found = divergence(logits, answers, temperature=tau, kind=self.kind, mix=self.mix)
        else:
            if lacking := [name for name in FIELDS if name not in batch]:
                raise ConfigError(
                    f"distillation: the batch has no {lacking[0]!r} and there is no teacher; train"
                    " on what Distillation.answers returns, or give teacher= and params="
                )
            one_each = isinstance(self.task, TextClassification)
            log_q, log_p = bucketed(
                logits[:, None] if one_each else logits, _cut(batch, one_each), tau
            )
            found = jnp.float32(tau**2) * between(log_q, log_p, self.kind, self.mix)
            found = found[:, 0] if one_each else found
        return weighted_mean(found, self._weights(batch, found.shape))

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
        shape = tuple(field(batch, self._target, "distillation").shape)
        return shape[:1] if isinstance(self.task, TextClassification) else shape


def _cut(batch: Batch, one_each: bool) -> Batch:
    """The stored answers; those of a text stand at its first token."""
    return {name: batch[name][:, :1] if one_each else batch[name] for name in FIELDS}


def _collected(state: ModelState) -> tuple[dict[str, Array], ModelState]:
    """What a model collected, of an encoder-decoder its decoder's, and its state without it."""
    rest = {name: value for name, value in state.items() if name != "collected"}
    found = state["collected"]
    return found.get("decoder") or found["encoder"], rest or None


def _hidden(
    params: Params,
    student: dict[str, Array],
    teacher: dict[str, Array],
    pairs: Layers,
    keep: Array,
) -> Array:
    if OWN not in params:
        raise ConfigError(
            f"distillation: the weights have no {OWN!r}, the projections of hidden states; train"
            " the params of mpjax.train.build, and where other weights take the model's place, keep"
            " them: params = state.params | other"
        )
    weights, total = keep.astype(jnp.float32), jnp.float32(0)
    for one, other in pairs:
        projection = params[OWN][f"layer_{one}"]
        total += hidden_loss(student["hidden"][one], teacher["hidden"][other], projection, weights)
    return total / len(pairs)
