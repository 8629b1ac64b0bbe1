"""Two tasks at once: the sum of their losses, and what each pulls."""

import jax
import numpy as np
import optax
import pytest

from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.tasks import MaskedLanguage
from mpjax.train import build
from tests.tasks.bag import Bag

pytestmark = pytest.mark.usefixtures("fast_compile")
DRAW = np.random.default_rng(0)
LABELS = np.where(DRAW.random((4, 9)) < 0.3, DRAW.integers(0, 20, (4, 9)), IGNORE)
BATCH = {
    "ids": DRAW.integers(0, 20, (4, 9)).astype(np.int32),
    "types": np.repeat([[0] * 5 + [1] * 4], 4, 0).astype(np.int32),
    "keep": np.ones((4, 9), bool),
    "labels": LABELS.astype(np.int32),
    "next": np.array([0, 1, 1, 0], np.int32),
}
MODEL = Bag(20, {"masked": 20, "next": 2})
PARAMS = MODEL.init(jax.random.key(0))


def test_the_loss_is_the_weighted_sum():
    both, _ = MaskedLanguage().losses(MODEL)(PARAMS, BATCH)
    assert set(both) == {"masked", "next"} and float(both["masked"]) > 1 > 0.1 < float(both["next"])
    loss, _ = MaskedLanguage(2.0, 0.5).objective(MODEL)(PARAMS, BATCH)
    assert float(loss) == pytest.approx(2 * float(both["masked"]) + 0.5 * float(both["next"]))
    alone = {name: x for name, x in BATCH.items() if name != "next"}
    loss, _ = MaskedLanguage(next=0.0).objective(MODEL)(PARAMS, alone)
    assert float(loss) == pytest.approx(float(both["masked"]))


def test_what_is_judged_counts_each_target_once():
    halves = [{name: x[part] for name, x in BATCH.items()} for part in (slice(0, 1), slice(1, 4))]
    assert len({(half["labels"] != IGNORE).sum() for half in halves}) == 2, "or any mean would do"
    scores, right = MaskedLanguage().judge(MODEL)(PARAMS, halves)
    out, _ = MODEL.apply(PARAMS, {name: BATCH[name] for name in ("ids", "types", "keep")})
    for name, labels in (("masked", BATCH["labels"]), ("next", BATCH["next"])):
        chosen = labels != IGNORE
        logits, labels = np.asarray(out[name], np.float64)[chosen], labels[chosen]
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]
        np.testing.assert_array_equal(right[name], logits.argmax(-1) == labels)
        assert scores[name] == pytest.approx(losses.mean(), rel=1e-5)
        assert scores[f"{name} accuracy"] == right[name].mean()
    blank = BATCH | {"labels": np.full_like(LABELS, IGNORE)}
    with pytest.raises(ConfigError, match="no target of masked"):
        MaskedLanguage().judge(MODEL)(PARAMS, [blank])


def test_shares_are_those_of_the_two_gradients():
    task = MaskedLanguage(1.0, 3.0)
    shares = task.gradient_shares(MODEL)(PARAMS, BATCH)
    norms, grads = {}, {}
    for name, weight in (("masked", 1.0), ("next", 3.0)):
        one = lambda p, n=name, w=weight: w * task.losses(MODEL)(p, BATCH)[0][n]  # noqa: E731
        grad = jax.jit(jax.grad(one))(PARAMS)
        grads[name] = np.concatenate([np.ravel(grad[part]) for part in ("table", "types")])
        norms[name] = np.linalg.norm(grads[name].astype(np.float64))
    assert shares["masked"] == pytest.approx(norms["masked"] / sum(norms.values()), rel=1e-5)
    assert shares["masked"] + shares["next"] == pytest.approx(1)
    cosine = grads["masked"] @ grads["next"] / (norms["masked"] * norms["next"])
    assert shares["cosine"] == pytest.approx(cosine, abs=1e-6)
    even = MaskedLanguage(1.0, 1.0).gradient_shares(MODEL)(PARAMS, BATCH)
    assert even["next"] < shares["next"] and even["cosine"] == pytest.approx(shares["cosine"])
    assert set(MaskedLanguage(next=0.0).gradient_shares(MODEL)(PARAMS, BATCH)) == {"masked"}


def test_both_are_learned():
    state, step = build(MODEL, optax.adam(0.05), objective=MaskedLanguage().objective)
    judge = MaskedLanguage().judge(MODEL)
    before, _ = judge(state.params, [BATCH])
    for _ in range(30):
        state, _ = step(state, BATCH)
    after, _ = judge(state.params, [BATCH])
    assert all(after[name] < 0.5 * before[name] for name in ("masked", "next"))
    assert all(after[f"{name} accuracy"] > 0.8 for name in ("masked", "next"))


@pytest.mark.parametrize(
    "weights", [(0.0, 0.0), (-1.0, 1.0), (float("inf"), 1.0), (1.0, float("nan"))]
)
def test_weights_out_of_range_are_one_line(weights):
    with pytest.raises(ConfigError, match="weights: masked="):
        MaskedLanguage(*weights)
    with pytest.raises(ConfigError, match="none to judge"):
        MaskedLanguage().judge(MODEL)(PARAMS, [])


@pytest.mark.parametrize("wrong", [-1, -7, 20, 500])
def test_a_label_that_is_no_class_has_no_scores(wrong):
    labels = BATCH["labels"].copy()
    labels[0, 0] = wrong
    scores, _ = MaskedLanguage().judge(MODEL)(PARAMS, [BATCH | {"labels": labels}])
    assert np.isnan([scores["masked"], scores["masked accuracy"]]).all()
    assert np.isfinite([scores["next"], scores["next accuracy"]]).all()
