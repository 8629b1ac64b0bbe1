"""Adversarial training: a task's loss where the embeddings are perturbed against it.

Shapes: B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError, brief
from mpjax.models import Encoder, Seq2Seq
from mpjax.models.core.batch_fields import read_batch
from mpjax.models.core.checks import as_ids, field, keep_of
from mpjax.models.core.module import part_key
from mpjax.models.core.network import LanguageModel
from mpjax.tasks.adversarial.methods import SMART, VAT, FreeLB, Method, RDrop
from mpjax.tasks.adversarial.perturbation import drawn, sizes, slope, unit
from mpjax.tasks.classify import TextClassification
from mpjax.tasks.distill.divergence import divergence
from mpjax.tasks.distill.intermediates import weighted_mean
from mpjax.tasks.labels import Outputs, OutputsOf, encoder_inputs
from mpjax.tasks.language import Language
from mpjax.tasks.pretrain import MaskedLanguage
from mpjax.tasks.regress import TextRegression
from mpjax.tasks.tag import TokenClassification
from mpjax.typing import Array, ArrayLike, Batch, Key, ModelState, Params

OfEncoder = TextClassification | TokenClassification | TextRegression | MaskedLanguage
Task = OfEncoder | Language
Perturbed = Encoder | LanguageModel | Seq2Seq
Losses = dict[str, Array]

_TASKS = "TextClassification, TokenClassification, TextRegression, MaskedLanguage or Language"


class Pass(NamedTuple):
    """One forward pass: the task's losses in float32, the encoder's outputs, the state."""

    losses: Losses
    outputs: Outputs
    state: ModelState

    @property
    def total(self) -> Array:
        """The sum of the losses."""
        return sum(self.losses.values(), start=jnp.float32(0))


def symmetric_divergence(a: Array, b: Array) -> Array:
    r"""Returns $\mathrm{KL}(p \| q) + \mathrm{KL}(q \| p)$ of two arrays of logits, in float32.

    $$\sum_v (p_v - q_v) (\ln p_v - \ln q_v)$$ Gradients go to both.

    Args:
      a: (..., C).
      b: (..., C).

    Example:
      >>> round(float(symmetric_divergence(jnp.zeros(2), jnp.log(jnp.array([0.25, 0.75])))), 4)
      0.2747
    """
    # 16-bit logits of two like distributions have equal tails, and products of differences vanish.
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (a, b))
    neither = (log_p == -jnp.inf) & (log_q == -jnp.inf)  # a class that is left out
    log_p, log_q = (jnp.where(neither, 0.0, x) for x in (log_p, log_q))
    return jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1)


def _square(a: Array, b: Array) -> Array:
    """The squared difference of two numbers, (..., 1), in float32 as their loss is."""
    return jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Adversarial:
    r"""A task whose token embeddings are perturbed, each example against its own loss.

    An offset (B, T, D) is added to the rows of the token table, in float32. The inner gradient is
    taken of the loss times the loss scale, divided by it, and normed per example in float32,
    whatever the Precision. An example whose inner gradient is not finite is not moved by it.

    Metrics: `loss/clean` and `loss/adversarial`, `loss/smoothness`, `loss/proximal` or
    `loss/consistency` where there are several, each with its weight; `adversarial/norm`, the mean
    Euclidean norm of the examples' perturbations; `adversarial/nonfinite`, the number of examples
    with an inner gradient that was not finite, of microbatches the mean.

    Args:
      task: `TextClassification`, `TokenClassification`, `TextRegression`, `MaskedLanguage`, or
        `Language` (of an encoder-decoder the source is perturbed).
      method: `FGM`, `PGD`, `FreeLB`, `SMART`, `VAT` or `RDrop`; `Language` takes the first three.
      special: ids of tokens that are never perturbed, such as those of `WordPiece.special`; padding
        (`keep`) never is.

    Raises:
      ConfigError: a task or method of another kind, ids that are none.

    Example:
      >>> from mpjax.models import encoder
      >>> from mpjax.tasks.adversarial.methods import FGM
      >>> model = encoder("bert-tiny", layers=1, width=16, heads=2, head="class")
      >>> task = Adversarial(TextClassification(("no", "yes")), FGM(0.1), special=(0, 1))
      >>> objective = task.objective(model)
      >>> batch = {"ids": jnp.array([[0, 5, 6, 1]]), "labels": jnp.array([1])}
      >>> found = objective.terms(model.init(jax.random.key(0)), batch)
      >>> sorted(found.losses), round(float(found.metrics["adversarial/norm"]), 4)
      (['adversarial', 'clean'], 0.1)
    """

    task: Task
    method: Method
    special: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise ConfigError(f"adversarial: the task is {brief(self.task)}; give {_TASKS}")
        if not isinstance(self.method, Method):
            known = " ".join(kind.__name__ for kind in get_args(Method))
            raise ConfigError(
                f"adversarial: unknown method {brief(self.method)}; give one of {known}, as"
                " PGD(epsilon=0.5)"
            )
        if isinstance(self.task, Language) and isinstance(self.method, SMART | VAT | RDrop):
            raise ConfigError(
                f"adversarial: {type(self.method).__name__} compares an encoder's predictions, and"
                " the task is Language; take FGM, PGD or FreeLB"
            )
        ids = self.special
        whole = isinstance(ids, tuple) and all(isinstance(i, int | np.integer) for i in ids)
        if not whole or any(i < 0 or isinstance(i, bool) for i in ids):
            raise ConfigError(
                f"adversarial: special={brief(ids)} is no tuple of token ids; give those of your"
                " tokenizer's special tokens, or () if it has none"
            )

    def objective(self, model: Perturbed) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`.

        Raises:
          ConfigError: a model without token embeddings, or of another kind than the task's; R-Drop
            of a model without dropout.
        """
        self._check(model)
        own, forward = self._forward(model)
        method = self.method
        proximal = getattr(method, "proximal", 0.0)

        def terms(
            params: Params,
            batch: Batch,
            *,
            state: ModelState = None,
            key: Key | None = None,
            train: bool = False,
            loss_scale: ArrayLike = 1.0,
            average: Params | None = None,
        ) -> ops.Terms:
            batch = read_batch(model, batch)
            # An inner pass is not differentiated by weights, and leaves no trace in the state.
            held, before = jax.lax.stop_gradient((params, state))

            def outer(state: ModelState, offset: Array | None = None, key: Any = key) -> Pass:
                return forward(params, batch, offset, state=state, key=key, train=train)

            def inner(offset: Array) -> Pass:
                return forward(held, batch, offset, state=before, key=key, train=train)

            if isinstance(method, RDrop):
                return self._two_passes(outer, batch, state, key)
            at = _Start(self._room(batch), model.config.width, key, loss_scale)
            if isinstance(method, SMART | VAT):
                found, clean = self._smooth(outer, inner, batch, state, at)
                if not proximal:
                    return found
                anchor = held if average is None else average
                past = forward(anchor, batch, None, state=before, key=key, train=train)
                apart = self._apart(clean, jax.lax.stop_gradient(past.outputs), batch)
                return found._replace(losses=found.losses | _named("proximal", apart, proximal))
            return self._ascent(outer, inner, state, at)

        return ops.Objective.of_terms(
            terms, self._count(own), takes_scale=True, check=own.check,
            average=method.decay if proximal else None,  # type: ignore[union-attr]  # SMART's
        )  # fmt: skip

    def _check(self, model: object) -> None:
        speaks = isinstance(self.task, Language)
        if not isinstance(model, LanguageModel | Seq2Seq if speaks else Encoder):
            raise ConfigError(
                f"adversarial: the model is {brief(type(model).__name__)}, and"
                f" {type(self.task).__name__} perturbs the token embeddings of"
                f" {'a language model' if speaks else 'an encoder'}; make one with mpjax.models"
            )
        if isinstance(self.method, RDrop) and not model.config.dropout:
            raise ConfigError(
                "adversarial: RDrop compares two passes, which are alike in a model with dropout=0;"
                " make it with dropout=0.1"
            )

    def _forward(self, model: Any) -> tuple[ops.Objective, Callable[..., Pass]]:
        """The task's objective, and a function to one forward pass at an offset."""
        if isinstance(self.task, Language):
            own = self.task.objective(model)
            name = "source_offset" if isinstance(model, Seq2Seq) else "offset"

            def speak(params: Params, batch: Batch, offset: Array | None, **options: Any) -> Pass:
                moved = batch if offset is None else batch | {name: offset}
                loss, state = own.loss(params, moved, **options)
                return Pass({"": loss.astype(jnp.float32)}, {}, state)

            return own, speak
        judge = self.task.objective(OutputsOf(model))  # type: ignore[arg-type]  # see there

        def read(params: Params, batch: Batch, offset: Array | None, **options: Any) -> Pass:
            inputs = encoder_inputs(batch) | ({} if offset is None else {"offset": offset})
            outputs, state = model.apply(params, inputs, **options)
            if judge.terms is None:
                found: Losses = {"": judge(outputs, batch)[0]}
            else:
                found = judge.terms(outputs, batch).losses
            # Terms of several dtypes are summed.
            return Pass({n: x.astype(jnp.float32) for n, x in found.items()}, outputs, state)

        return judge, read

    def _room(self, batch: Batch) -> Array:
        """Which tokens may be moved, (B, T)."""
        if "segments" in batch:
            raise ConfigError(
                "adversarial: an offset is as large as epsilon in each row, and segments pack"
                " several texts into one; give one a row, as bucket_batches does"
            )
        tokens, keep = "ids", "keep"
        if isinstance(self.task, Language):
            tokens, keep = ("source", "source_keep") if "source" in batch else ("inputs", "keep")
        ids = as_ids(field(batch, tokens, "adversarial"), "adversarial")
        return room(ids, keep_of(batch, "adversarial", keep=keep), self.special)

    def _ascent(
        self, outer: Callable[..., Pass], inner: Callable[[Array], Pass], state: ModelState,
        at: _Start,
    ) -> ops.Terms:  # fmt: skip
        """The task's own loss, clean and where it is larger."""
        method: Any = self.method
        losses: Losses = {}
        if method.clean:
            clean = outer(state)
            state, losses = clean.state, _named("clean", clean.losses, method.clean)
        walks = isinstance(method, FreeLB)
        first = method.epsilon * at.drawn("uniform") if walks else at.zeros
        moves = method.steps - walks
        offsets, finite_B = at.climbed(lambda x: inner(x).total, first, method, moves)
        trained = offsets if walks else offsets[-1:]
        for offset in trained:
            found = outer(state, offset)
            state = found.state
            for name, loss in _named("adversarial", found.losses, method.weight).items():
                losses[name] = losses.get(name, jnp.float32(0)) + loss / len(trained)
        return ops.Terms(losses, state, _metrics(trained[-1], finite_B))

    def _smooth(
        self, outer: Callable[..., Pass], inner: Callable[[Array], Pass], batch: Batch,
        state: ModelState, at: _Start,
    ) -> tuple[ops.Terms, Outputs]:  # fmt: skip
        """The task's own loss, how far predictions are from those at an offset, and these."""
        method: Any = self.method
        clean = outer(state)
        answers = jax.lax.stop_gradient(clean.outputs)

        def change(offset: Array) -> Array:
            apart = self._apart(inner(offset).outputs, answers, batch)
            return sum(apart.values(), start=jnp.float32(0))

        noise = at.drawn("normal")
        first = method.noise * noise if isinstance(method, SMART) else method.xi * unit(noise)
        offsets, finite_B = at.climbed(change, first, method, method.steps)
        last = offsets[-1] if isinstance(method, SMART) else method.epsilon * unit(offsets[-1])
        found = outer(clean.state, last)
        target = clean.outputs if isinstance(method, SMART) else answers
        apart = self._apart(found.outputs, target, batch)
        losses = _named("clean", clean.losses) | _named("smoothness", apart, method.weight)
        return ops.Terms(losses, found.state, _metrics(last, finite_B)), clean.outputs

    def _two_passes(
        self, outer: Callable[..., Pass], batch: Batch, state: ModelState, key: Key | None
    ) -> ops.Terms:
        """The mean of the task's losses under two draws of dropout, and how far these are apart."""
        first = outer(state)
        second = outer(first.state, key=None if key is None else part_key(key, "second"))
        mean = {name: (loss + second.losses[name]) / 2 for name, loss in first.losses.items()}
        apart = self._apart(first.outputs, second.outputs, batch)
        weight = self.method.weight
        losses = _named("clean", mean) | _named("consistency", apart, weight)
        return ops.Terms(losses, second.state)

    def _each(self, a: Array, b: Array) -> Array:
        """How far two predictions are apart, a number for each target."""
        if isinstance(self.task, TextRegression):
            return _square(a, b)
        if isinstance(self.method, VAT):
            return divergence(a, b)
        return (0.5 if isinstance(self.method, RDrop) else 1.0) * symmetric_divergence(a, b)

    @property
    def _outputs(self) -> dict[str, str]:
        """Name of a loss -> that of the output that it is of."""
        task: Any = self.task
        if not isinstance(task, MaskedLanguage):
            return {"": task.output}
        return {
            n: o for n, o in zip(("masked", "next"), task.outputs, strict=True) if n in task.weights
        }

    def _apart(self, a: Outputs, b: Outputs, batch: Batch) -> Losses:
        """The mean over targets of how far two predictions are apart, by name of the loss."""
        found = {}
        for name, output in self._outputs.items():
            each = self._each(a[output], b[output])
            found[name] = weighted_mean(each, self._weights(name, batch))
        return found

    def _weights(self, name: str, batch: Batch) -> Array:
        """How much each prediction counts: (B,) of texts, all of them; (B, T) of tokens."""
        ids, labels = field(batch, "ids", "encoder"), batch.get("labels")
        if name == "masked" or isinstance(self.task, TokenClassification):
            chosen = encoder_inputs(batch).get("keep") if labels is None else labels != IGNORE
            chosen = jnp.ones(ids.shape) if chosen is None else jnp.asarray(chosen)
        else:
            chosen = jnp.ones(ids.shape[:1])
        chosen = chosen.astype(jnp.float32)
        weighs = isinstance(self.task, TextClassification | TokenClassification)
        weights = batch.get("weights") if weighs else None  # as in the task's own loss
        return chosen if weights is None else chosen * jnp.asarray(weights).astype(jnp.float32)

    def _count(self, own: ops.Objective) -> Callable[[Batch], Losses]:
        def count(batch: Batch) -> Losses:
            number: Any = own.count(batch)
            of_task = number if isinstance(number, dict) else {"": number}
            of_task = {n: jnp.float32(1) if x is None else x for n, x in of_task.items()}
            found = _named("clean", of_task) if getattr(self.method, "clean", 1.0) else {}
            if not isinstance(self.method, SMART | VAT | RDrop):
                return found | _named("adversarial", of_task)
            apart = {name: jnp.sum(self._weights(name, batch)) for name in self._outputs}
            kind = "consistency" if isinstance(self.method, RDrop) else "smoothness"
            found |= _named("proximal", apart) if getattr(self.method, "proximal", 0.0) else {}
            return found | _named(kind, apart)

        return count


