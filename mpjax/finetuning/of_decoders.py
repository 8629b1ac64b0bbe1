"""Documents, instructions and pairs of sequences: what is learned token by token."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from mpjax.data import (
    Batch,
    Corpus,
    Tokenizer,
    batches,
    bucket_batches,
    eval_batches,
    load_corpus,
    make_tokenizer,
    validation_batches,
)
from mpjax.data.chat import Chat, conversation_examples, instruction_examples
from mpjax.data.tables.columns import TOOLS
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.table_sides import Sides
from mpjax.finetuning.tuned_chat import PROMPT, own_template, run_chat
from mpjax.finetuning.work import Judge, Lines, Work, fingerprint, lengths_of, told_sizes
from mpjax.models import decoder, seq2seq
from mpjax.models.hf import Metadata
from mpjax.precision import Precision
from mpjax.tasks import Language, Translation

log = logging.getLogger(__name__)

_EVAL_BATCHES = 64  # of next-token prediction


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


def _tools(side: Mapping[str, list[str]]) -> list[Any]:
    """The functions of each conversation; none at all of rows without such a column."""
    return [json.loads(one) for one in side.get(TOOLS, [])]


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Prompts and their answers, or conversations.

    Args:
      sides: fields `text` and `label` of a row, or `messages` as JSON and perhaps `tools`.
      metadata: of the checkpoint that is tuned, whose chat template is taken.
    """

    sides: Sides
    metadata: Metadata = Metadata()
    labels: tuple[str, ...] = ()

    def _pairs(self, side: Mapping[str, list[str]]) -> list[tuple[str, str]]:
        """Prompts with what stands around them, and answers."""
        around = self.sides.settings.prompt or PROMPT
        pairs = zip(side["text"], side["label"], strict=True)
        return [(around.replace("{}", prompt), answer) for prompt, answer in pairs]

    def _conversations(self, side: Mapping[str, list[str]]) -> list[Any]:
        if "messages" in side:
            return [json.loads(one) for one in side["messages"]]
        return [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in zip(side["text"], side["label"], strict=True)
        ]

    def tokenizer(self) -> Tokenizer:
        train = self.sides.train
        if "messages" in train:
            talks = self._conversations(train)
            texts = [str(m.get("content") or "") for messages in talks for m in messages]
        else:
            texts = [a + b for a, b in self._pairs(train)]
        return make_tokenizer(f"bpe:{self.sides.settings.vocabulary}", texts)

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        return _new_decoder(self.sides.settings, precision, vocabulary)

    def _told_tools(self, chat: Chat) -> Lines:
        """How many conversations have tools, and whether the template shows them."""
        talks, tools = self._conversations(self.sides.train), _tools(self.sides.train)
        having = [(talk, one) for talk, one in zip(talks, tools, strict=False) if one]
        if not having:
            return []
        lost = "" if chat.shows(*having[0]) else "; the chat template does not show them"
        if lost:
            log.warning("tools: the chat template does not show them; the model will not see any")
        return [("conversations with tools", f"{len(having)}{lost}")]

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        c, sides = self.sides.settings, (self.sides.train, self.sides.test)
        lines = list(self.sides.lines)
        own = not c.prompt and own_template(self.metadata.files) is not None
        if own or "messages" in self.sides.train:
            chat = run_chat(tokens, self.metadata, c.prompt)
            around = "the model's chat template" if own else repr(c.prompt or PROMPT)
            train, test = (
                conversation_examples(
                    self._conversations(side), chat, longest=c.longest, tools=_tools(side)
                )
                for side in sides
            )
            lines += self._told_tools(chat)
        else:
            around = repr(c.prompt or PROMPT)
            train, test = (
                instruction_examples(
                    self._pairs(side), tokens.encode, end=tokens.separator, longest=c.longest
                )
                for side in sides
            )
        lengths = lengths_of([len(e["inputs"]) for e in (*train, *test)], c.longest)
        held: list[Batch] = [
            {name: x[: len(rows)] for name, x in batch.items()}
            for rows, batch in eval_batches(test, batch=c.batch, lengths=lengths)
        ]
        return Work(
            Language(), bucket_batches(train, batch=c.batch, seed=c.seed, lengths=lengths),
            -(-len(train) // c.batch), _language_judge(held), "loss",
            [*lines, ("around a prompt", around)]
            + told_sizes(train, "inputs", c.longest),
            fingerprint(tokens, [train, test]),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sources and their targets."""

    sides: Sides
    labels: tuple[str, ...] = ()

    def tokenizer(self) -> Tokenizer:
        train = self.sides.train
        return make_tokenizer(
            f"bpe:{self.sides.settings.vocabulary}", [*train["text"], *train["label"]]
        )

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        c = self.sides.settings
        return seq2seq(
            "seq2seq-tiny", precision, vocabulary=vocabulary + 2, layers=c.layers, width=c.width,
            heads=c.heads, dropout=c.dropout, context=c.longest,
            norm_first=True,  # post-norm needs a longer warm-up
        )  # fmt: skip

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        c, task = self.sides.settings, Translation(tokens)
        pairs = [
            task.fitting(list(zip(side["text"], side["label"], strict=True)), longest=c.longest)
            for side in (self.sides.train, self.sides.test)
        ]
        train, test = map(task.examples, pairs)
        sizes = [max(len(e["source"]), len(e["inputs"])) for e in (*train, *test)]
        lengths = lengths_of(sizes, c.longest)
        left = len(self.sides.train["text"]) - len(train)
        lines = [*self.sides.lines, ("too long, left out of training", f"{left}")]

        def judge(model: Any) -> Judge:
            measure = task.judge(model, batch=c.batch, lengths=lengths)
            return lambda params: measure(params, test)

        return Work(
            task, bucket_batches(train, batch=c.batch, seed=c.seed, lengths=lengths),
            -(-len(train) // c.batch), judge, "loss",
            lines + told_sizes(train, "source", c.longest), fingerprint(tokens, [train, test]),
        )  # fmt: skip
