"""Text classification: it learns, its predictions are those of each text alone, slices pair."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest

from mpjax.data.buckets import IGNORE, bucket_batches
from mpjax.data.labelled import LabelledTexts
from mpjax.data.tokenizers.wordpiece import train_wordpiece
from mpjax.errors import ConfigError
from mpjax.precision import parse_policy
from mpjax.tasks import TextClassification, label_loss
from mpjax.train import build
from tests.tasks.bag import Bag

pytest.importorskip("sklearn", reason="the extra `tasks` is not installed")
pytestmark = pytest.mark.usefixtures("fast_compile")
GOOD, BAD = "tasty fresh lovely great".split(), "stale awful bitter poor".split()
DRAW = np.random.default_rng(0)
LENGTHS = (8, 16)


def draw_texts(count):
    labels = DRAW.integers(0, 2, count).astype(np.int32)
    texts = [" ".join(DRAW.choice((BAD, GOOD)[y], DRAW.integers(2, 12))) for y in labels]
    return LabelledTexts(tuple(texts), labels, ("bad", "good"))


@pytest.fixture(scope="module")
def pieces():
    return train_wordpiece([" ".join(GOOD + BAD)] * 3, 120)


@pytest.fixture(scope="module")
def trained(pieces, fast_compile):
    task = TextClassification(("bad", "good"))
    examples = task.examples(pieces, draw_texts(96), longest=16)
    model = Bag(pieces.vocab_size, {"class": 2})
    state, step = build(model, optax.adam(0.02), objective=task.objective)
    batches = bucket_batches(examples, batch=16, seed=0, lengths=LENGTHS)
    losses = []
    for batch in itertools.islice(batches, 24):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    return task, model, state.params


def test_it_learns_and_says_how_well(trained, pieces):
    task, model, params = trained
    held_out = task.examples(pieces, draw_texts(41), longest=16)
    logits = task.predictor(model, batch=8, lengths=LENGTHS)(params, held_out)
    scores = task.evaluate(logits, held_out)
    assert scores["accuracy"] > 0.9 > 0.6 > scores["loss"]
    assert scores["accuracy"] == pytest.approx(task.correct(logits, held_out).mean())
    assert 0 <= scores["calibration error"] < 0.5
    fresh = task.predictor(model, batch=8, lengths=LENGTHS)(model.init(jax.random.key(1)), held_out)
    assert task.evaluate(fresh, held_out)["accuracy"] < 0.9, "it is the training that did it"


def test_a_prediction_does_not_depend_on_its_batch(trained, pieces):
    task, model, params = trained
    held_out = task.examples(pieces, draw_texts(11), longest=16)
    together = task.predictor(model, batch=8, lengths=LENGTHS)(params, held_out)
    alone = task.predictor(model, batch=1, lengths=(16,))(params, held_out)
    assert np.allclose(together, alone, atol=1e-6) and together[0].shape == (2,)
    assert not np.allclose(together[0], together[1])


def test_pairs_have_types(pieces):
    task = TextClassification(("no", "yes"))
    pairs = LabelledTexts(("fresh",), np.array([1], np.int32), ("no", "yes"), ("stale poor",))
    (example,) = task.examples(pieces, pairs, longest=16)
    assert example["types"].tolist() == [0, 0, 0, 1, 1, 1] and example["labels"] == 1


def test_mistakes_are_one_line(pieces):
    with pytest.raises(ConfigError, match="expected at least two"):
        TextClassification(("only",))
    texts = dataclasses.replace(draw_texts(3), labels=np.array([0, 2, 1], np.int32))
    with pytest.raises(ConfigError, match="labels: 0 to 2, expected 0 to 1"):
        TextClassification(("bad", "good")).examples(pieces, texts, longest=16)
    fractions = dataclasses.replace(draw_texts(2), labels=np.array([0.0, 0.5]))
    with pytest.raises(ConfigError, match="labels: float64; give integers"):
        TextClassification(("bad", "good")).examples(pieces, fractions, longest=16)


def test_a_label_that_is_ignored_is_judged_as_in_the_loss():
    task = TextClassification(("a", "b", "c"))
    logits = np.array([[2.0, 0, 1], [0, 3, 1], [5, 0, 0], [0, 1, 0]], np.float32)
    labels = [0, 2, IGNORE, 1]
    found = task.evaluate(logits, [{"labels": np.int32(y)} for y in labels])
    wide = logits.astype(np.float64)[[0, 1, 3]]
    losses = np.log(np.exp(wide).sum(1)) - wide[[0, 1, 2], [0, 2, 1]]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["loss"] == pytest.approx(
        float(label_loss(logits, np.array(labels), parse_policy("f32"))), rel=1e-6
    )
    assert found["accuracy"] == pytest.approx(2 / 3)
    for wrong in (-1, -3, 3, 7):
        with pytest.raises(ConfigError, match=f"labels: {wrong} is no class"):
            task.evaluate(logits[:2], [{"labels": 0}, {"labels": wrong}])
    for wrong in (IGNORE, -1, 3):
        with pytest.raises(ConfigError, match=rf"examples\[1\]: label {wrong} is no class"):
            task.correct(logits[:2], [{"labels": 0}, {"labels": wrong}])


def test_weights_of_labels_are_those_of_their_mean():
    logits = np.array([[2.0, 0, 1], [0, 3, 1], [5, 0, 0]], np.float32)
    labels, weights = np.array([0, IGNORE, 1]), np.array([0.25, 9.0, 0.5], np.float32)
    wide = logits.astype(np.float64)[[0, 2]]
    losses = np.log(np.exp(wide).sum(1)) - wide[[0, 1], [0, 1]]
    got = label_loss(logits, labels, parse_policy("f32"), weights)
    assert float(got) == pytest.approx(weights[[0, 2]] @ losses / 0.75, rel=1e-6)
    with pytest.raises(ConfigError, match=r"weights: shape \(2,\) is not \(3,\)"):
        label_loss(logits, labels, parse_policy("f32"), weights[:2])
