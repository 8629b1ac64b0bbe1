"""What a run trains on: examples, the objective, and how weights are judged."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mpjax.data import (
    Corpus,
    Example,
    LabelledTexts,
    TaggedSentences,
    Tokenizer,
    WordPiece,
    batches,
    bucket_batches,
    eval_batches,
    load_corpus,
    make_tokenizer,
    train_wordpiece,
    validation_batches,
)
from mpjax.data.chat import instruction_examples
from mpjax.data.class_names import sorted_names
from mpjax.data.split import held_out, stratified
from mpjax.data.tables.columns import read_columns
from mpjax.data.tagged import read_sentences
from mpjax.errors import ConfigError, listed, need
from mpjax.finetuning.settings import Finetuning
from mpjax.models import decoder, encoder
from mpjax.precision import Precision
from mpjax.tasks import Language, TextClassification, TextRegression, TokenClassification
from mpjax.typing import Batch, Params, Settings

Scores = dict[str, float]
Judge = Callable[[Params], Scores]
Tokens = WordPiece | Tokenizer
Lines = list[tuple[str, str]]  # what was read, as (what, how much)
_LADDER = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_EVAL_BATCHES = 64  # of next-token prediction


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run trains on, once its model and its tokenizer are known.

    Args:
      task: of `mpjax.tasks`.
      batches: endless, in the order of the seed; their position can be saved.
      epoch: steps in which every example is seen once.
      judge: a model -> weights -> scores on held-out data.
      metric: the score that ranks weights by default.
      lines: what was read.
      fingerprint: of the data as ids, which a resumed run must find again.
    """

    task: Any
    batches: Any
    epoch: int
    judge: Callable[[Any], Judge]
    metric: str
    lines: Lines
    fingerprint: str


class Source(Protocol):
    """Data that has been read, before it is tokenised."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of classes or tags."""
        ...

    def tokenizer(self) -> Tokens:
        """Returns a tokenizer that is trained on the training side."""
        ...

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        """Returns a model without weights."""
        ...

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        """Returns what is trained, with labels in the order of the model's logits."""
        ...


def lengths_of(sizes: Sequence[int], longest: int) -> tuple[int, ...]:
    """Returns the lengths that examples are padded to: few, and none that no example needs."""
    ladder = [length for length in _LADDER if length < longest] + [longest]
    needed = {next(length for length in ladder if size <= length) for size in sizes}
    return tuple(sorted(needed | {longest}))


def fingerprint(tokenizer: Tokens, sides: Sequence[Any]) -> str:
    """Returns a hash of a tokenizer and of ids: arrays, or examples with arrays."""
    found = hashlib.sha256(tokenizer.to_text().encode())
    for side in sides:
        for one in [side] if isinstance(side, np.ndarray) else side:
            for x in one.values() if isinstance(one, Mapping) else [one]:
                found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:16]


def _sizes(examples: Sequence[Example], name: str, longest: int) -> Lines:
    """How long examples are, in tokens."""
    sizes = np.array([len(example[name]) for example in examples])
    middle, most = (int(np.quantile(sizes, q, method="higher")) for q in (0.5, 0.95))
    cut = int((sizes >= longest).sum())
    return [("tokens", f"median {middle}, 95 % up to {most}, longest {sizes.max()}"),
            ("of the most tokens, or cut", f"{cut} of {len(sizes)} at {longest}")]  # fmt: skip


