"""Classification of tokens: a tag for each word."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.data.tagged import TaggedSentences
from mpjax.data.tokenizers.wordpiece import Example, WordPiece
from mpjax.errors import ConfigError
from mpjax.models import Encoder
from mpjax.tasks.labels import check_labels, check_names, label_objective
from mpjax.tasks.metrics import class_scores, entity_scores
from mpjax.tasks.predictor import Predict, predictor


@dataclasses.dataclass(frozen=True)
class TokenClassification:
    """A tag for each word, read at the word's first piece.

    Args:
      names: of the tags in the order of the logits; of a checkpoint with a head of its own,
        `model.config.labels`.
      output: name of the model's output that holds the logits (B, T, C).
      loss: path whose policy the loss takes.
      capitals: whether token types tell which words begin with a capital letter, as of
        `WordPiece.encode_words`; the model needs two types.
    """

    names: tuple[str, ...]
    output: str = "token"
    loss: str = "encoder/loss"
    capitals: bool = False

    def __post_init__(self) -> None:
        check_names("tags", self.names)

    def examples(
        self, pieces: WordPiece, sentences: TaggedSentences, *, longest: int
    ) -> list[Example]:
        """Returns the encoded sentences, with `labels`, taken by name, at each word's first piece.

        Raises:
          ConfigError: a tag that is none of the task's, or what `WordPiece.encode_words` raises.
        """
        sentences = sentences.ordered(self.names)
        found, starts = pieces.encode_words(
            sentences.words, longest=longest, capitals=self.capitals
        )
        examples = []
        for example, places, tags in zip(found, starts, sentences.tags, strict=True):
            labels = np.full(len(example["ids"]), IGNORE, np.int32)
            if np.asarray(tags).dtype.kind not in "iu":
                raise ConfigError(f"tags: {np.asarray(tags).dtype.name}; give integers, one a word")
            labels[places] = tags
            examples.append(example | {"labels": labels})
        return examples

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`."""
        check_labels(model, self.names, "tags", self.output)
        return label_objective(model, self.output, self.loss)

    def predictor(self, model: Encoder, **settings: Any) -> Predict:
        """Returns a function (params, examples) -> logits (T, C) of each; see `predictor`."""
        check_labels(model, self.names, "tags", self.output)
        return predictor(model, self.output, **settings)

    def tags(self, logits: Sequence[np.ndarray], examples: Sequence[Example]) -> list[np.ndarray]:
        """Returns the most likely tag of each word."""
        pairs = zip(logits, examples, strict=True)
        return [np.argmax(one[e["labels"] != IGNORE], -1) for one, e in pairs]

    def evaluate(
        self, predicted: Sequence[np.ndarray], sentences: TaggedSentences, *, entities: bool = False
    ) -> dict[str, float]:
        """Returns the scores of predicted tags.

        Args:
          predicted: tags of each sentence, as `tags` returns them or of a baseline.
          sentences: the right ones.
          entities: whether tags are BIO, and whole entities are scored too.
        """
        sentences = sentences.ordered(self.names)
        right, guess = (np.concatenate(list(side)) for side in (sentences.tags, predicted))
        found = class_scores(right, guess, self.names)
        scores = {name: found[name] for name in ("accuracy", "macro f1")}
        if entities:
            named = [
                [[self.names[t] for t in s] for s in side] for side in (sentences.tags, predicted)
            ]
            scores |= {f"entity {name}": x for name, x in entity_scores(named[0], named[1]).items()}
        return scores
