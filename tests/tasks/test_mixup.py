"""Mixup beside NumPy in float64; what is mixed, what is not, and under which Precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.models import encoder
from mpjax.tasks import Mixup, TextClassification, TokenClassification
from tests.tasks.bag import Bag

pytestmark = pytest.mark.usefixtures("fast_compile")
TASK = TextClassification(("a", "b", "c"))
KEY = jax.random.key(5)
MODEL = Bag(20, {"class": 3})
PARAMS = MODEL.init(jax.random.key(0))
DRAW = np.random.default_rng(0)
BATCH = {
    "ids": DRAW.integers(0, 20, (8, 5)).astype(np.int32), "keep": np.ones((8, 5), bool),
    "types": np.zeros((8, 5), np.int32), "labels": DRAW.integers(0, 3, 8).astype(np.int32),
}  # fmt: skip


def loss(batch, alpha=0.7, key=KEY, train=True, model=MODEL):
    objective = Mixup(TASK, alpha).objective(model)
    return objective(PARAMS, batch, key=key, train=train)[0]


def numpy_loss(batch, shares, weights=None):
    """The mean of the rows' own and other labels under mixed logits, float64."""
    inputs = {name: batch[name] for name in ("ids", "keep", "types")}
    logits = np.asarray(MODEL.apply(PARAMS, inputs)[0]["class"], np.float64)
    labels, total, weight = batch["labels"], 0.0, 0.0
    for i in range(len(labels)):
        j = (i - 1) % len(labels)
        if labels[i] == IGNORE:
            continue
        share, other = (shares[i], labels[j]) if labels[j] != IGNORE else (1.0, labels[i])
        scores = log_softmax(share * logits[i] + (1 - share) * logits[j])
        own = 1.0 if weights is None else weights[i]
        total -= own * (share * scores[labels[i]] + (1 - share) * scores[other])
        weight += own
    return total / weight


def shares(alpha, key=KEY):
    drawn = jax.random.beta(jax.random.fold_in(key, 2**32 - 1), alpha, alpha, (8,))
    return np.asarray(drawn, np.float64)


def test_the_loss_is_numpys_with_weights_and_absent_labels():
    assert float(loss(BATCH)) == pytest.approx(numpy_loss(BATCH, shares(0.7)), rel=1e-6)
    labels = BATCH["labels"].copy()
    labels[[2, 5]] = IGNORE
    weights = np.linspace(0.2, 2.0, 8).astype(np.float32)
    batch = BATCH | {"labels": labels, "weights": weights}
    want = numpy_loss(batch, shares(0.7), weights)
    assert float(loss(batch)) == pytest.approx(want, rel=1e-6)
    assert abs(numpy_loss(BATCH, shares(0.7)[::-1]) - numpy_loss(BATCH, shares(0.7))) > 1e-3
    objective = Mixup(TASK, 0.7).objective(MODEL)
    assert float(objective.count(batch)) == pytest.approx(weights[labels != IGNORE].sum())


def test_nothing_is_mixed_in_judging_and_little_with_a_small_alpha():
    plain = float(TASK.objective(MODEL)(PARAMS, BATCH)[0])
    assert float(loss(BATCH, train=False)) == plain
    assert float(loss(BATCH, alpha=50.0)) != pytest.approx(plain, rel=1e-3)
    ends = [min(s, 1 - s) for k in range(20) for s in shares(0.01, jax.random.key(k))]
    assert np.mean(np.array(ends) < 1e-3) > 0.9, "nearly every row is one of the two"


