"""Metrics: hand-counted cases, and the bounds they must keep."""

import sys

import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.tasks.metrics import (
    calibration_error,
    class_scores,
    entity_scores,
    ranking_gains,
    ranking_scores,
    target_ranks,
    text_scores,
)

for name in ("sklearn", "seqeval", "sacrebleu"):
    pytest.importorskip(name, reason="the extra `tasks` is not installed")


def test_class_scores_are_those_counted_by_hand():
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    scores = class_scores(labels, predicted, ("a", "b", "c"))
    assert scores["accuracy"] == pytest.approx(4 / 6)
    by_hand = {"a": 2 * 2 / (3 + 2), "b": 2 * 1 / (2 + 2), "c": 2 * 1 / (1 + 2)}
    for name, f1 in by_hand.items():
        assert scores[f"f1 {name}"] == pytest.approx(f1)
    assert scores["macro f1"] == pytest.approx(np.mean(list(by_hand.values())))
    assert class_scores([0, 0], [0, 0], ("a", "b"))["f1 b"] == 0, "a class that never occurs"


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0], []])
def test_a_label_that_is_no_class_is_one_line(labels):
    with pytest.raises(ConfigError, match="labels: (3|-1|none)"):
        class_scores(labels, [0] * len(labels), ("a", "b", "c"))


def test_calibration_of_a_calibrated_model_is_small_and_of_a_bold_one_large():
    draw = np.random.default_rng(0)
    p = draw.uniform(0.5, 1, 20_000)
    probabilities = np.stack([p, 1 - p], 1)
    labels = (draw.random(p.size) > p).astype(int)
    assert calibration_error(probabilities, labels) < 0.02
    bold = np.where(probabilities > 0.5, 0.99, 0.01)
    assert calibration_error(bold, labels) == pytest.approx(0.99 - 0.75, abs=0.02)
    # One bin: the gap of the two means
    want = abs((labels == 0).mean() - p.mean())
    assert calibration_error(probabilities, labels, bins=1) == pytest.approx(want)


def test_an_entity_counts_whole_or_not_at_all():
    tags = [["B-x", "I-x", "O", "B-y"], ["O", "B-x"]]
    assert entity_scores(tags, tags) == {"precision": 1, "recall": 1, "f1": 1}
    cut = [["B-x", "O", "O", "B-y"], ["O", "B-y"]]
    scores = entity_scores(tags, cut)
    assert scores["precision"] == pytest.approx(1 / 3) == scores["recall"]
    assert entity_scores(tags, [["O"] * 4, ["O"] * 2])["f1"] == 0
    with pytest.raises(ConfigError, match="sentence 1: 2 tags and 1 predictions"):
        entity_scores(tags, [cut[0], ["O"]])


@pytest.mark.parametrize("masked", [False, True])
def test_ranks_are_scored_as_scikit_learn_does(masked):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    scores, targets = draw.normal(size=(50, 40)), draw.integers(0, 40, 50)
    known = (draw.random((50, 40)) < 0.3) & (np.arange(40) != targets[:, None]) & masked
    found = ranking_scores(scores, targets, known=known if masked else None)
    right = np.arange(40) == targets[:, None]
    left = np.where(known, -1e9, scores)
    assert found["ndcg@10"] == pytest.approx(metrics.ndcg_score(right, left, k=10))
    assert found["mrr"] == pytest.approx(metrics.label_ranking_average_precision_score(right, left))
    hits = metrics.top_k_accuracy_score(targets, left, k=10, labels=np.arange(40))
    assert found["hr@10"] == pytest.approx(hits) and 0 < hits < 1
    gains = ranking_gains(target_ranks(scores, targets, known=known))
    assert gains.mean() == pytest.approx(found["ndcg@10"])
    if masked:
        assert found["mrr"] > ranking_scores(scores, targets)["mrr"]


def test_equal_scores_and_nan_earn_nothing():
    constant = ranking_scores(np.zeros((3, 20)), [0, 5, 19])
    assert constant == {"hr@10": 0, "ndcg@10": 0, "mrr": pytest.approx(1 / 20)}
    # Control: numpy's sort would put the first item first, and earn.
    assert np.argsort(-np.zeros(20), kind="stable")[0] == 0
    broken = np.full((2, 20), np.nan)
    assert target_ranks(broken, [0, 1]).tolist() == [20, 20]
    broken[1, 1] = 0.0
    assert target_ranks(broken, [0, 1]).tolist() == [20, 1]


def test_ranks_of_wrong_shapes_are_one_line():
    s = np.zeros((2, 3))
    for call, message in (
        (lambda: target_ranks(s, [0]), "shape .2, 3. and targets of shape .1,"),
        (lambda: target_ranks(s, [0, 3]), "targets 0 to 3; expected 0 to 2"),
        (lambda: target_ranks(s, [0.0, 1.0]), "give .N, C. and the number of an item"),
        (lambda: target_ranks(s, [0, 1], known=np.ones((2, 3), bool)), "leave the right items in"),
        (lambda: target_ranks(s, [0, 1], known=np.zeros((2, 2), bool)), "one for each score"),
        (lambda: ranking_scores(s, [0, 1], at=0), "at=0; expected at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_texts_are_scored_by_edits_and_by_sacrebleu():
    references = ["the cat sat on the mat", "kitten"]
    assert text_scores(references, references)["bleu"] == pytest.approx(100)
    scores = text_scores(references, ["the cat sat on the mat", "sitting"])
    assert scores["exact"] == 0.5 and scores["cer"] == pytest.approx(3 / 28)
    assert 0 < scores["bleu"] < 100 and 0 < scores["chrf"] < 100
    assert text_scores(["abc"], [""])["cer"] == 1 and text_scores(["ab"], ["abcdef"])["cer"] == 2
    with pytest.raises(ConfigError, match="1 for 2 references"):
        text_scores(references, ["a"])


@pytest.mark.parametrize("package", ["sklearn.metrics", "seqeval.metrics", "sacrebleu"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    calls = {
        "sklearn.metrics": lambda: class_scores([0], [0], ("a", "b")),
        "seqeval.metrics": lambda: entity_scores([["O"]], [["O"]]),
        "sacrebleu": lambda: text_scores(["a"], ["a"]),
    }
    with pytest.raises(ConfigError, match=r"not installed; .*pip install .*\[tasks\]'"):
        calls[package]()
