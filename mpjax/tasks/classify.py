"""Classification of texts and of pairs of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.data.labelled import LabelledTexts
from mpjax.data.tokenizers.wordpiece import Example, WordPiece
from mpjax.errors import ConfigError
from mpjax.models import Encoder
from mpjax.tasks.labels import check_labels, check_names, label_objective
from mpjax.tasks.metrics import calibration_error, class_scores
from mpjax.tasks.predictor import Predict, predictor, softmax


@dataclasses.dataclass(frozen=True)
class TextClassification:
    """One class for each text, or for each pair of texts.

    Args:
      classes: their names in the order of the logits; of a checkpoint with a head of its own,
        `model.config.labels`.
      output: name of the model's output that holds the logits (B, C).
      loss: path whose policy the loss takes.
    """

    classes: tuple[str, ...]
    output: str = "class"
    loss: str = "encoder/loss"

    def __post_init__(self) -> None:
        check_names("classes", self.classes)

    def examples(self, pieces: WordPiece, texts: LabelledTexts, *, longest: int) -> list[Example]:
        """Returns the encoded texts, each with its class as `labels`, which is taken by its name.

        Raises:
          ConfigError: a class that is none of the task's, a label outside them, or what
            `WordPiece.encode` raises.
        """
        if texts.labels.dtype.kind not in "iu":
            raise ConfigError(f"labels: {texts.labels.dtype.name}; give integers, one a text")
        if texts.labels.size and not 0 <= texts.labels.min() <= texts.labels.max() < len(
            texts.classes
        ):
            raise ConfigError(
                f"labels: {texts.labels.min()} to {texts.labels.max()}, expected 0 to"
                f" {len(texts.classes) - 1}; give all {len(set(texts.labels.tolist()))} classes"
            )
        texts = texts.ordered(self.classes)
        found = pieces.encode(texts.texts, texts.seconds, longest=longest)
        return [e | {"labels": np.int32(y)} for e, y in zip(found, texts.labels, strict=True)]

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`."""
        check_labels(model, self.classes, "classes", self.output)
        return label_objective(model, self.output, self.loss)

    def predictor(self, model: Encoder, **settings: Any) -> Predict:
        """Returns a function (params, examples) -> logits (C,) of each; see `predictor`."""
        check_labels(model, self.classes, "classes", self.output)
        return predictor(model, self.output, **settings)

    def correct(self, logits: Sequence[np.ndarray], examples: Sequence[Example]) -> np.ndarray:
        """Returns for each example whether its most likely class is right, (N,) bool."""
        labels = np.array([e["labels"] for e in examples])
        if (wrong := np.flatnonzero((labels < 0) | (labels >= len(self.classes)))).size:
            raise ConfigError(
                f"examples[{wrong[0]}]: label {labels[wrong[0]]} is no class; expected 0 to"
                f" {len(self.classes) - 1}, leave the example out"
            )
        return np.argmax(np.stack(logits), -1) == labels

    def evaluate(
        self, logits: Sequence[np.ndarray], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Returns accuracy, F1, cross-entropy in nats and calibration error (15 bins).

        Examples whose label is `IGNORE` count for nothing, as in the loss.

        Raises:
          ConfigError: no label, or one that is no class.
        """
        labels = np.array([e["labels"] for e in examples])
        chosen = labels != IGNORE
        labels, probabilities = labels[chosen], softmax(np.stack(logits))[chosen]
        scores = class_scores(labels, probabilities.argmax(-1), self.classes)
        picked = probabilities[np.arange(len(labels)), labels]
        return scores | {
            "loss": float(-np.log(np.maximum(picked, np.finfo(np.float64).tiny)).mean()),
            "calibration error": calibration_error(probabilities, labels),
        }
