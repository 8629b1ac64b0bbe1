"""From a plan file's settings to the stages that `mpjax.train.stages.run_stages` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common import (
    finetune,
    launch,  # sets XLA flags before JAX starts  # noqa: F401
)
from common.stage_plan import (
    Classify,
    Distil,
    Layers,
    Masked,
    Named,
    NextToken,
    Plan,
    Prune,
    Quantise,
    Trained,
)
from common.stage_work import WORKS, Work

import jax  # isort: skip
from mpjax.errors import ConfigError
from mpjax.finetuning import Tuned
from mpjax.models import decoder, encoder, quantize_weights
from mpjax.optim import make_optimizer, prune_weights, pruned
from mpjax.tasks import Distillation
from mpjax.train import build, check_batch, parse_mesh
from mpjax.train.stages import Edit, Finished, Stage, Training
from mpjax.typing import Params, PyTree, Settings


@dataclasses.dataclass(frozen=True)
class Part:
    """A stage of a plan with what it trains on.

    Args:
      plan: the plan.
      stage: its settings.
      work: what it trains on, or what its weights are judged on.
      sizes: fields of the model's config that the plan says.
      steps_before: steps whose count of the schedule goes on.
      context: tokens of the longest sequence of all stages.
      source: the stage whose weights it goes on from, if any.
      teacher: of a distillation.
    """

    plan: Plan
    stage: Named
    work: Work
    sizes: Settings
    steps_before: int
    context: int
    source: Part | None
    teacher: Part | None

    def model(self, precision: Any) -> Any:
        """Returns the model in a Precision."""
        changes = {k: v for k, v in self.sizes.items() if k not in ("family", "size")}
        changes |= {"vocabulary": self.work.tokenizer.vocab_size} | self.work.model
        changes.setdefault("context", self.context)
        make: Any = encoder if self.plan.family == "encoder" else decoder
        return make(self.sizes["size"], precision, **changes)

    def judge(self) -> Any:
        """Returns weights -> scores."""
        return self.work.judge(self.model(self.plan.eval_precision))

    def make(self, weights: Mapping[str, Params]) -> Training | Edit:
        """Returns what the stage trains or makes of the weights that it reads."""
        stage = self.stage
        if not self.trains:
            return Edit(self._edited(weights[stage.source]), self.judge())
        assert isinstance(stage, Trained)
        schedule = finetune.read_schedule(stage.precision, stage.steps)
        optimizer = make_optimizer(
            stage.optimizer, stage.lr, schedule=stage.schedule,
            steps=self.steps_before + stage.steps, warmup=stage.warmup or 0,
            weight_decay=stage.weight_decay,
        )  # fmt: skip
        if isinstance(stage, Prune):
            optimizer = pruned(
                optimizer, stage.sparsity, scope=stage.scope, begin=stage.steps // 4,
                end=3 * stage.steps // 4, every=max(1, stage.steps // 20),
            )  # fmt: skip
        task = self.work.task
        if isinstance(stage, Distil):
            assert self.teacher is not None
            precision = stage.teacher_precision or self.plan.eval_precision
            task = Distillation(
                task, self.teacher.model(precision), weights[stage.teacher],
                temperature=stage.temperature, soft=stage.soft, hard=stage.hard,
                kind=stage.divergence,
            )  # fmt: skip
        mesh = parse_mesh(self.plan.mesh) if self.plan.mesh else None
        check_batch(stage.batch, stage.accumulate, mesh)
        state, step = build(
            self.model(schedule.first), optimizer, mesh, seed=self.plan.seed, clip=stage.clip,
            accumulate=stage.accumulate, objective=task.objective, schedule=schedule,
        )  # fmt: skip
        data = self.work.data(stage.batch, self.plan.seed)
        return Training(state, step, data, stage.steps, self.judge(), self.plan.seed)

    def _edited(self, params: Params) -> Params:
        stage = self.stage
        if isinstance(stage, Quantise):
            return quantize_weights(params, stage.storage, rules=stage.rules)
        if isinstance(stage, Layers):
            return _layers(params, stage.layers)
        assert isinstance(stage, Prune)
        return prune_weights(params, stage.sparsity, scope=stage.scope)

    def as_run(self, ended: Finished) -> Tuned:
        """Returns the stage, which has ended, as a run that answers and is exported."""
        learned: Named = self.stage
        part: Part | None = self
        while type(learned) not in WORKS and part is not None:  # whose data these are
            part = part.teacher or part.source
            learned = part.stage if part else learned
        task = {Masked: "masked", Classify: "classify", NextToken: "lm"}.get(type(learned))
        settings = {
            "task": task or "instruct", "text": "", "second": "", "longest": self.work.context,
            "prompt": getattr(learned, "prompt", ""),
        }  # fmt: skip
        return Tuned(
            ended.folder, self.model(self.plan.eval_precision), ended.weights(),
            self.work.tokenizer, self.work.task, settings, ended.steps, ended.scores,
        )  # fmt: skip

    @property
    def trains(self) -> bool:
        """Whether it has steps."""
        return getattr(self.stage, "steps", 0) > 0

    def as_stage(self) -> Stage:
        """Returns the stage for `run_stages`."""
        stage, new, taken = self.stage, tuple[str, ...](), self.trains and self.source is not None
        settings = dataclasses.asdict(stage) | {
            "plan": {k: v for k, v in dataclasses.asdict(self.plan).items() if k != "stages"},
            "data_hash": self.work.fingerprint,
        }
        for name in ("name", "take", "source"):  # the Stage's own
            settings.pop(name, None)
        if not settings.get("pack", True):  # folders from before it existed can go on
            del settings["pack"]
        try:
            settings["model"] = dataclasses.asdict(self.model(self.plan.eval_precision).config)
            if isinstance(stage, Trained) and self.trains:
                schedule = finetune.read_schedule(stage.precision, stage.steps)
                settings["precision_resolved"] = schedule.to_dict()
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from None
        if taken and self.source is not None:
            heads = [one.work.model for one in (self, self.source)]
            if heads[0] != heads[1] and heads[0].get("head") == heads[1].get("head"):
                new = ("encoder/class",)  # of other classes, however many
        reads: tuple[str, ...] = () if self.trains else (stage.source,)
        if isinstance(stage, Distil):
            reads = (stage.teacher,)
        return Stage(
            stage.name, self.make, getattr(stage, "take", "") if taken else "nothing",
            stage.source if taken else "", reads, new, settings,
        )  # fmt: skip


def _layers(params: PyTree, chosen: tuple[int, ...]) -> PyTree:
    """Some of the layers, which are stacked along the first axis of what lies below `layers`."""
    (root,) = params
    stack = params[root]["layers"]
    count = jax.tree.leaves(stack)[0].shape[0]
    if not chosen or not all(0 <= n < count for n in chosen):
        raise ConfigError(f"layers = {list(chosen)}: there are {count}, 0 to {count - 1}")
    index = jax.numpy.asarray(chosen)
    return {root: params[root] | {"layers": jax.tree.map(lambda x: x[index], stack)}}


def parts_of(plan: Plan) -> list[Part]:
    """Reads the data of all stages, and says what each goes on from.

    Raises:
      ConfigError: data that cannot be read, or stages that do not fit.
    """
    works: dict[str, Work] = {}
    for stage in plan.stages:
        works[stage.name] = _work(stage, plan, works)
    context = max(work.context for work in works.values())
    found: dict[str, Part] = {}
    for stage in plan.stages:
        goes_on = getattr(stage, "take", "weights") != "nothing"
        source = found[stage.source] if goes_on else None
        teacher = found[stage.teacher] if isinstance(stage, Distil) else None
        work, before = works[stage.name], 0
        if source and teacher and source.work.tokenizer is not work.tokenizer:
            raise ConfigError(
                f"stage {stage.name!r}: {stage.source!r} and the teacher {stage.teacher!r} have"  # type: ignore[attr-defined]
                " different tokenizers; take nothing, or weights of a stage with the teacher's"
            )
        sizes = (source.sizes if source else plan.model) | getattr(stage, "model", {})
        if isinstance(stage, Layers):
            sizes = sizes | {"layers": len(stage.layers)}
        if sizes.get("context", context) < context:
            raise ConfigError(
                f"stage {stage.name!r}: context = {sizes['context']} and a sequence of {context}"
                " tokens; raise it, or leave it out"
            )
        if source and getattr(stage, "take", "") == "weights+moments":
            before = source.steps_before + getattr(source.stage, "steps", 0)
        found[stage.name] = Part(plan, stage, work, sizes, before, context, source, teacher)
    return list(found.values())


def _work(stage: Named, plan: Plan, works: Mapping[str, Work]) -> Work:
    """What a stage trains on: data of its own, or what its teacher or source did."""
    if type(stage) not in WORKS:
        return works[stage.teacher if isinstance(stage, Distil) else stage.source]
    where, (family, read) = f"stage {stage.name!r}", WORKS[type(stage)]
    if family != plan.family:
        raise ConfigError(
            f"{where}: {stage.kind} trains a model of the family {family}, and the plan's is"
            f" {plan.family}; change one"
        )
    own = getattr(stage, "tokenizer", "") or not stage.source
    try:
        return read(stage, plan, None if own else works[stage.source].tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
