"""Does a low precision cost a fine-tuned classifier accuracy, and whom? MiniLM on real reviews.

A pre-trained encoder with a new head learns to tell great food reviews from others, in several
precisions and schedules of them, against naive Bayes and logistic regression on all the text.

Run:       python experiments/finetune_classifier.py
           python experiments/finetune_classifier.py --precision fp32 late:fp8:bf16:0.2 \
               dynamic:fp16:fp32 mixed:fp8:attention=bf16 fp8
           python experiments/finetune_classifier.py --data FILE.tsv --checkpoint none
           python experiments/finetune_classifier.py --data chinese-reviews --checkpoint none
Expected:  fp32 4 points above the better baseline; bf16, fp16 and fp8 within 0.1 points of fp32
           (3 seeds, docs/evidence/finetune.md). The tables by class and length mark with * whom a
           precision hurts. A run of one seed takes 4 to 6 minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)
from common.datasets.sources import LABELLED
from mpjax.data import LabelledTexts, load_labelled
from mpjax.errors import need
from mpjax.report import length_slices
from mpjax.tasks import TextClassification, class_scores
from mpjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Fine-tune a text classifier in several precisions."""

    data: str = "reviews"
    """`reviews`, `movie-snippets`, `bbc`, `chinese-reviews`, or a file: label<TAB>text lines, .csv
    or .jsonl."""
    pool: Literal["mean", "first"] = "mean"
    """What the head takes of a text: the mean of its tokens, or the first through BERT's pooler."""
    out: Path = Path("runs/finetune_classifier")
    """Folder of the report and of all runs."""


def without_spaces(texts: Sequence[str]) -> bool:
    """Whether most characters are of a script that sets no spaces between words: Chinese, kana."""
    count = sum("\u3040" <= c <= "\u9fff" for text in texts for c in text)
    return 2 * count > sum(map(len, texts))


def baselines(train: LabelledTexts, test: LabelledTexts) -> dict[str, dict[str, float]]:
    """Scores of classifiers that count words, or where these have no spaces characters.

    They are trained on the whole texts.
    """
    text = need("sklearn.feature_extraction.text", "tasks", "metrics")
    bayes = need("sklearn.naive_bayes", "tasks", "metrics").MultinomialNB()
    logistic = need("sklearn.linear_model", "tasks", "metrics").LogisticRegression
    search = need("sklearn.model_selection", "tasks", "metrics").GridSearchCV
    join = need("sklearn.pipeline", "tasks", "metrics").make_pipeline
    # The strength of the regularisation is chosen on the training side.
    tuned = search(logistic(max_iter=2000), {"C": [3.0, 10.0, 30.0]}, cv=3)
    unit = "char" if without_spaces(train.texts) else "word"
    parts = text.TfidfVectorizer(analyzer=unit, ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    models = {
        "naive Bayes": join(text.CountVectorizer(analyzer=unit), bayes),
        "TF-IDF logistic regression": join(parts, tuned),
    }
    sides = [
        [" ".join(pair) for pair in zip(side.texts, side.seconds or side.texts, strict=True)]
        if side.seconds
        else side.texts
        for side in (train, test)
    ]
    found = {}
    for name, model in models.items():
        predicted = model.fit(sides[0], train.labels).predict(sides[1])
        found[name] = class_scores(test.labels, predicted, test.classes)
    return found


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    finetune.check(config)
    begun = time.perf_counter()
    train, test = load_labelled(config.data, sources=LABELLED)
    need("sklearn.metrics", "tasks", "metrics")
    task = TextClassification(train.classes)
    start = finetune.Start(
        config, "class", len(train.classes), train.texts, config.pool, train.classes
    )
    pieces, longest = start.pieces(), max(config.lengths)
    examples, held_out = (task.examples(pieces, side, longest=longest) for side in (train, test))
    model = finetune.check_arms(config, task, start, pieces.vocab_size)
    launch.writable(config.out)
    counted = baselines(train, test)
    best = max(counted, key=lambda name: counted[name]["accuracy"])
    predict = task.predictor(model, batch=config.batch, lengths=config.lengths)

    def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
        logits = predict(params, held_out)
        return task.evaluate(logits, held_out), task.correct(logits, held_out)

    arms = [
        finetune.run_arm(label, config, task, start, examples, pieces.vocab_size, judge, config.out)
        for label in config.precision
    ]
    slices = {
        "class": [test.classes[label] for label in test.labels],
        "length": length_slices([len(example["ids"]) for example in held_out]),
    }
    found = finetune_report.tables(
        f"{config.data} by precision", counted, arms, ("macro f1", "calibration error"), slices
    )
    lead = finetune_report.above(
        [100 * (a - counted[best]["accuracy"]) for a in arms[0].score("accuracy")]
    )
    notes = [
        f"{arms[0].label} is {lead} points above {best} (95 % interval over {config.seeds} seeds).",
        f"{len(train)} training and {len(test)} held-out texts, {config.steps} steps of"
        f" {config.batch}, at most {longest} tokens, judged in {config.eval_precision}.",
        f"A slice with * has its whole 95 % interval over examples below zero. Took"
        f" {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    finetune_report.write(config.out, found, counted, arms, notes, "nats/text")


if __name__ == "__main__":
    launch.command(main, Config)