def _split(
    settings: Finetuning, contents: Sequence[str], classes: Sequence[str] | None
) -> np.ndarray:
    if classes is None:
        return held_out(contents, settings.held_out, seed=settings.seed)
    return stratified(contents, classes, settings.held_out, seed=settings.seed)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Rows of a table, split.

    Args:
      settings: of the run.
      train: field -> one entry a row.
      test: likewise, of the side that judges.
      lines: what was read.
    """

    settings: Finetuning
    train: dict[str, list[Any]]
    test: dict[str, list[Any]]
    lines: Lines


def _fields(settings: Finetuning, data: Any, kinds: Settings, columns: Settings) -> Fields:
    """Reads both sides; equal rows lie on one of them."""
    given = {field: name for field, name in columns.items() if name}

    def read(source: Any, what: str) -> tuple[dict[str, list[Any]], Lines]:
        found = read_columns(source, kinds, given, missing=settings.missing)
        values = found.values
        rows = list(zip(*values.values(), strict=True))
        first = dict.fromkeys(rows)
        repeats = len(rows) - len(first)
        lines = [(f"{what}: rows read", f"{found.read}")]
        if found.missing:
            lines.append((f"{what}: left out, a cell is missing", f"{found.missing}"))
        if found.blank:
            lines.append((f"{what}: blank", f"{found.blank}"))
        if repeats:
            dropped = settings.duplicates == "drop"
            kept = "left out" if dropped else "kept (--duplicates drop leaves them out)"
            lines.append((f"{what}: repeat an earlier row", f"{repeats}, {kept}"))
            rows = list(first) if dropped else rows
        return dict(zip(values, map(list, zip(*rows, strict=True)), strict=True)), lines

    values, lines = read(data, "data")
    contents = _contents(values)
    if settings.validation:
        test, more = read(settings.validation, "validation")
        known = set(_contents(test))
        out = np.array([content in known for content in contents])
        if out.any():
            more.append(("left out of training, held out too", f"{int(out.sum())}"))
        if out.all():
            raise ConfigError(
                f"validation {settings.validation!r}: holds every text of the data; give other"
                " texts, or leave it out for a share of the data"
            )
        lines += more
    else:
        classes = values["label"] if kinds.get("label") == "class" else None
        out = _split(settings, contents, classes)
        test = _taken(values, out)
    train = _taken(values, ~out)
    lines += [("for training", f"{len(train['text'])}"), ("held out", f"{len(test['text'])}")]
    return Fields(settings, train, test, lines)


def _contents(values: Mapping[str, list[Any]]) -> list[str]:
    """What makes rows alike: their texts, whatever the label."""
    texts = [values[name] for name in ("text", "second") if name in values]
    return ["\0".join(parts) for parts in zip(*texts, strict=True)]


def _taken(values: Mapping[str, list[Any]], chosen: np.ndarray) -> dict[str, list[Any]]:
    places = np.flatnonzero(chosen)
    return {field: [one[i] for i in places] for field, one in values.items()}


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts or pairs with a class or a number each."""

    fields: Fields

    @property
    def settings(self) -> Finetuning:
        return self.fields.settings

    @property
    def regression(self) -> bool:
        return self.settings.task == "regress"

    @property
    def labels(self) -> tuple[str, ...]:
        if self.regression:
            return ()
        names = sorted_names(self.fields.train["label"])
        if len(names) < 2:
            raise ConfigError(f"data: one class, {names[0]!r}; expected at least two")
        if strange := sorted(set(self.fields.test["label"]) - set(names)):
            raise ConfigError(f"data: class {strange[0]!r} is only held out; give it more examples")
        return names

    def tokenizer(self) -> WordPiece:
        train = self.fields.train
        return train_wordpiece([*train["text"], *train.get("second", ())], self.settings.vocabulary)

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        classes = 1 if self.regression else len(self.labels)
        return _new_encoder(self.settings, precision, vocabulary, "class", classes, self.labels)

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        c, sides = self.settings, (self.fields.train, self.fields.test)
        lines = list(self.fields.lines)
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
        lengths = lengths_of([len(e["ids"]) for e in (*train, *test)], c.longest)

        def judge(model: Any) -> Judge:
            predict = task.predictor(model, batch=c.batch, lengths=lengths)
            return lambda params: task.evaluate(predict(params, test), test)

        return Work(
            task, bucket_batches(train, batch=c.batch, seed=c.seed, lengths=lengths),
            -(-len(train) // c.batch), judge, metric,
            lines + _sizes(train, "ids", c.longest), fingerprint(tokens, [train, test]),
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
            lines + _sizes(train, "ids", c.longest), fingerprint(tokens, [train, test]),
        )  # fmt: skip


def _tagged(settings: Finetuning, data: Any) -> Tagged:
    """Sentences of a file of word<TAB>tag lines."""
    sides = []
    for source in filter(None, (data, settings.validation)):
        try:
            sides.append(read_sentences(source))
        except TypeError:
            raise ConfigError(
                "data: tags are read of a file of word<TAB>tag lines; write the sentences to one"
            ) from None
    found = [s for s in sides[0] if s[0][0] != "-DOCSTART-"]
    contents = [" ".join(word for word, _ in s) for s in found]
    if settings.validation:
        known = {" ".join(word for word, _ in s) for s in sides[1]}
        out = np.array([content in known for content in contents])
        test = sides[1]
    else:
        out = _split(settings, contents, None)
        test = [s for s, one in zip(found, out, strict=True) if one]
    train = [s for s, one in zip(found, out, strict=True) if not one]
    names = sorted_names(tag for side in (train, test) for s in side for _, tag in s)
    if len(names) < 2:
        raise ConfigError(f"data: one tag, {names[0]!r}; expected at least two")
    number = {name: i for i, name in enumerate(names)}
    made = [
        TaggedSentences(
            tuple(tuple(word for word, _ in s) for s in side),
            tuple(np.array([number[tag] for _, tag in s], np.int32) for s in side), names,
        )
        for side in (train, test)
    ]  # fmt: skip
    lines = [("sentences read", f"{len(sides[0])}"), ("for training", f"{len(train)}"),
             ("held out", f"{len(test)}")]  # fmt: skip
    return Tagged(settings, made[0], made[1], lines)


def _language_judge(held: Any) -> Callable[[Any], Judge]:
    def judge(model: Any) -> Judge:
        measure = Language().judge(model)
        return lambda params: measure(params, held)

    return judge


def _new_decoder(c: Finetuning, precision: str | Precision, vocabulary: int) -> Any:
    return decoder(
        "tiny", precision, vocabulary=vocabulary, layers=c.layers, width=c.width, heads=c.heads,
        context=c.longest,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts whose next tokens are learned."""

    settings: Finetuning
    data: str
    labels: tuple[str, ...] = ()

    def _corpus(self, tokens: Tokenizer | str) -> Corpus:
        c = self.settings
        return load_corpus(self.data, tokens, held_out=c.held_out, column=c.text or None)

    def tokenizer(self) -> Tokenizer:
        return self._corpus(f"bpe:{self.settings.vocabulary}").tokenizer

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        return _new_decoder(self.settings, precision, vocabulary)

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        c = self.settings
        corpus = self._corpus(tokens)
        sizes = {"batch": c.batch, "seq": c.longest}
        held = validation_batches(corpus.validation, **sizes, limit=_EVAL_BATCHES)
        lines = [("tokens for training", f"{len(corpus.train)}"),
                 ("tokens held out", f"{len(corpus.validation)}")]  # fmt: skip
        return Work(
            Language(), batches(corpus.train, **sizes, seed=c.seed),
            max(1, len(corpus.train) // (c.batch * c.longest)), _language_judge(held), "loss",
            lines, fingerprint(tokens, [corpus.train, corpus.validation]),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Prompts and their answers."""

    fields: Fields
    labels: tuple[str, ...] = ()

    def _pairs(self, side: Mapping[str, list[str]]) -> list[tuple[str, str]]:
        around = self.fields.settings.prompt
        pairs = zip(side["text"], side["label"], strict=True)
        return [(around.replace("{}", prompt), answer) for prompt, answer in pairs]

    def tokenizer(self) -> Tokenizer:
        texts = [a + b for a, b in self._pairs(self.fields.train)]
        return make_tokenizer(f"bpe:{self.fields.settings.vocabulary}", texts)

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        return _new_decoder(self.fields.settings, precision, vocabulary)

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        c = self.fields.settings
        train, test = (
            instruction_examples(
                self._pairs(side), tokens.encode, end=tokens.separator, longest=c.longest
            )
            for side in (self.fields.train, self.fields.test)
        )
        lengths = lengths_of([len(e["inputs"]) for e in (*train, *test)], c.longest)
        held: list[Batch] = [
            {name: x[: len(rows)] for name, x in batch.items()}
            for rows, batch in eval_batches(test, batch=c.batch, lengths=lengths)
        ]
        return Work(
            Language(), bucket_batches(train, batch=c.batch, seed=c.seed, lengths=lengths),
            -(-len(train) // c.batch), _language_judge(held), "loss",
            self.fields.lines + _sizes(train, "inputs", c.longest),
            fingerprint(tokens, [train, test]),
        )  # fmt: skip


def read_source(settings: Finetuning, data: Any) -> Source:
    """Reads the data of a run.

    Raises:
      ConfigError: data that cannot be read, or that the task cannot take.
    """
    if settings.task == "tag":
        return _tagged(settings, data)
    if settings.task == "lm":
        if not isinstance(data, str):
            raise ConfigError(
                "data: lm reads a file, a folder, FILE.jsonl:COLUMN, FILE.parquet:COLUMN or hf:NAME"
            )
        if settings.validation:
            raise ConfigError("validation: lm holds out documents of its data; set held_out")
        return Documents(settings, data)
    names = ("prompt", "answer") if settings.task == "instruct" else ("text", "label")
    kinds = {"text": "text", "label": "class"}
    columns = {"text": settings.text, "label": settings.label}
    if settings.task == "instruct":
        columns = {f: columns[f] or name for f, name in zip(columns, names, strict=True)}
        kinds["label"] = "text"
    if settings.task == "regress":
        kinds["label"] = "number"
    if settings.task == "pair" or settings.second:
        kinds["second"], columns["second"] = "text", settings.second
    fields = _fields(settings, data, kinds, columns)
    return Instructions(fields) if settings.task == "instruct" else Texts(fields)
