"""What a stage trains on: data as examples or a stream, the objective, and how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import launch  # sets XLA flags before JAX starts  # noqa: F401

import numpy as np  # isort: skip
from common.datasets.sources import DOCUMENTS, LABELLED, PAIRS
from common.segments import pairs, pieces_of
from common.stage_plan import Classify, Instruct, Masked, NextToken, OnText, Plan
from mpjax.data import (
    Example,
    WordPiece,
    batches,
    bucket_batches,
    eval_batches,
    load_corpus,
    load_labelled,
    load_pairs,
    load_wordpiece,
    make_tokenizer,
    packed_batches,
    read_documents,
    split_documents,
    train_wordpiece,
    validation_batches,
)
from mpjax.data.chat import instruction_examples
from mpjax.data.masking import masking
from mpjax.errors import ConfigError, need
from mpjax.finetuning.work import fingerprint
from mpjax.tasks import Language, MaskedLanguage, TextClassification
from mpjax.typing import Batch, Params, Settings

Judge = Callable[[Params], dict[str, float]]
Change = Callable[[Batch, np.random.Generator], Batch]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage trains on.

    Args:
      task: of `mpjax.tasks`.
      tokenizer: of its text, a WordPiece or a Tokenizer.
      model: what of the model's config it decides.
      context: tokens of its longest sequence.
      data: (rows, seed) -> endless batches whose position can be saved.
      judge: a model -> weights -> scores, on held-out data.
      fingerprint: of the data as ids, which a resumed run must find again.
    """

    task: Any
    tokenizer: Any
    model: Settings
    context: int
    data: Callable[[int, int], Any]
    judge: Callable[[Any], Judge]
    fingerprint: str


def _bucketed(
    examples: Sequence[Example], lengths: Sequence[int],
    change: Change = lambda batch, draw: batch,
) -> Callable[[int, int], Any]:  # fmt: skip
    def data(rows: int, seed: int) -> Any:
        return bucket_batches(examples, batch=rows, seed=seed, lengths=lengths, change=change)

    return data


def _held_out(held_out: Sequence[Example], stage: Any, plan: Plan) -> list[Batch]:
    """Batches of held-out examples, evenly spread; each example once."""
    most = min(len(held_out), stage.batch * plan.eval_batches)
    chosen = [held_out[i] for i in np.linspace(0, len(held_out) - 1, most).astype(int)]
    return [
        {name: x[: len(rows)] for name, x in batch.items()}
        for rows, batch in eval_batches(chosen, batch=stage.batch, lengths=stage.lengths)
    ]


def _pieces(stage: OnText, tokenizer: Any, texts: Callable[[], Sequence[str]]) -> WordPiece:
    """The tokenizer of an encoder: the one that is taken over, or the one that is asked for."""
    if tokenizer is not None:
        return tokenizer
    kind, _, size = stage.tokenizer.partition(":")
    if kind == "wordpiece":
        if not size.isdecimal():
            raise ConfigError(f"tokenizer {stage.tokenizer!r}: write wordpiece:1000")
        return train_wordpiece(texts(), int(size))
    if not Path(stage.tokenizer).exists():
        raise ConfigError(
            f"tokenizer {stage.tokenizer!r}: no such file; an encoder takes wordpiece:1000 or a"
            " BERT tokenizer.json"
        )
    return load_wordpiece(stage.tokenizer)


