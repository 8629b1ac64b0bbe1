"""Do tasks help each other, and does it matter how their losses and gradients are combined?

One encoder learns several tasks at once, each with a head of its own, beside one run for each task
alone. A task has as many rows in its own run as in the mixture, so that all runs of an arm together
cost as much as the mixture.

Run:       python experiments/multitask.py
           python experiments/multitask.py --tasks bbc reviews movie-snippets --checkpoint minilm
           python experiments/multitask.py --precision fp32 bf16 fp16 --methods fixed pcgrad
           python experiments/multitask.py --tasks tags=token:WORDS.tsv mood=class:TEXTS.tsv
Expected:  a table of the accuracy of each task by method, with its gap to the single-task runs in
           points, seed paired with seed; the share of each task in the shared gradient and the
           cosines between tasks. What it says is not known beforehand.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)
from common.datasets.sources import LABELLED, TAGGED
from mpjax.data import Batch, WordPiece, load_labelled, load_tagged, mixed_batches, mixing_weights
from mpjax.data.buckets import IGNORE, Example
from mpjax.errors import ConfigError
from mpjax.tasks import Mixture, TextClassification, TokenClassification, softmax
from mpjax.typing import Params, Settings

log = logging.getLogger("mpjax.experiments")
METHODS: dict[str, Settings] = {
    "fixed": {},
    "uncertainty": {"weighting": "uncertainty"},
    "gradnorm": {"weighting": "gradnorm"},
    "pcgrad": {"conflicts": "pcgrad"},
}


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Train several tasks at once, and each alone."""

    checkpoint: str = "none"
    """`none` begins anew; an asset, a folder or a name on the Hugging Face Hub."""
    tasks: tuple[str, ...] = ("pos-oanc", "ner-tweets", "reviews")
    """`pos-oanc`, `ner-tweets` (a tag a word), `reviews`, `movie-snippets`, `bbc` (a class a text),
    or files: NAME=token:FILE of word<TAB>tag lines, NAME=class:FILE of label<TAB>text lines."""
    methods: tuple[Literal["fixed", "uncertainty", "gradnorm", "pcgrad"], ...] = (
        "fixed", "uncertainty", "gradnorm", "pcgrad",
    )  # fmt: skip
    """How losses and gradients of the mixture are combined."""
    temperature: float = 1.0
    """Of the mixing: 1 draws in proportion to the texts of a task, more makes tasks more alike."""
    own_scales: bool = False
    """Whether each task has a loss scale of its own."""
    precision: tuple[str, ...] = ("fp32",)
    """Precisions, or schedules such as late:fp8:bf16:0.2; all methods run in each."""
    lengths: tuple[int, ...] = (64,)
    """Tokens that texts are padded to; of one length, rows of all tasks cost the same."""
    texts: int = 2000
    """Training texts of a task at most."""
    held_out: int = 500
    """Held-out texts of a task at most."""
    steps: int = 600
    """Steps of the mixture; of a single task its share of them."""
    lr: float = 1e-3
    """Peak learning rate."""
    WARMUP: ClassVar[int] = 40
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 40, or half of the steps if these are fewer."""
    out: Path = Path("runs/multitask")
    """Folder of the report and of all runs."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One task: its sides as loaded, and what trains and judges it."""

    name: str
    kind: str
    sides: tuple[Any, Any]
    task: Any

    @property
    def head(self) -> str:
        """As EncoderConfig has it."""
        own = self.task.classes if self.kind == "class" else self.task.names
        return f"{self.name}={self.kind}:{len(own)}"

    def words(self) -> list[str]:
        """The training texts, on which a tokenizer is trained."""
        train = self.sides[0]
        return list(train.texts) if self.kind == "class" else [" ".join(w) for w in train.words]

    def examples(self, pieces: WordPiece, config: Config) -> tuple[list[Example], list[Example]]:
        """Encoded texts of both sides, an even choice of at most as many as the settings say."""
        longest = max(config.lengths)
        both = [self._encoded(pieces, side, longest) for side in self.sides]
        chosen = [
            [part[i] for i in np.linspace(0, len(part) - 1, min(len(part), most)).astype(int)]
            for part, most in zip(both, (config.texts, config.held_out), strict=True)
        ]
        return chosen[0], chosen[1]

    def _encoded(self, pieces: WordPiece, side: Any, longest: int) -> list[Example]:
        """Texts are cut; sentences, each of whose words has a tag, are left out if too long."""
        if self.kind == "class":
            return self.task.examples(pieces, side, longest=longest)
        every = self.task.examples(pieces, side, longest=launch.LARGEST)
        found = [example for example in every if len(example["ids"]) <= longest]
        if left := len(every) - len(found):
            log.warning(
                "%s: %d of %d sentences have more than %d tokens and are left out",
                self.name, left, len(every), longest,
            )  # fmt: skip
        if not found:
            raise ConfigError(f"lengths: {self.name} has no sentence of {longest} tokens; raise it")
        return found


