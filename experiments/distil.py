"""What does a small model gain from a large one's answers, and what if either is stored low?

A student with half of its teacher's layers learns the task alone, and then from the teacher:
from one in float32, in int8 and in int4, and in several precisions of its own; a student of
language also from answers that the teacher gave once and that lie on the disk.

Run:       python experiments/distil.py
           python experiments/distil.py --task lm --lengths 128 --batch 8 --lr 1e-3
           python experiments/distil.py --data FILE.tsv --checkpoint none
Expected:  the figures of docs/guides/distil.md. On two cores a run of a classifier takes some
           minutes, one of language beside SmolLM2 half an hour; runs that ended are kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)

import jax  # isort: skip

from common.datasets.assets import asset_names, fetch
from common.datasets.sources import DOCUMENTS, LABELLED
from mpjax.data import load_corpus, load_labelled, validation_batches
from mpjax.data.buckets import Example
from mpjax.errors import ConfigError, need
from mpjax.files import write_text
from mpjax.models import (
    Storage,
    decoder,
    load_weights,
    quantize_weights,
    save_weights,
)
from mpjax.models.hf import load_checkpoint, open_checkpoint
from mpjax.precision import Precision
from mpjax.report import interval
from mpjax.tasks import Distillation, Language, TextClassification, even_layers
from mpjax.typing import Params

_DATA = {"classify": "reviews", "lm": "stdlib"}
_ASSETS = {"classify": "minilm", "lm": "smollm2"}


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Distil a classifier or a language model."""

    task: Literal["classify", "lm"] = "classify"
    """`classify` texts, or `lm`, the next token."""
    data: str = ""
    """Labelled texts (by default `reviews`) or documents (`stdlib`), as the other scripts take."""
    checkpoint: str = ""
    """The teacher: an asset (by default `minilm`, `smollm2`), a folder or a name on the Hub;
    `none` trains one anew. A classifier is fine-tuned first."""
    precision: tuple[str, ...] = ("fp32", "bf16", "fp16")
    """Of the student; the first one learns alone and from every teacher."""
    teacher_weights: tuple[str, ...] = ("f32", "int8", "int4@32")
    """How the teacher's weights are stored; the first one teaches every student."""
    student_layers: int = 0
    """Blocks of the student; 0: half of the teacher's, or --layers beside a checkpoint of `lm`."""
    student_width: int = 256
    """Width of a student of language; a classifier takes weights of the teacher's own layers."""
    temperature: float = 2.0
    """Of both distributions."""
    soft: float = 1.0
    """Weight of the teacher's answers."""
    hard: float = 1.0
    """Weight of the labels."""
    hidden: float = 0.0
    """Weight of hidden states."""
    relations: float = 0.0
    """Weight of the relations of queries, keys and values."""
    top: int = 64
    """Classes of a stored answer, in the last arm of `lm`; 0 leaves the arm out."""
    labelled: int = 0
    """Texts of `classify` whose labels are known; 0: all. The teacher and the student alone learn
    from these; students beside a teacher read all texts and no label, which wants `--hard 0`."""
    windows: int = 0
    """Windows of the training text of `lm`, each of the longest of --lengths; 0 takes as many as
    the steps read."""
    out: Path = Path("runs/distil")
    """Folder of the report and of all runs."""


