"""Texts with a class or a number each, and words with a tag each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.data import LabelledTexts, TaggedSentences, WordPiece, bucket_batches, train_wordpiece
from mpjax.data.class_names import sorted_names
from mpjax.data.tagged import MARK, as_tagged, read_sentences
from mpjax.errors import ConfigError, listed, need
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.table_sides import Sides, split
from mpjax.finetuning.work import (
    Judge,
    Lines,
    Scores,
    Work,
    fingerprint,
    lengths_of,
    told_sizes,
)
from mpjax.models import encoder
from mpjax.precision import Precision
from mpjax.tasks import TextClassification, TextRegression, TokenClassification
from mpjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts or pairs with a class or a number each."""

    sides: Sides

    @property
    def settings(self) -> Finetuning:
        return self.sides.settings

    @property
    def regression(self) -> bool:
        return self.settings.task == "regress"

    @cached_property
    def labels(self) -> tuple[str, ...]:
        if self.regression:
            return ()
        names = sorted_names(self.sides.train["label"])
        if len(names) < 2:
            raise ConfigError(f"data: one class, {names[0]!r}; expected at least two")
        if strange := sorted(set(self.sides.test["label"]) - set(names)):
            raise ConfigError(f"data: class {strange[0]!r} is only held out; give it more examples")
        return names

    def tokenizer(self) -> WordPiece:
        train = self.sides.train
        return train_wordpiece([*train["text"], *train.get("second", ())], self.settings.vocabulary)

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        classes = 1 if self.regression else len(self.labels)
        return _new_encoder(self.settings, precision, vocabulary, "class", classes, self.labels)

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        c, sides = self.settings, (self.sides.train, self.sides.test)
        lines = list(self.sides.lines)
        if self.regression:
            task: Any = TextRegression()
            examples = [
                task.examples(
                    tokens, side["text"], side["label"], side.get("second", ()), longest=c.longest
                )
                for side in sides
            ]
            metric = "loss"
        else:
            need("sklearn.metrics", "tasks", "metrics")
            task, metric = TextClassification(labels or self.labels), "accuracy"
            names = self.labels
            number = {name: i for i, name in enumerate(names)}
            examples = [
                task.examples(
                    tokens,
                    LabelledTexts(
                        tuple(side["text"]),
                        np.array([number[name] for name in side["label"]], np.int32), names,
                        tuple(side.get("second", ())),
                    ),
                    longest=c.longest,
                )
                for side in sides
            ]  # fmt: skip
            counts = Counter(sides[0]["label"])
            told = [f"{name} {counts[name]}" for name in names]
            lines.append((f"classes: {len(names)}", listed(told, 20)))
        train, test = examples
        if c.class_weights:
            share = len(train) / len(counts)
            train = [
                e | {"weights": np.float32(share / counts[task.classes[e["labels"]]])}
                for e in train
            ]
        if c.balanced:
            drawn = -(-len(train) // c.batch) * c.batch / len(counts)
            often = [f"{name} {drawn / counts[name]:.3g}" for name in names]
            lines.append(("balanced: times an epoch", listed(often, 20)))
        lengths = lengths_of([len(e["ids"]) for e in (*train, *test)], c.longest)

        def judge(model: Any) -> Judge:
            predict = task.predictor(model, batch=c.batch, lengths=lengths)
            return lambda params: task.evaluate(predict(params, test), test)

        data = bucket_batches(
            train, batch=c.batch, seed=c.seed, lengths=lengths,
            balanced="labels" if c.balanced else None,
        )  # fmt: skip
        return Work(
            task, data, -(-len(train) // c.batch), judge, metric,
            lines + told_sizes(train, "ids", c.longest), fingerprint(tokens, [train, test]),
        )  # fmt: skip


def _new_encoder(
    c: Finetuning, precision: str | Precision, vocabulary: int, head: str, classes: int,
    labels: tuple[str, ...],
) -> Any:  # fmt: skip
    return encoder(
        "bert-tiny", precision, vocabulary=vocabulary, layers=c.layers, width=c.width,
        heads=c.heads, context=c.longest, dropout=c.dropout, head=head, classes=classes,
        labels=labels,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tagged:
    """Sentences with a tag for each word."""

    settings: Finetuning
    train: TaggedSentences
    test: TaggedSentences
    lines: Lines

    @property
    def labels(self) -> tuple[str, ...]:
        return self.train.names

    def tokenizer(self) -> WordPiece:
        return train_wordpiece([" ".join(words) for words in self.train.words],
                               self.settings.vocabulary)  # fmt: skip

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        names = self.labels
        return _new_encoder(self.settings, precision, vocabulary, "token", len(names), names)

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        need("sklearn.metrics", "tasks", "metrics")
        c, task = self.settings, TokenClassification(labels or self.labels)
        entities = all(name == "O" or name[:2] in ("B-", "I-") for name in task.names)
        if entities:
            need("seqeval.metrics", "tasks", "metrics")
        train, test = (
            task.examples(tokens, side, longest=c.longest) for side in (self.train, self.test)
        )
        lengths = lengths_of([len(e["ids"]) for e in (*train, *test)], c.longest)
        right = [e["labels"][e["labels"] >= 0] for e in test]

        def judge(model: Any) -> Judge:
            predict = task.predictor(model, batch=c.batch, lengths=lengths)

            def scores(params: Params) -> Scores:
                logits = predict(params, test)
                found = task.evaluate(task.tags(logits, test), self.test, entities=entities)
                words = np.concatenate(
                    [one[e["labels"] >= 0] for one, e in zip(logits, test, strict=True)]
                ).astype(np.float64)
                shifted = words - words.max(-1, keepdims=True)
                logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
                places = np.concatenate(right)
                return found | {"loss": float(-logs[np.arange(len(places)), places].mean())}

            return scores

        counts = Counter(task.names[t] for tags in train for t in tags["labels"] if t >= 0)
        told = [f"{name} {counts[name]}" for name in task.names]
        lines = [*self.lines, (f"tags: {len(told)}", listed(told, 20))]
        return Work(
            task, bucket_batches(train, batch=c.batch, seed=c.seed, lengths=lengths),
            -(-len(train) // c.batch), judge, "entity f1" if entities else "accuracy",
            lines + told_sizes(train, "ids", c.longest), fingerprint(tokens, [train, test]),
        )  # fmt: skip


def read_tagged(settings: Finetuning, data: Any) -> Tagged:
    """Sentences of a file of word<TAB>tag lines."""
    if not isinstance(data, str | Path):
        raise ConfigError(
            "data: tags are read of a file of word<TAB>tag lines; write the sentences to one"
        )
    named = [data, settings.validation] if settings.validation else [data]
    files = [Path(source).expanduser() for source in named]
    sides = [[s for s in read_sentences(file) if s[0][0] != MARK] for file in files]
    found = sides[0]
    contents = [" ".join(word for word, _ in s) for s in found]
    if settings.validation:
        known = {" ".join(word for word, _ in s) for s in sides[1]}
        out = np.array([content in known for content in contents])
        test = sides[1]
    else:
        out = split(settings, contents, None)
        test = [s for s, one in zip(found, out, strict=True) if one]
    train = [s for s, one in zip(found, out, strict=True) if not one]
    names = sorted_names(tag for side in (train, test) for s in side for _, tag in s)
    if len(names) < 2:
        raise ConfigError(f"data: one tag, {names[0]!r}; expected at least two")
    lines = [("sentences read", f"{len(sides[0])}"), ("for training", f"{len(train)}"),
             ("held out", f"{len(test)}")]  # fmt: skip
    return Tagged(settings, as_tagged(train, names), as_tagged(test, names), lines)
