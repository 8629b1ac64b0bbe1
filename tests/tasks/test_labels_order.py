"""Labels of data are taken by name into the order of a checkpoint, or there is an error."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from mpjax.data.class_names import sorted_names
from mpjax.data.labelled import LabelledTexts, load_labelled
from mpjax.data.tagged import TaggedSentences, load_tagged
from mpjax.data.tokenizers.wordpiece import train_wordpiece
from mpjax.errors import ConfigError
from mpjax.models import encoder
from mpjax.models.core.metadata import Metadata
from mpjax.tasks import TextClassification, TokenClassification

ORDER = ("neutral", "positive", "negative")  # of the logits
NAMED = {"good": "positive", "bad": "negative", "fine": "neutral"}
SMALL = dict(layers=1, width=16, heads=2, vocabulary=64)


@pytest.fixture(scope="module")
def pieces():
    return train_wordpiece([f"{word} {word} film" for word in NAMED] * 9, 64)


def logits(texts):
    """Of a classifier that is always right, in the order of its checkpoint."""
    return [np.eye(3)[ORDER.index(NAMED[text.split()[0]])] * 9.0 for text in texts]


def test_a_files_labels_are_judged_by_their_names(pieces, tmp_path):
    words = [list(NAMED)[i % 3] for i in range(150)]
    rows = [f"{NAMED[w]}\t{w}{' film' * i}" for i, w in enumerate(words)]
    (tmp_path / "l.tsv").write_text("\n".join(rows))
    train, test = load_labelled(str(tmp_path / "l.tsv"))
    assert train.classes == tuple(sorted(ORDER)) != ORDER
    task = TextClassification(ORDER)
    examples = task.examples(pieces, test, longest=200)
    assert task.evaluate(logits(test.texts), examples)["accuracy"] == 1.0
    assert task.correct(logits(test.texts), examples).all()
    sorted_task = TextClassification(train.classes)
    wrong = sorted_task.evaluate(
        logits(test.texts), sorted_task.examples(pieces, test, longest=200)
    )
    assert wrong["accuracy"] < 0.5, "what the model's own order is checked for"
    model = encoder("bert-tiny", head="class", labels=ORDER, **SMALL)
    for make in (sorted_task.objective, lambda m: sorted_task.predictor(m, batch=1, lengths=(8,))):
        with pytest.raises(ConfigError, match=r"the model \('neutral', 'positive', 'negative'\);"):
            make(model)
    task.objective(model), task.predictor(model, batch=1, lengths=(8,))


def test_tags_are_judged_by_their_names(pieces, tmp_path):
    lines = "".join(f"good\tX\nbad\tO\nfilm{i}\tB-Y\n\n" for i in range(60))
    (tmp_path / "t.tsv").write_text(lines)
    _, test = load_tagged(str(tmp_path / "t.tsv"))
    names = ("X", "O", "B-Y")
    assert test.names == ("B-Y", "O", "X")
    task = TokenClassification(names)
    right = [np.array([0, 1, 2], np.int32)] * len(test)
    assert task.evaluate(right, test)["accuracy"] == 1.0
    example = task.examples(pieces, test, longest=32)[0]
    assert example["labels"][example["labels"] >= 0].tolist() == [0, 1, 2]
    model = encoder("bert-tiny", head="token", labels=names, **SMALL)
    task.objective(model)
    with pytest.raises(
        ConfigError, match="tags: the task has .*, the model .*; make the task with"
    ):
        TokenClassification(test.names).objective(model)


def test_strange_and_doubled_names_are_one_line(pieces):
    texts = LabelledTexts(("a", "b"), np.array([0, 1], np.int32), ("bad", "good"))
    assert texts.ordered(("bad", "good")) is texts
    more = texts.ordered(("good", "fine", "bad"))
    assert (more.labels.tolist(), more.classes) == ([2, 0], ("good", "fine", "bad"))
    with pytest.raises(ConfigError, match="the data names 'bad', which is none of"):
        texts.ordered(("good", "poor"))
    with pytest.raises(ConfigError, match="names one twice"):
        texts.ordered(("good", "bad", "bad"))
    tagged = TaggedSentences((("a",),), (np.array([1], np.int32),), ("N", "V"))
    assert tagged.ordered(("V", "N")).tags[0].tolist() == [0]
    with pytest.raises(ConfigError, match="tags: the data names 'N'"):
        tagged.ordered(("V", "X"))


def test_numbers_as_labels_are_in_the_order_of_numbers(tmp_path):
    assert sorted_names(map(str, range(12))) == tuple(map(str, range(12)))
    assert sorted_names(["b", "10", "9"]) == ("10", "9", "b")
    rows = [f"{i % 11}\ttext {i}" for i in range(300)]
    (tmp_path / "n.tsv").write_text("\n".join(rows))
    assert load_labelled(str(tmp_path / "n.tsv"))[0].classes == tuple(map(str, range(11)))


def test_names_that_say_nothing_and_other_problems(caplog):
    unnamed = encoder("bert-tiny", head="class", labels=("LABEL_0", "LABEL_1"), **SMALL)
    with caplog.at_level(logging.WARNING, "mpjax.tasks"):
        TextClassification(("0", "1")).objective(unnamed)
        assert not caplog.messages
        TextClassification(("bad", "good")).objective(unnamed)
    assert "does not name its own; its outputs are taken for bad good" in caplog.text
    several = dataclasses.replace(
        unnamed, metadata=Metadata({"problem_type": "multi_label_classification"})
    )
    with pytest.raises(ConfigError, match="problem_type is 'multi_label_classification', not one"):
        TextClassification(("0", "1")).objective(several)