class _Start(NamedTuple):
    """Where an offset begins, and how it climbs.

    Args:
      room_BT: which tokens may be moved.
      width: features D.
      key: of the draw, or None.
      loss_scale: of inner gradients.
    """

    room_BT: Array
    width: int
    key: Key | None
    loss_scale: ArrayLike

    @property
    def zeros(self) -> Array:
        """No offset."""
        return jnp.zeros((*self.room_BT.shape, self.width), jnp.float32)

    def drawn(self, kind: str) -> Array:
        """A random offset."""
        if self.key is None:
            raise ConfigError("adversarial: the method draws its first offset; pass key=")
        return drawn(part_key(self.key, "offset"), self.room_BT, self.width, kind)

    def climbed(
        self, loss: Callable[[Array], Array], first: Array, method: Any, moves: int
    ) -> tuple[list[Array], Array]:
        """The offsets before and after each move, and which examples could be moved.

        An example whose gradient is not finite has no offset from then on.
        """
        offsets, finite_B = [first], jnp.ones(self.room_BT.shape[0], bool)
        for _ in range(moves):
            found = slope(loss, offsets[-1], self.room_BT, self.loss_scale)
            finite_B &= found.finite_B
            moved = method.moved(offsets[-1], found.gradient_BTD)
            offsets.append(jnp.where(finite_B[:, None, None], moved, jnp.zeros_like(moved)))
        return offsets, finite_B


def room(ids_BT: Array, keep_BT: ArrayLike | None, special: tuple[int, ...]) -> Array:
    """Returns which tokens may be moved: no padding, and none with one of the special ids.

    Example:
      >>> room(jnp.array([[2, 7, 3, 0]]), jnp.array([[1, 1, 1, 0]]), (2, 3)).tolist()
      [[False, True, False, False]]
    """
    found = ~jnp.isin(ids_BT, jnp.asarray(special, ids_BT.dtype))
    return found if keep_BT is None else found & jnp.asarray(keep_BT).astype(bool)


def _named(kind: str, losses: Losses, weight: float = 1.0) -> Losses:
    """Losses of a task by what they are of."""
    return {f"{kind}/{n}" if n else kind: weight * loss for n, loss in losses.items()}


def _metrics(offset_BTD: Array, finite_B: Array) -> dict[str, Array]:
    return {
        "adversarial/norm": jnp.mean(sizes(offset_BTD)),
        "adversarial/nonfinite": jnp.sum(~finite_B, dtype=jnp.float32),
    }