def load(text: str) -> Part:
    """The task that a word of --tasks names."""
    name, _, file = text.partition("=")
    kind, _, path = file.partition(":")
    if not file and text in {*LABELLED, *TAGGED}:
        kind, path = ("class" if text in LABELLED else "token"), text
    if kind not in ("class", "token") or not path:
        raise ConfigError(
            f"tasks: {text!r}; known: {' '.join([*TAGGED, *LABELLED])}, or give NAME=token:FILE or"
            " NAME=class:FILE"
        )
    name = name.replace("-", "_")
    if kind == "class":
        texts = load_labelled(path, sources=LABELLED)
        return Part(name, kind, texts, TextClassification(texts[0].classes, output=name))
    words = load_tagged(path, sources=TAGGED)
    return Part(name, kind, words, TokenClassification(words[0].names, output=name))


def targets(
    logits: Sequence[np.ndarray], examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """The logits and the labels of all targets, (N, C) and (N,)."""
    pairs = [
        (np.atleast_2d(x), np.atleast_1d(e["labels"]))
        for x, e in zip(logits, examples, strict=True)
    ]
    known = [labels != IGNORE for _, labels in pairs]
    return tuple(  # type: ignore[return-value]
        np.concatenate([pair[side][k] for pair, k in zip(pairs, known, strict=True)])
        for side in (0, 1)
    )


@dataclasses.dataclass(frozen=True)
class Together:
    """Some tasks that are trained at once, all of an experiment or one of them.

    Args:
      config: the settings, with the steps and the folder of these runs.
      parts: the tasks.
      examples: name -> encoded texts of both sides.
      pieces: the tokenizer.
      words: on which it was trained.
    """

    config: Config
    parts: Sequence[Part]
    examples: dict[str, tuple[list[Example], list[Example]]]
    pieces: WordPiece
    words: Sequence[str]

    @property
    def start(self) -> finetune.Start:
        heads = tuple(part.head for part in self.parts)
        return finetune.Start(self.config, "none", 2, self.words, "mean", (), heads)

    def mixture(self, method: str) -> Mixture:
        tasks = {part.name: part.task for part in self.parts}
        return Mixture(tasks, own_scales=self.config.own_scales, **METHODS[method])

    def batches(self, seed: int) -> Iterator[Batch]:
        sides = {part.name: self.examples[part.name][0] for part in self.parts}
        c = self.config
        return mixed_batches(
            sides, batch=c.batch, seed=seed, lengths=c.lengths, temperature=c.temperature
        )

    def check(self, method: str) -> finetune.Network:
        """Builds every arm without computing it; returns the model that judges."""
        mixture, vocabulary = self.mixture(method), self.pieces.vocab_size
        return finetune.check_arms(self.config, mixture, self.start, vocabulary)

    def judge(self, method: str, model: finetune.Network) -> finetune.Judge:
        c, one = self.config, next(self.batches(0))
        predict = {
            part.name: part.task.predictor(model, batch=c.batch, lengths=c.lengths)
            for part in self.parts
        }
        shares = self.mixture(method).gradient_shares(model)

        def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
            scores, every, losses = {}, [], []
            for part in self.parts:
                held_out = self.examples[part.name][1]
                logits, labels = targets(predict[part.name](params, held_out), held_out)
                every.append(logits.argmax(-1) == labels)
                chance = softmax(logits)[np.arange(len(labels)), labels]
                losses.append(-np.log(np.maximum(chance, 1e-300)).mean())
                scores[part.name] = float(every[-1].mean())
            scores["loss"] = float(np.mean(losses))
            if len(self.parts) > 1:
                scores |= {f"gradient, {n}": x for n, x in shares(params, one).items()}
            return scores, np.concatenate(every)

        return judge

    def run(self, method: str, label: str) -> finetune_report.Arm:
        """Trains one method in one precision under each seed."""
        model = self.start.model(self.config.eval_precision, self.pieces.vocab_size)
        judge = self.judge(method, model)
        return finetune.run_arm(
            label, self.config, self.mixture(method), self.start, [], self.pieces.vocab_size,
            judge, self.config.out, batches=self.batches,
        )  # fmt: skip


def joined(label: str, arms: Sequence[finetune_report.Arm]) -> finetune_report.Arm:
    """The runs of all tasks alone as one arm."""
    scores = []
    for seeds in zip(*(arm.scores for arm in arms), strict=True):
        loss = float(np.mean([one["loss"] for one in seeds]))
        scores.append({name: x for one in seeds for name, x in one.items()} | {"loss": loss})
    correct = np.concatenate([arm.correct for arm in arms], 1)
    return finetune_report.Arm(label, tuple(scores), correct, arms[0].outcome)


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    finetune.check(config)
    launch.positive(config, "temperature", "texts", "held_out")
    launch.not_empty(config, "tasks", "methods")
    launch.distinct(config, "tasks", "methods")
    if len(config.tasks) < 2:
        raise ConfigError(f"tasks: {config.tasks[0]} alone is no mixture; give two or more")
    begun = time.perf_counter()
    parts = [load(text) for text in config.tasks]
    Mixture([(part.name, part.task) for part in parts])  # two of one name
    words = [text for part in parts for text in part.words()]
    pieces = finetune.Start(config, "none", 2, words, "mean").pieces()
    examples = {part.name: part.examples(pieces, config) for part in parts}
    sizes = {name: len(sides[0]) for name, sides in examples.items()}
    share = mixing_weights(sizes, temperature=config.temperature)

    def of(some: Sequence[Part], folder: str, steps: int) -> Together:
        own = dataclasses.replace(
            config,
            steps=steps,
            out=config.out / folder,
            warmup=min(launch.warmup(config), steps // 2),
        )
        return Together(own, some, examples, pieces, words)

    every = {method: of(parts, method, config.steps) for method in config.methods}
    singles = [
        of([part], f"single-{part.name}", max(1, round(config.steps * share[part.name])))
        for part in parts
    ]
    for method, one in every.items():
        one.check(method)
    for one in singles:
        one.check("fixed")
    launch.writable(config.out)
    arms: list[finetune_report.Arm] = []
    mixtures: list[finetune_report.Arm] = []
    for label in config.precision:
        arms.append(joined(f"single, {label}", [one.run("fixed", label) for one in singles]))
        for method, one in every.items():
            arm, name = one.run(method, label), f"{method}, {label}"
            first = mixtures[0].label if mixtures else name
            outcome = dataclasses.replace(arm.outcome, label=name, reference=first)
            mixtures.append(dataclasses.replace(arm, label=name, outcome=outcome))
            arms.append(mixtures[-1])
    common = {}
    for name, sides in examples.items():
        labels = [
            targets([np.zeros((np.size(e["labels"]), 1)) for e in side], side)[1] for side in sides
        ]
        common[name] = float((labels[1] == np.bincount(labels[0]).argmax()).mean())
    names = list(examples)
    title = f"{' + '.join(config.tasks)}: together and alone"
    found = finetune_report.tables(title, {"most frequent": common}, arms, (), {}, names)
    notes = [
        f"{arm.label}: shared gradient at the end: "
        + ", ".join(
            f"{name.removeprefix('gradient, ')} {np.mean(arm.score(name)):.2f}"
            for name in arm.scores[0] if name.startswith("gradient, ")
        )
        + "."
        for arm in arms if f"gradient, {names[0]}" in arm.scores[0]
    ]  # fmt: skip
    drawn = ", ".join(f"{name} {100 * p:.1f} % of {sizes[name]} texts" for name, p in share.items())
    notes += [
        "A gap is to the first arm, in points with the 95 % interval over seeds; accuracy in % of"
        f" texts or words. Rows: {drawn}.",
        f"{config.steps} steps of {config.batch}, of a task alone its share of them, at most"
        f" {max(config.lengths)} tokens, judged in {config.eval_precision}. Took"
        f" {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    baseline, unit = {"most frequent": common}, "nats, all tasks"
    finetune_report.write(config.out, found, baseline, arms, notes, unit, mixtures)


if __name__ == "__main__":
    launch.command(main, Config)
