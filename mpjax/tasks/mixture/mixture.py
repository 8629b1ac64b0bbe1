"""Several tasks at once: objectives over one encoder, each with a head of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp

from mpjax import ops
from mpjax.data.mixing import TASK, check_weights
from mpjax.errors import ConfigError, brief
from mpjax.models import Encoder
from mpjax.tasks.labels import Outputs, OutputsOf, encoder_fn
from mpjax.tasks.mixture.task_gradients import Combination, GradNorm, gradient_shares
from mpjax.tasks.regress import TextRegression
from mpjax.typing import Array, Batch, Key, ModelState, Params, PyTree

WEIGHTINGS, CONFLICTS = ("fixed", "uncertainty", "gradnorm"), ("add", "pcgrad")


class Task(Protocol):
    """What a mixture is of; the encoder's tasks of `mpjax.tasks` are."""

    @property
    def objective(self) -> Callable[[Any], ops.Objective]:
        """Model -> objective, of what `model.apply(params, inputs)` returns."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    r"""Several tasks over one encoder, $L = \sum_i w_i L_i$.

    The encoder runs once; each task reads its own output of it and its own fields of the batch,
    `NAME/labels` and so on, as `mpjax.data.mixed_batches` makes them. Each $L_i$ is the mean over
    the targets of its task, however many rows of the batch are of it and however the batch is cut
    into microbatches; a task without a target in a batch adds nothing.

    Args:
      tasks: name -> task, or pairs of both. Each names its `output`, such as a task head of the
        encoder.
      weights: name -> $w_i$; None is 1 each.
      weighting: `fixed`; `uncertainty`, which learns $s_i$ and takes $e^{-s_i} w_i L_i +
        \frac{s_i}{2}$ ($\frac12 e^{-s_i}$ of regression); `gradnorm`, or a `GradNorm` with its
        settings.
      conflicts: `add` sums gradients, `pcgrad` projects those that oppose each other first.
      own_scales: whether each task has a loss scale of its own, of the Precision's kind, so that
        none has to fit the gradients of all.

    Raises:
      ConfigError: no task, two of one name, weights that are not positive or that name other tasks,
        an unknown weighting.

    Example:
      >>> import jax
      >>> from mpjax.models import encoder
      >>> from mpjax.tasks import TextClassification, TokenClassification
      >>> mixture = Mixture({
      ...     "mood": TextClassification(("bad", "good"), output="mood"),
      ...     "tags": TokenClassification(("N", "V", "X"), output="tags"),
      ... })
      >>> heads = ("mood=class:2", "tags=token:3")
      >>> model = encoder("bert-tiny", layers=1, width=16, heads=2, task_heads=heads)
      >>> batch = {"ids": jnp.ones((2, 3), jnp.int32), "mood/labels": jnp.array([1, -100])}
      >>> batch |= {"tags/labels": jnp.array([[-100] * 3, [0, 2, 1]])}
      >>> objective = mixture.objective(model)
      >>> sorted(objective.terms(model.init(jax.random.key(0)), batch).losses)
      ['mood', 'tags']

    References:
      Caruana 1997, Multitask Learning; Kendall, Gal and Cipolla 2018, Multi-Task Learning Using
      Uncertainty to Weigh Losses, section 3.2; Chen et al. 2018, GradNorm; Yu et al. 2020, PCGrad.
    """

    tasks: Mapping[str, Task] | Sequence[tuple[str, Task]]
    weights: Mapping[str, float] | None = None
    weighting: str | GradNorm = "fixed"
    conflicts: str = "add"
    own_scales: bool = False

    def __post_init__(self) -> None:
        pairs = list(self.tasks.items() if isinstance(self.tasks, Mapping) else self.tasks)
        if not pairs:
            raise ConfigError("mixture: no task; give a dict of name -> task")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise ConfigError(f"mixture: tasks={brief(self.tasks)}; give a dict of name -> task")
        names = [name for name, _ in pairs]
        for name, task in pairs:
            if names.count(name) > 1:
                raise ConfigError(f"mixture: two tasks are named {name!r}; rename one")
            if not isinstance(name, str) or not name.isidentifier():
                raise ConfigError(f"mixture: the name {brief(name)}; give letters, digits and _")
            if not callable(getattr(task, "objective", None)):
                raise ConfigError(
                    f"mixture: {name} is {brief(task)}; give a task, such as TextClassification"
                )
        object.__setattr__(self, "tasks", dict(pairs))
        if self.weights is not None:
            check_weights("mixture", self.weights, dict(pairs))
        if not isinstance(self.weighting, GradNorm) and self.weighting not in WEIGHTINGS:
            raise ConfigError(
                f"mixture: weighting={brief(self.weighting)} is unknown; known:"
                f" {' '.join(WEIGHTINGS)}"
            )
        if self.conflicts not in CONFLICTS:
            raise ConfigError(
                f"mixture: conflicts={brief(self.conflicts)} is unknown; known:"
                f" {' '.join(CONFLICTS)}"
            )

    @property
    def _tasks(self) -> dict[str, Task]:
        return self.tasks  # type: ignore[return-value]  # __post_init__ made it a dict

    def _view(self, name: str, batch: Batch) -> Batch:
        """A mixed batch as one of its tasks reads it."""
        own = f"{name}/"
        found = {field.removeprefix(own): x for field, x in batch.items() if field.startswith(own)}
        if not found:
            raise ConfigError(
                f"mixture: the batch has no field of {name!r}, such as {own}labels; it has"
                f" {' '.join(batch)}; draw it with mpjax.data.mixed_batches"
            )
        shared = {field: x for field, x in batch.items() if "/" not in field and field != TASK}
        return shared | found

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`.

        Raises:
          ConfigError: a task whose classes are not the model's, or with weights, a loss scale or
            several losses of its own; at the first step, a batch without the fields of a task.
        """
        known: Any = OutputsOf(model)
        objectives = {name: task.objective(known) for name, task in self._tasks.items()}
        for name, own in objectives.items():
            if own.init or own.takes_scale or own.combine:
                raise ConfigError(
                    f"mixture: the objective of {name!r} has weights or gradients of its own, which"
                    " a mixture does not; train it alone"
                )
        run = encoder_fn(model, lambda outputs, batch: outputs)
        learned = self.weighting == "uncertainty"

        def count(batch: Batch) -> dict[str, Array]:
            return {n: _targets(n, own, self._view(n, batch)) for n, own in objectives.items()}

        def terms(
            params: Params, batch: Batch, *, frozen: PyTree = None, state: ModelState = None,
            key: Key | None = None, train: bool = False,
        ) -> ops.Terms:  # fmt: skip
            outputs, state = run(params, batch, state=state, key=key, train=train)
            losses, metrics = {}, {}
            for name, own in objectives.items():
                self._check_output(name, outputs)
                bound: Any = own.bound((frozen or {}).get(name)).loss
                loss, _ = bound(outputs, self._view(name, batch), state=None, key=key, train=train)
                # a weight of 2^-12 would leave float16
                loss = (self.weights or {}).get(name, 1.0) * loss.astype(jnp.float32)
                if learned:
                    s = params["mixture"]["log_variance"][name]
                    half = 0.5 if isinstance(self._tasks[name], TextRegression) else 1.0
                    here = _targets(name, own, self._view(name, batch)) > 0
                    loss = jnp.where(here, half * jnp.exp(-s) * loss + 0.5 * s, 0.0)
                    metrics[f"weight/{name}"] = half * jnp.exp(-s)
                losses[name] = loss
            return ops.Terms(losses, state, metrics)

        frozen = {name: x.frozen for name, x in objectives.items() if x.frozen is not None}
        return ops.Objective.of_terms(
            terms, count, frozen=frozen or None, init=self._init if learned else None,
            combine=self._combination(), check=getattr(model, "check_batch", None),
        )  # fmt: skip

    def gradient_shares(self, model: Encoder) -> Callable[[Params, Batch], dict[str, float]]:
        """Returns a function (params, batch) -> what each task adds to the gradient.

        Of the weighted losses, without dropout; see `mpjax.tasks.gradient_shares`.
        """
        objective = self.objective(model)
        terms: Any = objective.bound(objective.frozen).terms
        return gradient_shares(lambda params, batch: terms(params, batch).losses)

    def _init(self, key: Key) -> Params:
        del key  # each begins with the weight 1
        return {"mixture": {"log_variance": {name: jnp.float32(0) for name in self._tasks}}}

    def _combination(self) -> Combination | None:
        balance = GradNorm() if self.weighting == "gradnorm" else self.weighting
        gradnorm = balance if isinstance(balance, GradNorm) else None
        project = self.conflicts == "pcgrad"
        if not (gradnorm or project or self.own_scales):
            return None
        return Combination(tuple(self._tasks), gradnorm, project, self.own_scales)

    def _check_output(self, name: str, outputs: Outputs) -> None:
        wanted = getattr(self._tasks[name], "output", None)
        if wanted is not None and wanted not in outputs:
            raise ConfigError(
                f"mixture: {name!r} reads the output {wanted!r} and the model has"
                f" {' '.join(outputs)}; make it with task_heads=('{wanted}=class:2',), or name one"
            )


def _targets(name: str, own: ops.Objective, view: Batch) -> Array:
    """How many targets of a batch a task has."""
    found: Any = own.count(view)
    if isinstance(found, dict) and len(found) == 1:
        (found,) = found.values()
    if isinstance(found, dict):
        raise ConfigError(
            f"mixture: {name!r} is a sum of several losses, {' '.join(found)}; give each as a task"
            " of its own"
        )
    if found is None:
        raise ConfigError(
            f"mixture: {name!r} counts all rows alike, and a mixed batch has rows of other tasks;"
            " give its objective a count of its targets"
        )
    return found
