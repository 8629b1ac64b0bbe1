"""Does a classifier that was trained against perturbed embeddings stand an attack, at what cost?

A text classifier is trained plainly and by each method, in several precisions, paired by seed. All
are judged clean, under PGD on their embeddings, and under edits of characters and words. A plain
arm trained for as many passes as the dearest method takes stands beside them.

Run:       python experiments/adversarial.py --checkpoint none --lr 1e-3 --epsilon 0.02
           python experiments/adversarial.py --method none fgm freelb --precision fp32 fp16
           python experiments/adversarial.py --data FILE.tsv --checkpoint none --texts 500
Expected:  a row for each method and precision: accuracy, accuracy under PGD, each with its gap to
           the plain arm of the first precision. docs/guides/adversarial.md says what to look for.
           With a checkpoint a method takes two to four times as long as finetune_classifier.py.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)
from common.datasets.sources import LABELLED
from mpjax.data import WordPiece, load_labelled
from mpjax.errors import ConfigError, need
from mpjax.tasks import Adversarial, TextClassification
from mpjax.tasks.adversarial import (
    FGM,
    PGD,
    SMART,
    VAT,
    FreeLB,
    Method,
    RDrop,
    evaluate_robust,
)
from mpjax.typing import Params

PLAIN, LONGER = "none", "longer"


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Train a text classifier against perturbations of its embeddings."""

    data: str = "reviews"
    """`reviews`, `movie-snippets`, `bbc`, or a file: label<TAB>text lines, .csv or .jsonl."""
    method: tuple[str, ...] = (PLAIN, LONGER, "fgm", "pgd", "freelb")
    """Of none longer fgm pgd freelb smart vat r-drop; the first is what others are compared with.
    `longer` is none for as many passes of the model as the dearest of the others takes."""
    precision: tuple[str, ...] = ("fp32",)
    """Precisions, or schedules such as late:fp8:bf16:0.2."""
    texts: int = 0
    """Training texts, the first ones; 0 takes all."""
    epsilon: float = 0.5
    """Norm of an example's perturbation, in training and under attack; the rows of a fresh table
    have 0.16 at width 64, where 0.05 is much."""
    ascent_steps: int = 3
    """Steps of PGD and FreeLB in training."""
    weight: float = 1.0
    """Of the adversarial, smoothness or consistency term."""
    attack_steps: int = 10
    """Steps of the attack."""
    copies: int = 3
    """Edited copies of each held-out text."""
    out: Path = Path("runs/adversarial")
    """Folder of the report and of all runs."""


def method_of(name: str, config: Config) -> Method | None:
    """Returns a method with its settings; None trains plainly."""
    epsilon, steps, weight = config.epsilon, config.ascent_steps, config.weight
    step = 1.5 * epsilon / steps  # the ball's edge is reached
    made: dict[str, Method | None] = {
        PLAIN: None, LONGER: None, "fgm": FGM(epsilon, weight),
        "pgd": PGD(epsilon, step, steps, weight=weight),
        "freelb": FreeLB(epsilon, step, steps, weight), "smart": SMART(weight=weight),
        "vat": VAT(epsilon, weight=weight), "r-drop": RDrop(weight),
    }  # fmt: skip
    if name not in made:
        raise ConfigError(f"method: unknown {name!r}; known: {' '.join(made)}")
    return made[name]


def passes(method: Method | None) -> float:
    """Returns what a step costs in plain steps.

    A forward pass is a third of one, a backward pass two thirds, and one to the embeddings alone a
    third.
    """
    steps = getattr(method, "steps", 1)
    if method is None:
        return 1.0
    if isinstance(method, RDrop):
        return 2.0
    if isinstance(method, FreeLB):
        return steps + (steps - 1) * 2 / 3
    return 2.0 + steps * 2 / 3


