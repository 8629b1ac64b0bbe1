"""Regression: the mean squared error of transformers and of NumPy, and a model that learns it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.data.buckets import bucket_batches
from mpjax.data.tokenizers.wordpiece import train_wordpiece
from mpjax.errors import ConfigError
from mpjax.models import encoder
from mpjax.tasks import TextClassification, TextRegression
from mpjax.train import build
from tests.tasks.bag import Bag

pytestmark = pytest.mark.usefixtures("fast_compile")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hf_texts.json").read_text())
TEXTS = [f"good {'film ' * (i % 5)}" if i % 2 else f"bad {'film ' * (i % 5)}" for i in range(48)]
VALUES = [1.5 if i % 2 else -0.5 for i in range(48)]


class Fixed:
    """A model whose output is given, for the loss alone."""

    def __init__(self, out: np.ndarray):
        self.precision = encoder("bert-tiny", layers=1, width=16, heads=2).precision
        self.out = jnp.asarray(out)

    def apply(self, params, inputs, *, state=None, key=None, train=False):
        return {"class": self.out + params}, state


def test_the_loss_is_that_of_transformers_and_counts_rows():
    logits = np.array(GOLDEN["encoders"]["bert, one number"]["logits"], np.float32)
    values = np.array([0.5, -1.25], np.float32)
    loss = TextRegression().objective(Fixed(logits))
    batch = {"ids": jnp.zeros((2, 3), jnp.int32), "values": values}
    found, _ = loss(jnp.float32(0), batch)
    assert float(found) == pytest.approx(GOLDEN["encoders"]["bert, one number"]["loss"], rel=1e-6)
    gradient = jax.grad(lambda p: loss(p, batch)[0])(jnp.float32(0))
    want = 2 * np.mean(logits.astype(np.float64)[:, 0] - values)
    assert float(gradient) == pytest.approx(want, rel=1e-5)
    assert float(loss.count(batch)) == 2, "microbatches are weighted by their rows"


def test_it_learns_a_number():
    task, pieces = TextRegression(), train_wordpiece(TEXTS * 3, 60)
    examples = task.examples(pieces, TEXTS, VALUES, longest=16)
    assert {e["values"].dtype.name for e in examples} == {"float32"}
    model = Bag(pieces.vocab_size, {"class": 1})
    state, step = build(model, optax.adam(0.03), objective=task.objective)
    predict = task.predictor(model, batch=16, lengths=(16,))
    before = task.evaluate(predict(state.params, examples), examples)
    data = bucket_batches(examples, batch=16, seed=0, lengths=(16,))
    for batch in itertools.islice(data, 60):
        state, _ = step(state, batch)
    after = task.evaluate(predict(state.params, examples), examples)
    assert after["loss"] < 0.05 < before["loss"] and after["pearson"] > 0.95
    constant = [np.array([0.5], np.float32)] * 48
    assert task.evaluate(constant, examples) == {
        "loss": pytest.approx(1.0), "pearson": 0.0, "spearman": 0.0
    }  # fmt: skip


def test_correlations_are_numpys_of_values_and_of_ranks():
    draw = np.random.default_rng(0)
    right = draw.integers(0, 6, 60).astype(np.float32)  # ties, as of graded similarity
    found = np.exp(right + draw.normal(size=60)).astype(np.float32)
    scores = TextRegression().evaluate(found[:, None], [{"values": y} for y in right])
    assert scores["pearson"] == pytest.approx(np.corrcoef(found, right)[0, 1])

    def ranks(x):
        return np.array([(x < a).sum() + ((x == a).sum() + 1) / 2 for a in x])

    assert scores["spearman"] == pytest.approx(np.corrcoef(ranks(found), ranks(right))[0, 1])
    monotone = TextRegression().evaluate(np.exp(right)[:, None], [{"values": y} for y in right])
    assert monotone["spearman"] == pytest.approx(1) and monotone["pearson"] < 0.9


def test_a_pair_is_scored_as_a_pair():
    """The number says whether both texts are of one kind: neither text alone tells it."""
    draw, kinds = np.random.default_rng(0), (("red", "blue"), ("one", "two"))
    sides = draw.integers(0, 2, (2, 64))
    firsts, seconds = (tuple(kinds[k][draw.integers(2)] for k in side) for side in sides)
    values = (sides[0] == sides[1]).astype(np.float32)
    task, pieces = TextRegression(), train_wordpiece(["red blue one two"] * 3, 60)
    examples = task.examples(pieces, firsts, values, seconds, longest=8)
    model = encoder(
        "bert-tiny", layers=1, width=32, heads=2, head="class", classes=1, pool="mean",
        vocabulary=pieces.vocab_size, context=8,
    )  # fmt: skip
    state, step = build(model, optax.adam(1e-2), objective=task.objective)
    data = bucket_batches(examples, batch=32, seed=0, lengths=(8,))
    for batch in itertools.islice(data, 80):
        state, _ = step(state, batch)
    predict = task.predictor(model, batch=32, lengths=(8,))
    scores = task.evaluate(predict(state.params, examples), examples)
    assert scores["spearman"] > 0.8
    alone = task.examples(pieces, firsts, values, longest=8)
    assert task.evaluate(predict(state.params, alone), alone)["spearman"] < 0.5


def test_mistakes_are_one_line():
    pieces, small = train_wordpiece(TEXTS, 60), dict(layers=1, width=16, heads=2)
    for values, message in (
        ([1.0], "float64 of shape .1,. for 2 texts; give a number for each"),
        (["a", "b"], "give a number for each"),
        ([1.0, float("nan")], "number 1 is nan; leave such texts out"),
    ):
        with pytest.raises(ConfigError, match=message):
            TextRegression().examples(pieces, ["a", "b"], values, longest=8)
    classes = encoder("bert-tiny", head="class", **small)
    with pytest.raises(ConfigError, match="the model has 2 outputs, expected 1; make it with"):
        TextRegression().objective(classes)
    number = encoder("bert-tiny", head="class", classes=1, **small)
    with pytest.raises(ConfigError, match="the task has 2, the model 1 output.s.; make the model"):
        TextClassification(("a", "b")).objective(number)
    objective, params = TextRegression().objective(number), number.init(jax.random.key(0))
    for call in (objective.count, lambda batch: objective.loss(params, batch)):
        with pytest.raises(ConfigError, match="the batch holds ids and no 'values'; add it"):
            call({"ids": np.ones((1, 4), np.int32)})
