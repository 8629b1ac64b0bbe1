"""What predictions are worth: accuracy, F1, calibration, entities, texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpjax.errors import ConfigError, need
from mpjax.typing import ArrayLike


def class_scores(
    labels: ArrayLike, predicted: ArrayLike, classes: Sequence[str]
) -> dict[str, float]:
    """Returns accuracy, macro F1 and the F1 of each class, in 0 ... 1, by scikit-learn.

    Args:
      labels: (N,) indices into `classes`.
      predicted: (N,) the same.
      classes: names.

    Raises:
      ConfigError: scikit-learn is not installed, or a label outside the classes.

    Example:
      >>> scores = class_scores([0, 0, 1, 1], [0, 1, 1, 1], ("no", "yes"))
      >>> scores["accuracy"], round(scores["f1 no"], 3)
      (0.75, 0.667)
    """
    labels, predicted = (_labels(x, len(classes)) for x in (labels, predicted))
    f1_score = need("sklearn.metrics", "tasks", "metrics").f1_score
    each = f1_score(
        labels, predicted, labels=np.arange(len(classes)), average=None, zero_division=0.0
    )
    scores = {"accuracy": float(np.mean(labels == predicted)), "macro f1": float(np.mean(each))}
    return scores | {f"f1 {name}": float(f1) for name, f1 in zip(classes, each, strict=True)}


def _labels(values: ArrayLike, classes: int) -> np.ndarray:
    found = np.asarray(values)
    if not found.size:
        raise ConfigError("labels: none to score; name more held-out data")
    if found.min() < 0 or found.max() >= classes:
        wrong = found.min() if found.min() < 0 else found.max()
        raise ConfigError(f"labels: {wrong} is no class; expected 0 to {classes - 1}")
    return found


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    r"""Returns the expected calibration error, how far confidence is from accuracy.

    $$\sum_b \frac{n_b}{N} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert$$ over equal bins.

    Args:
      probabilities: (N, C), rows sum to 1.
      labels: (N,) indices of the classes.
      bins: number of bins.

    Example:
      >>> probabilities = np.array([[0.75, 0.25]] * 4)
      >>> calibration_error(probabilities, [0, 0, 0, 1]), calibration_error(probabilities, [0] * 4)
      (0.0, 0.25)

    References:
      Guo et al. 2017, On Calibration of Modern Neural Networks, section 2.
    """
    p = np.asarray(probabilities, np.float64)
    confidence, right = p.max(1), p.argmax(1) == _labels(labels, p.shape[1])
    of = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [of == b for b in np.unique(of)]
    gaps = [part.mean() * abs(right[part].mean() - confidence[part].mean()) for part in parts]
    return float(sum(gaps))


def entity_scores(
    tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns precision, recall and F1 of whole entities in BIO tags, by seqeval.

    An entity counts when its span and its type are right, in 0 ... 1.

    Raises:
      ConfigError: seqeval is not installed, or sentences differ in length.

    Example:
      >>> tags = [["B-person", "I-person", "O"], ["B-place", "O"]]
      >>> entity_scores(tags, [["B-person", "O", "O"], ["B-place", "O"]])["f1"]
      0.5
    """
    for number, (a, b) in enumerate(zip(tags, predicted, strict=True)):
        if len(a) != len(b):
            raise ConfigError(f"sentence {number}: {len(a)} tags and {len(b)} predictions")
    module = need("seqeval.metrics", "tasks", "metrics")
    rows = [list(map(list, side)) for side in (tags, predicted)]
    names = {"precision": "precision_score", "recall": "recall_score", "f1": "f1_score"}
    return {
        name: float(getattr(module, function)(*rows, zero_division=0))
        for name, function in names.items()
    }


def text_scores(references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Returns how near texts are to their references.

    Args:
      references: what was wanted.
      texts: what came.

    Returns:
      `exact` share of equal texts, `cer` edits a reference character (Levenshtein), both in 0 ...
      1 (cer may exceed 1); `bleu` and `chrf` of the corpus in 0 ... 100, by sacrebleu.

    Raises:
      ConfigError: sacrebleu is not installed, or nothing to score.

    Example:
      >>> scores = text_scores(["abcd", "ef"], ["abed", "ef"])
      >>> scores["exact"], round(scores["cer"], 4)
      (0.5, 0.1667)

    References:
      Post 2018, A Call for Clarity in Reporting BLEU Scores; Popovic 2015, chrF.
    """
    if len(references) != len(texts) or not references:
        raise ConfigError(
            f"texts: {len(texts)} for {len(references)} references; give one for each"
        )
    sacrebleu = need("sacrebleu", "tasks", "metrics")
    edits = sum(_edits(a, b) for a, b in zip(references, texts, strict=True))
    return {
        "exact": float(np.mean([a == b for a, b in zip(references, texts, strict=True)])),
        "cer": edits / max(1, sum(map(len, references))),
        "bleu": float(sacrebleu.corpus_bleu(list(texts), [list(references)]).score),
        "chrf": float(sacrebleu.corpus_chrf(list(texts), [list(references)]).score),
    }


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
