"""What the fine-tuning experiments share: a checkpoint, arms in several precisions, a report."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

from common import (
    finished,
    launch,  # sets XLA flags before JAX starts
)

import jax  # isort: skip
import numpy as np
import optax
from rich.console import Console

from common.datasets.assets import asset_names, fetch
from common.finetune_report import Arm
from mpjax.data import Batch, WordPiece, bucket_batches, parse_wordpiece, train_wordpiece
from mpjax.data.buckets import Example
from mpjax.errors import ConfigError
from mpjax.finetuning.fine_tune import read_precision
from mpjax.models import EncoderConfig, encoder
from mpjax.models.hf import load_checkpoint, open_checkpoint
from mpjax.ops import Objective
from mpjax.optim import make_optimizer
from mpjax.precision import Precision, PrecisionSchedule, get_precision
from mpjax.train import (
    SwitchingStep,
    TrainStep,
    build,
    bytes_per_parameter,
    fit,
    manifest,
    with_weights,
)
from mpjax.train.report import how_products_run
from mpjax.typing import Params, Settings

console = Console(stderr=True)
Network: TypeAlias = Any  # a Decoder, an Encoder or a Seq2Seq, whichever the task is of


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is fine-tuned, and how."""

    checkpoint: str = "minilm"
    """An asset, a folder or a name on the Hugging Face Hub; `none` trains a small one anew."""
    precision: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp8")
    """Precisions, or schedules such as late:fp8:bf16:0.2; others are compared with the first."""
    eval_precision: str = "fp32"
    """Precision that judges all of them."""
    layers: int = 2
    """Blocks, without a checkpoint."""
    width: int = 64
    """Width, without a checkpoint."""
    heads: int = 4
    """Attention heads, without a checkpoint."""
    vocabulary: int = 2000
    """Ids of the tokenizer, which is then trained on the training texts."""
    dropout: float = 0.1
    """Rate in training."""
    lengths: tuple[int, ...] = (32, 64, 128, 192)
    """Tokens that texts are padded to; a step is compiled for each. Longer texts are cut."""
    batch: int = 32
    """Texts a step."""
    steps: int = 124
    """Steps a run."""
    lr: float = 1e-4
    """Peak learning rate."""
    schedule: str = "linear"
    """`constant`, `linear`, `cosine` or `wsd`."""
    WARMUP: ClassVar[int] = 12
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 12, or half of the steps if these are fewer."""
    weight_decay: float = 0.01
    """Decoupled, on matrices."""
    clip: float = 1.0
    """Largest global gradient norm."""
    seeds: int = 3
    """Seeds an arm; the n-th seed has the same new weights, batches and dropout in every arm."""
    fresh: bool = False
    """Train again the runs that --out holds; without it those that have ended are taken as they
    are, so that an interrupted comparison goes on."""


def check(config: Any) -> None:
    """Checks numbers, before anything is read."""
    launch.positive(
        config, "layers", "width", "heads", "vocabulary", "lengths", "batch", "steps", "lr",
        "clip", "seeds",
    )  # fmt: skip
    launch.not_negative(config, "warmup", "weight_decay", "dropout")
    launch.not_empty(config, "precision", "lengths")
    launch.distinct(config, "precision")


def read_schedule(text: str, steps: int) -> PrecisionSchedule:
    """Returns the schedule of an arm; a Precision is one that never switches."""
    return read_precision(text).over(steps)


class Task(Protocol):
    """What is trained; those of `mpjax.tasks`."""

    @property
    def objective(self) -> Callable[[Network], Objective]: ...


class Beginning(Protocol):
    """What every run of an experiment starts from."""

    def model(self, precision: str | Precision, vocabulary: int) -> Network:
        """Returns the model in a Precision."""
        ...

    def params(self, model: Network, seed: int) -> Params:
        """Returns the parameters that a seed's run begins with."""
        ...


# Heads that a checkpoint may have, and what their tensors begin with.
_PRETRAINED = {"masked": "cls.predictions.", "next": "cls.seq_relationship."}
_HEADS = _PRETRAINED | {"labels": "classifier."}
_POOLER = "*pooler*"  # tensors of BERT's pooler