def masked(stage: Masked, plan: Plan, tokenizer: Any) -> Work:
    """Masked tokens and next sentences."""
    task = MaskedLanguage(stage.masked_weight, stage.next_weight)
    documents = read_documents(stage.data, sources=DOCUMENTS)
    sides = [pieces_of(side, stage) for side in split_documents(documents)]
    pieces = _pieces(stage, tokenizer, lambda: [" ".join(lines) for lines in sides[0]])
    train, test = (
        pairs(side, lines, pieces, stage)
        for side, lines in zip(("training", "held out"), sides, strict=True)
    )
    change, draw = masking(pieces, stage.mask_rate), np.random.default_rng(0)
    held_out = [change(batch, draw) for batch in _held_out(test, stage, plan)]

    def judge(model: Any) -> Judge:
        measure = task.judge(model)

        def scores(params: Params) -> dict[str, float]:
            found, _ = measure(params, held_out)
            first, *_ = task.weights
            loss = {"validation_loss": found[first], "accuracy": found[f"{first} accuracy"]}
            return loss | {name.replace(" ", "_"): value for name, value in found.items()}

        return scores

    return Work(
        task, pieces, {"head": "pretrain", "classes": 2}, max(stage.lengths),
        _bucketed(train, stage.lengths, change), judge, fingerprint(pieces, [train, test]),
    )  # fmt: skip


def classify(stage: Classify, plan: Plan, tokenizer: Any) -> Work:
    """A class for each text."""
    need("sklearn.metrics", "tasks", "metrics")
    sides = load_labelled(stage.data, sources=LABELLED)
    pieces, longest = _pieces(stage, tokenizer, lambda: sides[0].texts), max(stage.lengths)
    task = TextClassification(sides[0].classes)
    train, test = (task.examples(pieces, side, longest=longest) for side in sides)

    def judge(model: Any) -> Judge:
        predict = task.predictor(model, batch=stage.batch, lengths=stage.lengths)

        def scores(params: Params) -> dict[str, float]:
            found = task.evaluate(predict(params, test), test)
            names = {"loss": "validation_loss"}
            return {names.get(k, k.replace(" ", "_")): value for k, value in found.items()}

        return scores

    head = {"head": "class", "classes": len(task.classes), "labels": task.classes}
    return Work(
        task, pieces, head, longest, _bucketed(train, stage.lengths), judge,
        fingerprint(pieces, [train, test]),
    )  # fmt: skip


def _language_judge(held_out: Sequence[Batch] | Any) -> Callable[[Any], Judge]:
    def judge(model: Any) -> Judge:
        measure = Language().judge(model)

        def scores(params: Params) -> dict[str, float]:
            found = measure(params, held_out)
            return {"validation_loss": found["loss"], "perplexity": found["perplexity"]}

        return scores

    return judge


def language(stage: NextToken, plan: Plan, tokenizer: Any) -> Work:
    """Next tokens of documents."""
    spec = tokenizer or stage.tokenizer
    corpus = load_corpus(stage.data, spec, held_out=stage.held_out, sources=DOCUMENTS)
    held_out = validation_batches(
        corpus.validation, batch=stage.batch, seq=stage.seq, limit=plan.eval_batches
    )

    def data(rows: int, seed: int) -> Any:
        return batches(corpus.train, batch=rows, seq=stage.seq, seed=seed)

    own = corpus.tokenizer
    return Work(
        Language(), own, {}, stage.seq, data, _language_judge(held_out),
        fingerprint(own, [corpus.train, corpus.validation]),
    )  # fmt: skip


def instruct(stage: Instruct, plan: Plan, tokenizer: Any) -> Work:
    """Answers to prompts."""
    sides = load_pairs(stage.data, sources=PAIRS)
    asked = [
        [(stage.prompt.replace("{}", first), second) for first, second in side] for side in sides
    ]
    own = tokenizer or make_tokenizer(stage.tokenizer, [a + b for a, b in asked[0]])
    longest = max(stage.lengths)
    train, test = (
        instruction_examples(side, own.encode, end=own.separator, longest=longest) for side in asked
    )
    held_out = _held_out(test, stage, plan)

    def packed(rows: int, seed: int) -> Any:
        return packed_batches(train, batch=rows, length=longest, seed=seed)

    return Work(
        Language(), own, {}, longest, packed if stage.pack else _bucketed(train, stage.lengths),
        _language_judge(held_out),
        fingerprint(own, [train, test]),
    )  # fmt: skip


WORKS: dict[type, tuple[str, Callable[..., Work]]] = {
    Masked: ("encoder", masked),
    Classify: ("encoder", classify),
    NextToken: ("decoder", language),
    Instruct: ("decoder", instruct),
}