def test_mixtures_of_bfloat16_logits_are_not_rounded_again():
    model = Bag(20, {"class": 3}, "bf16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    objective = Mixup(TASK, 0.7).objective(model)
    inputs = {name: BATCH[name] for name in ("ids", "keep", "types")}
    logits = model.apply(params, inputs)[0]["class"]
    assert logits.dtype == jnp.bfloat16

    def exact(rounded):
        share, rows = shares(0.7)[:, None], np.arange(8)
        z = np.asarray(logits, np.float64)
        mixed = share * z + (1 - share) * np.roll(z, 1, 0)
        mixed = np.asarray(jnp.asarray(mixed).astype(jnp.bfloat16), float) if rounded else mixed
        scores = log_softmax(mixed, axis=-1)
        own, other = scores[rows, BATCH["labels"]], scores[rows, np.roll(BATCH["labels"], 1)]
        return -(share[:, 0] * own + (1 - share[:, 0]) * other).mean()

    found = float(objective(params, BATCH, key=KEY, train=True)[0])
    assert found == pytest.approx(exact(False), rel=1e-6)
    assert found != pytest.approx(exact(True), rel=1e-5), "the control"
    grads = jax.grad(lambda p: objective(p, BATCH, key=KEY, train=True)[0])(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def small(precision="fp32", vocabulary=20):
    return encoder(
        "bert-tiny", precision, layers=1, width=16, heads=2, vocabulary=vocabulary, head="class",
        classes=3, dropout=0.0,
    )  # fmt: skip


def padded():
    """Texts of several lengths, whose padding is token 0."""
    keep = np.arange(5) < np.array([5, 2, 3, 5, 1, 4, 5, 2])[:, None]
    types = (np.arange(5) >= 2) & keep
    return BATCH | {"ids": BATCH["ids"] * keep, "keep": keep, "types": types.astype(np.int32)}


def test_words_are_mixed_as_if_each_mixture_were_a_token_of_its_own():
    """The oracle: a vocabulary with a row for every mixed place, mixed in float64."""
    model, batch = small(), padded()
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(1)))
    table = np.asarray(params["encoder"]["embed"]["table"], np.float64)
    labels = batch["labels"].copy()
    labels[3] = IGNORE  # rows 3 and 4 are not mixed
    share = np.where(np.isin(np.arange(8), (3, 4)), 1.0, shares(0.7))[:, None, None]
    there = table[batch["ids"]] * batch["keep"][..., None]
    mixed = share * there + (1 - share) * np.roll(there, 1, 0)
    keep = batch["keep"] | (np.roll(batch["keep"], 1, 0) & (share[..., 0] < 1))
    wide = small(vocabulary=20 + 40)
    rows = np.concatenate([table, mixed.reshape(40, 16)]).astype(np.float32)
    changed = jax.tree.map(lambda x: x, params)
    changed["encoder"]["embed"]["table"] = jnp.asarray(rows)
    types = np.where(batch["keep"], batch["types"], np.roll(batch["types"], 1, 0))
    inputs = {"ids": 20 + np.arange(40, dtype=np.int32).reshape(8, 5), "keep": keep, "types": types}
    scores = log_softmax(np.asarray(wide.apply(changed, inputs)[0]["class"], np.float64), -1)
    part, total = share[:, 0, 0], 0.0
    for i in range(8):
        if labels[i] != IGNORE:
            other = labels[i - 1] if labels[i - 1] != IGNORE else labels[i]
            total -= part[i] * scores[i, labels[i]] + (1 - part[i]) * scores[i, other]
    objective = Mixup(TASK, 0.7, level="word").objective(model)
    found = objective(params, batch | {"labels": labels}, key=KEY, train=True)[0]
    assert float(found) == pytest.approx(total / 7, rel=1e-5)
    sentence = Mixup(TASK, 0.7).objective(model)
    other = sentence(params, batch | {"labels": labels}, key=KEY, train=True)[0]
    assert float(other) != pytest.approx(total / 7, rel=1e-4), "the control"


def test_both_words_of_a_mixture_are_learned(monkeypatch):
    """With shares of 0 each row is the other text, in the weights' gradients too."""
    monkeypatch.setattr(jax.random, "beta", lambda *args: jnp.zeros(8))
    model, batch = small(), BATCH
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(1)))
    mixed, plain = (
        jax.value_and_grad(
            lambda p, t=task, b=batch: t.objective(model)(p, b, key=KEY, train=True)[0]
        )(params)
        for task, batch in (
            (Mixup(TASK, level="word"), batch),
            (TASK, {name: np.roll(x, 1, 0) for name, x in batch.items()}),
        )
    )
    assert float(mixed[0]) == pytest.approx(float(plain[0]), rel=1e-5)
    tables = [np.asarray(g[1]["encoder"]["embed"]["table"], np.float64) for g in (mixed, plain)]
    assert np.abs(tables[0] - tables[1]).max() < 1e-4 * np.abs(tables[1]).max() > 0


def test_mistakes_are_one_line():
    with pytest.raises(ConfigError, match="mixup: the task is .*; give TextClassification"):
        Mixup(TokenClassification(("a", "b")))
    for alpha in (0, -1.0, float("nan"), float("inf"), "0.2", True):
        with pytest.raises(ConfigError, match="mixup: alpha=.*expected a number above 0"):
            Mixup(TASK, alpha)
    with pytest.raises(ConfigError, match=r"mixup: unknown level 'words'; did you mean word\?"):
        Mixup(TASK, level="words")
    with pytest.raises(ConfigError, match="in the token table of an Encoder, and the model is"):
        Mixup(TASK, level="word").objective(MODEL)
    with pytest.raises(ConfigError, match="mixup: the shares are drawn, which needs a key"):
        loss(BATCH, key=None)