@dataclasses.dataclass(frozen=True)
class Start:
    """Where every run starts: a checkpoint with a new head, or new weights.

    Args:
      config: the settings.
      head: name of the encoder's head.
      classes: outputs of the head.
      texts: on which a tokenizer is trained where there is no checkpoint.
      pool: what a head of whole texts takes of them, as of EncoderConfig.
      labels: names of the classes, which an export of the model writes.
      task_heads: new heads of several tasks, as of EncoderConfig.
    """

    config: Any
    head: str
    classes: int
    texts: Sequence[str]
    pool: str = "first"
    labels: tuple[str, ...] = ()
    task_heads: tuple[str, ...] = ()

    @property
    def source(self) -> str | Path | None:
        """The checkpoint, fetched."""
        name = self.config.checkpoint
        return None if name == "none" else fetch(name) if name in asset_names() else name

    def pieces(self) -> WordPiece:
        """Returns the tokenizer."""
        if (source := self.source) is None:
            return train_wordpiece(self.texts, self.config.vocabulary)
        text = open_checkpoint(source).tokenizer_json()
        if text is None:
            raise ConfigError(f"checkpoint {str(source)!r}: no tokenizer.json beside it; add one")
        return parse_wordpiece(text, f"checkpoint {str(source)!r}")

    def model(self, precision: str | Precision, vocabulary: int) -> Network:
        """Returns the model in a Precision."""
        config = self.config
        if self.source is not None:
            return self._loaded(precision, 0)[0]
        return encoder(
            "bert-tiny", precision, vocabulary=vocabulary, layers=config.layers,
            width=config.width, heads=config.heads, context=max(config.lengths), **self._changes,
        )  # fmt: skip

    def params(self, model: Network, seed: int) -> Params:
        """Returns the parameters that a seed's run begins with."""
        if self.source is not None:
            return self._loaded(model.precision, seed)[1]
        return jax.jit(model.init)(jax.random.key(seed))

    @property
    def _changes(self) -> Settings:
        return {
            "head": self.head, "classes": self.classes, "dropout": self.config.dropout,
            "pool": self.pool, "labels": self.labels, "task_heads": self.task_heads,
        }  # fmt: skip

    def _loaded(self, precision: str | Precision, seed: int) -> tuple[Network, Params]:
        checkpoint = open_checkpoint(self.source or "")
        held = {
            own: theirs
            for own, theirs in _HEADS.items()
            if any(name.startswith(theirs) for name in checkpoint.tensors)
        }
        wanted = tuple(_PRETRAINED) if self.head == "pretrain" else (self.head,)
        new = [head for head in wanted if head not in held and head != "none"]
        new += ["task_heads"] if self.task_heads else []
        unused = [f"{theirs}*" for own, theirs in held.items() if own not in wanted]
        pooler = self.pool == "first" and EncoderConfig(head=self.head).pools
        if not pooler and fnmatch.filter(checkpoint.tensors, _POOLER):
            unused.append(_POOLER)
        return load_checkpoint(
            checkpoint, precision, new=[f"encoder/{head}/**" for head in new],
            key=jax.random.key(seed), unused=unused, **self._changes,
        )  # fmt: skip


Judge = Callable[[Params], tuple[dict[str, float], np.ndarray]]  # params -> scores, which are right
Keep = Callable[[str, int, Network, Params], None]
Again = Callable[[str, int], bool]
Change = Callable[[Batch, np.random.Generator], Batch]
Batches = Callable[[int], Iterator[Batch]]


# settings that change no run
CHOOSING = ("seeds", "precision", "export", "augment", "methods", "teacher_weights", "top")


def page_of(
    label: str, config: Any, schedule: PrecisionSchedule, model: Network, seed: int, out: Path,
    again: Again = lambda *_: False,
) -> tuple[Path, Settings]:  # fmt: skip
    """Returns the folder of a run and its manifest."""
    folder = out / re.sub("[:/ ]", "_", label) / f"seed{seed}"
    settings = launch.settings(config, seed=seed, fresh=config.fresh or again(label, seed))
    found = how_products_run(model.recipes.values(), config.batch * max(config.lengths))
    return folder, manifest(schedule.first, settings, model.paths, found, schedule=schedule)


def run_arm(
    label: str, config: Any, task: Task, start: Beginning, examples: Sequence[Example],
    vocabulary: int, judge: Judge, out: Path, keep: Keep = lambda *_: None,
    change: Change = lambda batch, draw: batch, again: Again = lambda *_: False,
    batches: Batches | None = None, name: str = "", reference: str = "",
) -> Arm:  # fmt: skip
    """Trains one arm under each seed; its step is compiled once for each length.

    Args:
      label: the arm's Precision or schedule, as the user wrote it.
      config: the settings.
      task: whose `objective` is trained.
      start: where every run starts.
      examples: of the training.
      vocabulary: ids of the tokenizer.
      judge: parameters -> scores with `loss`, and which held-out examples are right.
      out: folder in which each run gets its own.
      keep: called with (label, seed, model, parameters) at the end of each run.
      change: of each batch, as `bucket_batches` takes it, such as masking.
      batches: seed -> batches, in place of those of the examples.
      again: (label, seed) -> whether a run that has ended is trained again, because `keep` or
        `judge` leaves more of it than its scores.
      name: of the arm, if another than its label.
      reference: the arm that it is compared with, if another than the first Precision.
    """
    name = name or label
    schedule = read_schedule(label, config.steps)
    model = start.model(schedule.first, vocabulary)
    _, step = build(
        model, raw_optimizer(config), clip=config.clip, objective=task.objective, schedule=schedule
    )

    def data(seed: int) -> Iterator[Batch]:
        return bucket_batches(
            examples, batch=config.batch, seed=seed, lengths=config.lengths, change=change
        )

    def page(seed: int) -> tuple[Path, Settings]:
        return page_of(name, config, schedule, model, seed, out, again)

    return run_seeds(
        name, reference or config.precision[0], config, step, model, start, batches or data, judge,
        page, functools.partial(keep, name),
    )  # fmt: skip