class Half:
    """A classifier that begins with some layers of the teacher's checkpoint, and a new head."""

    def __init__(self, start: finetune.Start, layers: int) -> None:
        self._start, self._layers = start, layers

    def model(self, precision: str | Precision, vocabulary: int) -> Any:
        model = self._start.model(precision, vocabulary)
        layers = self._layers or max(1, model.config.layers // 2)
        config = dataclasses.replace(model.config, layers=layers)
        return dataclasses.replace(model, config=config)

    def params(self, model: Any, seed: int) -> Params:
        whole = self._start.model(model.precision, model.config.vocabulary)
        params = self._start.params(whole, seed)
        pairs = even_layers(model.config.layers, whole.config.layers)
        chosen = np.array([of for _, of in pairs])
        layers = jax.tree.map(lambda w: w[chosen], params["encoder"]["layers"])
        return params | {"encoder": params["encoder"] | {"layers": layers}}


class Speaker:
    """A decoder with new weights."""

    def __init__(self, layers: int, width: int, config: Config) -> None:
        self._layers, self._width, self._config = layers, width, config

    def model(self, precision: str | Precision, vocabulary: int) -> Any:
        c = self._config
        return decoder(
            "small", precision, layers=self._layers, width=self._width, heads=c.heads,
            vocabulary=vocabulary, context=max(c.lengths),
        )  # fmt: skip

    def params(self, model: Any, seed: int) -> Params:
        return jax.jit(model.init)(jax.random.key(seed))


@dataclasses.dataclass(frozen=True)
class Course:
    """What all arms learn: the task, its examples, who is judged how, and both models.

    Args:
      task: of the labels.
      start: of the student.
      teacher: and its weights.
      examples: of the training, beside a teacher.
      labelled: of the training alone.
      vocabulary: ids of the tokenizer.
      judge: model -> what `run_arm` judges with.
      score: what is compared, of which more is better.
    """

    task: Any
    start: finetune.Beginning
    teacher: tuple[Any, Params]
    examples: Sequence[Example]
    labelled: Sequence[Example]
    vocabulary: int
    judge: Callable[[Any], finetune.Judge]
    score: str


def distilled(config: Config, task: Any, teacher: Any, params: Params) -> Distillation:
    """The task of a student beside a teacher."""
    return Distillation(
        task, teacher, params, config.temperature, config.soft, config.hard,
        hidden=config.hidden, relations=config.relations, relation_heads=teacher.config.heads,
    )  # fmt: skip


def trained(
    config: Config, task: Any, start: finetune.Beginning, examples: Sequence[Example],
    vocabulary: int, judge: finetune.Judge,
) -> tuple[Any, Params]:  # fmt: skip
    """A teacher that learned the task itself, once; its weights lie in --out."""
    path = config.out / "teacher.safetensors"
    only = dataclasses.replace(config, seeds=1)

    def keep(name: str, seed: int, model: Any, params: Params) -> None:
        save_weights(params, path)

    finetune.run_arm(
        "fp32", only, task, start, examples, vocabulary, judge, config.out, keep,
        again=lambda *_: not path.exists(), name="teacher", reference="teacher",
    )  # fmt: skip
    return start.model("fp32", vocabulary), load_weights(path)


def classify(config: Config) -> Course:
    """A classifier of texts, with half of a fine-tuned one's layers."""
    train, test = load_labelled(config.data, sources=LABELLED)
    if config.labelled > len(train):
        raise ConfigError(f"labelled: {config.labelled}, the data has {len(train)} training texts")
    need("sklearn.metrics", "tasks", "metrics")
    task, longest = TextClassification(train.classes), max(config.lengths)
    start = finetune.Start(config, "class", len(train.classes), train.texts, "mean", train.classes)
    pieces = start.pieces()
    examples, held_out = (task.examples(pieces, side, longest=longest) for side in (train, test))

    def judge(model: Any) -> finetune.Judge:
        predict = task.predictor(model, batch=config.batch, lengths=config.lengths)

        def judged(params: Params) -> tuple[dict[str, float], np.ndarray]:
            logits = predict(params, held_out)
            return task.evaluate(logits, held_out), task.correct(logits, held_out)

        return judged

    half = Half(start, config.student_layers)
    whole, student = (one.model("fp32", pieces.vocab_size) for one in (start, half))
    labelled = examples[: config.labelled or len(examples)]
    if config.labelled:
        examples = [{k: v for k, v in one.items() if k != "labels"} for one in examples]
    even_layers(student.config.layers, whole.config.layers)
    distilled(config, task, whole, {}).objective(student)  # before the teacher is trained
    finetune.check_arms(config, task, half, pieces.vocab_size)
    launch.writable(config.out)
    teacher = trained(config, task, start, labelled, pieces.vocab_size, judge(whole))
    return Course(task, half, teacher, examples, labelled, pieces.vocab_size, judge, "accuracy")


def speak(config: Config) -> Course:
    """A decoder that learns the next token beside a larger one of the same tokenizer."""
    length, task = max(config.lengths), Language()
    name, teacher = config.checkpoint, None
    tokenizer = f"bpe:{config.vocabulary}"
    if name != "none":
        source = open_checkpoint(fetch(name) if name in asset_names() else name)
        if (text := source.tokenizer_json()) is None:
            raise ConfigError(f"checkpoint {name!r}: no tokenizer.json beside it; add one")
        launch.writable(config.out)
        path = config.out / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        tokenizer, teacher = str(path), load_checkpoint(source, "fp32")
    corpus = load_corpus(config.data, tokenizer, sources=DOCUMENTS)
    wanted = config.windows or config.batch * config.steps
    windows = min((len(corpus.train) - 1) // length, wanted)
    if windows < config.batch:
        raise ConfigError(
            f"data {config.data!r}: {windows} windows of {length} tokens, a batch takes"
            f" {config.batch}; name more text, or lower --lengths or --batch"
        )
    starts = np.arange(windows) * ((len(corpus.train) - 1) // length // windows)
    examples = []
    for first in starts * length:
        ids = np.asarray(corpus.train[first : first + length + 1]).astype(np.int32)
        examples.append({"inputs": ids[:-1], "targets": ids[1:]})
    held_out = validation_batches(corpus.validation, batch=config.batch, seq=length, limit=16)

    def judge(model: Any) -> finetune.Judge:
        evaluate = task.judge(model)

        def judged(params: Params) -> tuple[dict[str, float], np.ndarray]:
            return evaluate(params, held_out), np.zeros(0, bool)

        return judged

    large = Speaker(config.layers, config.width, config)
    model = teacher[0] if teacher else large.model("fp32", corpus.tokenizer.vocab_size)
    vocabulary = model.config.vocabulary
    layers = config.student_layers or (config.layers if teacher else max(1, config.layers // 2))
    student = Speaker(layers, min(config.student_width, model.config.width), config)
    finetune.check_arms(config, task, student, vocabulary)
    distilled(config, task, model, {}).objective(student.model("fp32", vocabulary))
    if teacher is None:
        teacher = trained(config, task, large, examples, vocabulary, judge(model))
    return Course(task, student, teacher, examples, examples, vocabulary, judge, "loss")


def run(config: Config, course: Course) -> tuple[list[finetune_report.Arm], dict[str, float]]:
    """Trains all arms; returns them, and the scores of the teacher under each storage."""
    model, params = course.teacher
    first, *others = config.precision
    judging = course.start.model(config.eval_precision, course.vocabulary)

    def arm(
        label: str, name: str, task: finetune.Task, examples: Sequence[Example] = course.examples
    ) -> finetune_report.Arm:
        return finetune.run_arm(
            label, config, task, course.start, examples, course.vocabulary, course.judge(judging),
            config.out, name=name, reference="alone",
        )  # fmt: skip

    teachers = {
        weights: distilled(
            config, course.task, model,
            params if weights == "f32" else quantize_weights(params, weights),
        )
        for weights in config.teacher_weights
    }  # fmt: skip
    scores = {
        weights: course.judge(model)(task.params)[0][course.score]
        for weights, task in teachers.items()
    }
    arms = [arm(first, "alone", course.task, course.labelled)]
    for weights, task in teachers.items():
        arms.append(arm(first, f"{first} of {weights}", task))
    live = teachers[config.teacher_weights[0]]
    for label in others:
        arms.append(arm(label, f"{label} of {config.teacher_weights[0]}", live))
    if config.task == "lm" and config.top:
        answers = live.answers(
            course.examples, config.out / "answers", batch=config.batch, lengths=config.lengths,
            top=config.top,
        )  # fmt: skip
        alone = dataclasses.replace(live, teacher=None, params=None)
        arms.append(arm(first, f"{first} of stored top {config.top}", alone, answers))
    return arms, scores


def closed(arm: finetune_report.Arm, alone: finetune_report.Arm, teacher: float, score: str) -> str:
    """Which share of the way from the student alone to the teacher an arm has gone, percent."""
    pairs = list(zip(arm.score(score), alone.score(score), strict=True))
    sign = 1 if score == "accuracy" else -1
    if any(sign * (teacher - b) <= 0 for _, b in pairs):
        return "–"  # there is no way to go
    mean, half = interval([100 * (a - b) / (teacher - b) for a, b in pairs])
    return f"{mean:.0f} %" + ("" if np.isnan(half) else f" ± {half:.0f}")


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    finetune.check(config)
    launch.positive(config, "student_width", "temperature")
    launch.not_negative(
        config, "student_layers", "soft", "hard", "hidden", "relations", "top", "labelled"
    )
    launch.not_empty(config, "teacher_weights")
    launch.distinct(config, "teacher_weights")
    for weights in config.teacher_weights:
        Storage.parse(weights, "teacher_weights")
    config = dataclasses.replace(
        config, data=config.data or _DATA[config.task],
        checkpoint=config.checkpoint or _ASSETS[config.task],
    )  # fmt: skip
    if config.labelled and config.task == "lm":
        raise ConfigError(f"labelled: {config.labelled}, but every token of `lm` is its own label")
    if config.labelled and config.hard:
        raise ConfigError(
            f"hard: {config.hard:g}, but of all but {config.labelled} texts no label is known; set"
            " --hard 0 or leave out --labelled"
        )
    begun = time.perf_counter()
    course = classify(config) if config.task == "classify" else speak(config)
    arms, teachers = run(config, course)
    score, alone = course.score, arms[0]
    scale, sign = (100.0, 1) if score == "accuracy" else (1.0, -1)
    rows: list[tuple[str, ...]] = [
        (f"teacher, {name}", f"{scale * x:.4g}", "–", "–", "–") for name, x in teachers.items()
    ]
    best = next(iter(teachers.values()))
    for arm in arms:
        mean, half = interval([scale * x for x in arm.score(score)])
        pairs = zip(arm.score(score), alone.score(score), strict=True)
        gain = finetune_report.above([sign * scale * (a - b) for a, b in pairs])
        rows.append((
            arm.label, f"{mean:.4g}" + ("" if np.isnan(half) else f" ± {half:.2g}"),
            "–" if arm is alone else gain,
            "–" if arm is alone else closed(arm, alone, best, score),
            f"{arm.outcome.tokens_per_s:,.0f}",
        ))  # fmt: skip
    head: tuple[str, ...] = (
        "arm",
        score,
        "better than alone",
        "of the way to the teacher",
        "tokens/s",
    )
    notes = [
        f"{config.data}: {len(course.examples)} training examples, {len(course.labelled)} of them"
        f" with labels, {config.steps} steps of {config.batch}, {config.seeds} seeds, temperature"
        f" {config.temperature:g}, weights soft {config.soft:g}, hard {config.hard:g}, hidden"
        f" {config.hidden:g}, relations {config.relations:g}; judged in {config.eval_precision}.",
        f"± is the 95 % interval over seeds, which are paired. Took"
        f" {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    title = f"{config.task}: a student alone and distilled"
    finetune_report.write(
        config.out, [(title, head, rows)],
        {f"teacher, {name}": {score: x} for name, x in teachers.items()}, arms, notes,
        "nats/text" if config.task == "classify" else "nats/token",
        finetune_report.own_loss(arms, "hard", config.hard),
    )  # fmt: skip


if __name__ == "__main__":
    launch.command(main, Config)