def arm_config(name: str, config: Config) -> Config:
    """Returns the settings of one method's runs, which say nothing of the other methods."""
    dearest = max(passes(method_of(other, config)) for other in config.method)
    steps = math.ceil(config.steps * dearest) if name == LONGER else config.steps
    return dataclasses.replace(config, method=(name,), steps=steps, out=config.out / name)


def task_of(name: str, config: Config, task: TextClassification, pieces: WordPiece) -> Any:
    """Returns what a method trains."""
    method = method_of(name, config)
    return task if method is None else Adversarial(task, method, pieces.special)


def check(config: Config) -> None:
    """Checks the settings, before anything is read."""
    finetune.check(config)
    launch.positive(config, "epsilon", "ascent_steps", "weight", "attack_steps", "copies")
    launch.not_negative(config, "texts")
    launch.not_empty(config, "method")
    launch.distinct(config, "method")
    for name in config.method:
        method_of(name, config)
    if "r-drop" in config.method and not config.dropout:
        raise ConfigError("dropout: 0 leaves r-drop two equal passes; leave one of them out")


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    check(config)
    begun = time.perf_counter()
    train, test = load_labelled(config.data, sources=LABELLED)
    if config.texts > len(train):
        raise ConfigError(f"texts: {config.texts}, the data has {len(train)} training texts")
    train = train.take(np.arange(config.texts or len(train)))
    need("sklearn.metrics", "tasks", "metrics")
    task = TextClassification(train.classes)
    start = finetune.Start(config, "class", len(train.classes), train.texts, "mean", train.classes)
    pieces, longest = start.pieces(), max(config.lengths)
    examples, held_out = (task.examples(pieces, side, longest=longest) for side in (train, test))
    configs = {name: arm_config(name, config) for name in config.method}
    tasks = {name: task_of(name, config, task, pieces) for name in config.method}
    for name, own in configs.items():
        model = finetune.check_arms(own, tasks[name], start, pieces.vocab_size)
    launch.writable(config.out)
    attack = PGD(config.epsilon, config.epsilon / 4, config.attack_steps)
    predict = task.predictor(model, batch=config.batch, lengths=config.lengths)

    def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
        logits = predict(params, held_out)
        robust = evaluate_robust(
            task, model, params, test, pieces, attack=attack, copies=config.copies,
            batch=config.batch, lengths=config.lengths,
        )  # fmt: skip
        return task.evaluate(logits, held_out) | robust, task.correct(logits, held_out)

    arms = []
    for name, own in configs.items():
        for label in config.precision:
            arm = finetune.run_arm(
                label, own, tasks[name], start, examples, pieces.vocab_size, judge, own.out
            )
            title, first = f"{name} {label}", f"{config.method[0]} {config.precision[0]}"
            outcome = dataclasses.replace(arm.outcome, label=title, reference=first)
            arms.append(dataclasses.replace(arm, label=title, outcome=outcome))
    found = finetune_report.tables(
        f"{config.data}: {len(train)} texts, by method and precision", {}, arms,
        ("character accuracy", "word accuracy"), {}, ("accuracy", "pgd accuracy"),
    )  # fmt: skip
    costs = ", ".join(f"{n} {passes(method_of(n, config)):.2f}" for n in config.method)
    notes = [
        f"Accuracies are in percent, of {len(test)} held-out texts, with the 95 % interval over"
        f" {config.seeds} seeds; judged in {config.eval_precision}.",
        f"PGD: norm {config.epsilon:g} an example, {config.attack_steps} steps; characters and"
        f" words: right in all of {config.copies} copies with one edit, too.",
        f"A step costs, counted in plain ones: {costs}. Took {time.perf_counter() - begun:.0f} s on"
        f" {launch.machine()}.",
    ]
    drawn = finetune_report.own_loss(arms, "clean")
    finetune_report.write(config.out, found, {}, arms, notes, "nats/text, clean", drawn)


if __name__ == "__main__":
    launch.command(main, Config)