def run_seeds(
    label: str, reference: str, config: Any, step: TrainStep | SwitchingStep, model: Network,
    start: Beginning, data: Batches, judge: Judge,
    page: Callable[[int], tuple[Path, Settings]],
    keep: Callable[[int, Network, Params], None] = lambda *_: None,
) -> Arm:  # fmt: skip
    """Trains one arm under each seed with a step that is built.

    Args:
      label: of the arm.
      reference: label of the arm that it is compared with.
      config: the settings.
      step: of `mpjax.train.build`.
      model: that it trains.
      start: where every run starts.
      data: seed -> the batches of a run; called where it is trained.
      judge: parameters -> scores with `loss`, and which held-out examples are right.
      page: seed -> folder of a run and its manifest.
      keep: called with (seed, model, parameters) at the end of each run.
    """
    assert step.init is not None
    scores, correct, records, bytes_each = [], [], [], 0.0
    for seed in range(config.seeds):
        folder, manifest_page = page(seed)
        if ended := finished.begin(folder, manifest_page, CHOOSING, console):
            found, history = ended
            right = np.array(found.pop("correct"))
        else:
            state = step.init(seed)
            params = state.params | start.params(model, seed)  # the objective's own weights stay
            state = with_weights(state, params, step.optimizer.init(params, seed))
            with finished.recording(
                folder, manifest_page, label, f"{label}, seed {seed}", config.steps, console
            ) as (writer, report, history):
                state = fit(state, step, data(seed), steps=config.steps, report=report)
            found, right = judge(state.params)
            keep(seed, model, state.params)
            writer.write({"step": config.steps, "validation_loss": found["loss"]} | found)
            writer.close()
            found = found | {"bytes_per_parameter": bytes_per_parameter(state)}
            finished.end(folder, found | {"correct": right.tolist()})
        bytes_each = found.pop("bytes_per_parameter")
        scores.append(found)
        correct.append(right)
        records.append(history)
    losses = [found["loss"] for found in scores]
    outcome = finished.outcome_of(label, reference, losses, records, bytes_each)
    return Arm(label, tuple(scores), np.stack(correct), outcome)


def raw_optimizer(config: Any) -> optax.GradientTransformation:
    """Returns the raw optimizer."""
    return make_optimizer(
        "adamw", config.lr, schedule=config.schedule, steps=config.steps,
        warmup=launch.warmup(config), weight_decay=config.weight_decay,
    )  # fmt: skip


def check_arms(config: Any, task: Task, start: Beginning, vocabulary: int) -> Network:
    """Builds every arm without computing it, so that a mistake in the last comes first.

    Returns:
      The model that judges.
    """
    judging = get_precision(config.eval_precision).name
    for label in config.precision:
        schedule = read_schedule(label, config.steps)
        if schedule.evaluation is not None and schedule.evaluation.name != judging:
            raise ConfigError(
                f"precision: {label} is judged in {schedule.evaluation.name} and all arms in"
                f" {judging}; leave one of them out, or set --eval-precision"
            )
        model = start.model(schedule.first, vocabulary)
        for seed in range(config.seeds):
            finished.check(*page_of(label, config, schedule, model, seed, config.out), CHOOSING)
        jax.eval_shape(lambda m=model, s=schedule: build(
            m, raw_optimizer(config), clip=config.clip, objective=task.objective, schedule=s
        )[0])  # fmt: skip
    if vocabulary > model.config.vocabulary:
        raise ConfigError(
            f"checkpoint: its tokenizer has {vocabulary} ids and its embedding"
            f" {model.config.vocabulary}; take the tokenizer that it was trained with"
        )
    if model.config.context < max(config.lengths):
        raise ConfigError(
            f"lengths: {max(config.lengths)} tokens, the checkpoint has {model.config.context}"
            " positions; lower it"
        )
    return start.model(config.eval_precision, vocabulary)
