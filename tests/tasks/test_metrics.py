"""Metrics: hand-counted cases, and the bounds they must keep."""

import sys

import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.tasks.metrics import calibration_error, class_scores, entity_scores, text_scores

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
