"""What predictions are worth: accuracy, F1, calibration, entities, ranks, texts."""

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


def target_ranks(
    scores: ArrayLike, targets: ArrayLike, *, known: ArrayLike | None = None
) -> np.ndarray:
    """Returns the rank of each row's right item among the candidates, 1 is the best, (N,) int64.

    Of equal scores the right item comes last, so that constant scores earn nothing; one that is
    not a number ranks behind all numbers.

    Args:
      scores: (N, C) of all items.
      targets: (N,) numbers of the right ones.
      known: (N, C) bool, items that are no candidates; None is none.

    Raises:
      ConfigError: shapes that do not pair, or a right item that is none or no candidate.

    Example:
      >>> target_ranks([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3]], [2, 0]).tolist()
      [2, 3]
    """
    s, right = np.array(scores, np.float64), np.asarray(targets)
    if s.ndim != 2 or right.shape != s.shape[:1] or right.dtype.kind not in "iu" or not s.size:
        raise ConfigError(
            f"ranks: scores of shape {s.shape} and targets of shape {right.shape}; give (N, C) and"
            " the number of an item for each row"
        )
    if right.min() < 0 or right.max() >= s.shape[1]:
        raise ConfigError(
            f"ranks: targets {right.min()} to {right.max()}; expected 0 to {s.shape[1] - 1}"
        )
    out = np.zeros(s.shape, bool) if known is None else np.asarray(known)
    rows = np.arange(len(s))
    if out.shape != s.shape or out[rows, right].any():
        raise ConfigError(
            f"ranks: known has shape {out.shape}, scores {s.shape}; give one for each score, and"
            " leave the right items in"
        )
    s[np.isnan(s)] = -np.inf
    return ((s >= s[rows, right][:, None]) & ~out).sum(1)


def ranking_scores(
    scores: ArrayLike, targets: ArrayLike, *, at: int = 10, known: ArrayLike | None = None
) -> dict[str, float]:
    r"""Returns how high one right item ranks in each row, means over rows in 0 ... 1.

    Of ranks $r$: the hit rate `hr@10` counts $r \le 10$, `ndcg@10` is $1 / \log_2 (1 + r)$ where
    $r \le 10$ and 0 elsewhere, `mrr` is $1 / r$. All items are ranked: means over a sample of
    candidates need not order methods as those over all do.

    Args:
      scores: as of `target_ranks`, as are targets and known.
      at: the 10 of the above.

    Raises:
      ConfigError: as `target_ranks`.

    Example:
      >>> ranking_scores([[0.1, 0.9, 0.5]], [2], at=1)
      {'hr@1': 0.0, 'ndcg@1': 0.0, 'mrr': 0.5}

    References:
      Krichene and Rendle 2020, On Sampled Metrics for Item Recommendation, section 2.
    """
    if at < 1:
        raise ConfigError(f"ranks: at={at}; expected at least 1")
    ranks = target_ranks(scores, targets, known=known)
    gains = ranking_gains(ranks, at)
    return {
        f"hr@{at}": float((ranks <= at).mean()),
        f"ndcg@{at}": float(gains.mean()),
        "mrr": float((1 / ranks).mean()),
    }


def ranking_gains(ranks: np.ndarray, at: int = 10) -> np.ndarray:
    r"""Returns the NDCG of each rank, $1 / \log_2 (1 + r)$ where $r \le$ `at`, else 0."""
    return np.where(ranks <= at, 1 / np.log2(1 + np.asarray(ranks, np.float64)), 0.0)


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
