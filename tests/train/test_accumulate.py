"""Microbatches: the mean of the whole batch for every objective, whatever its targets are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax import ops, train
from mpjax.data.buckets import IGNORE
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.tasks import MaskedLanguage, TextClassification, TokenClassification
from mpjax.train.step import init_state, make_train_step
from tests.tasks.bag import Bag

pytestmark = pytest.mark.usefixtures("fast_compile")

DRAW = np.random.default_rng(0)
B, T = 8, 6
KEEP = np.arange(T) < np.array([6, 1, 2, 5, 3, 6, 1, 4])[:, None]  # microbatches differ in targets
BATCH = {
    "ids": DRAW.integers(0, 20, (B, T)).astype(np.int32),
    "types": np.zeros((B, T), np.int32),
    "keep": KEEP,
}
TOKENS = np.where(KEEP & (DRAW.random((B, T)) < 0.6), DRAW.integers(0, 3, (B, T)), IGNORE)
NEXT = np.array([0, IGNORE, 1, 1, 0, IGNORE, IGNORE, 1])
WEIGHTS = DRAW.random((B, T)).astype(np.float32) * (DRAW.random((B, T)) < 0.7)
CLASSES = ("a", "b", "c")

# name -> objective, what the batch holds besides, (logits, labels, weights, factor) of each loss
CASES: dict[str, tuple[Any, dict[str, Any], list[tuple[str, Any, Any, float]]]] = {
    "masked and next": (
        MaskedLanguage(), {"labels": TOKENS, "next": NEXT},
        [("masked", TOKENS, None, 1.0), ("next", NEXT, None, 1.0)],
    ),
    "masked and next, weighted": (
        MaskedLanguage(0.3, 2.0), {"labels": TOKENS, "next": NEXT},
        [("masked", TOKENS, None, 0.3), ("next", NEXT, None, 2.0)],
    ),
    "masked": (MaskedLanguage(next=0.0), {"labels": TOKENS}, [("masked", TOKENS, None, 1.0)]),
    "next": (
        MaskedLanguage(masked=0.0), {"labels": TOKENS, "next": NEXT}, [("next", NEXT, None, 1.0)]
    ),
    "class": (TextClassification(CLASSES), {"labels": NEXT}, [("class", NEXT, None, 1.0)]),
    "class, weighted": (
        TextClassification(CLASSES), {"labels": NEXT, "weights": WEIGHTS[:, 0]},
        [("class", NEXT, WEIGHTS[:, 0], 1.0)],
    ),
    "token": (TokenClassification(CLASSES), {"labels": TOKENS}, [("token", TOKENS, None, 1.0)]),
    "token, weighted": (
        TokenClassification(CLASSES), {"labels": TOKENS, "weights": WEIGHTS},
        [("token", TOKENS, WEIGHTS, 1.0)],
    ),
}  # fmt: skip
MODEL = Bag(20, {"masked": 3, "next": 2, "class": 3, "token": 3})


def exact(case: str, params: Any) -> float:
    """The loss of the whole batch in float64."""
    out, _ = MODEL.apply(params, BATCH)
    total = 0.0
    for name, labels, weights, factor in CASES[case][2]:
        chosen = labels != IGNORE
        logits = np.asarray(out[name], np.float64)[chosen]
        picked = logits[np.arange(len(logits)), labels[chosen]]
        w = np.ones(len(logits)) if weights is None else weights[chosen].astype(np.float64)
        total += factor * (w @ (np.log(np.exp(logits).sum(-1)) - picked)) / w.sum()
    return total


@pytest.mark.parametrize("case", CASES)
def test_microbatches_give_the_weights_of_the_whole_batch(case: str) -> None:
    task, more, _ = CASES[case]
    batch = BATCH | {name: x.astype(np.float32 if name == "weights" else np.int32)
                     for name, x in more.items()}  # fmt: skip
    found = []
    for accumulate in (1, 4):
        state, step = train.build(
            MODEL, optax.sgd(1.0), accumulate=accumulate, objective=task.objective
        )
        want = exact(case, jax.device_get(state.params))
        state, metrics = step(state, batch)
        found.append(jax.device_get(state.params))
        assert float(metrics["loss"]) == pytest.approx(want, rel=2e-6)
    for cut in found[1:]:
        for whole, part in zip(jax.tree.leaves(found[0]), jax.tree.leaves(cut), strict=True):
            np.testing.assert_allclose(part, whole, rtol=0, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found[0], MODEL.init(jax.random.key(0)))
    assert max(jax.tree.leaves(moved)) > 1e-2


def test_losses_of_a_user_have_a_count_each() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    batch = {
        "x": x,
        "a": np.array([1, 0, 1, 1], np.float32),
        "b": np.array([0, 3, 1, 0], np.float32),
    }

    def parts(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
        mean = lambda w: jnp.sum(w * params * batch["x"]) / jnp.maximum(jnp.sum(w), 1)  # noqa: E731
        return {name: mean(batch[name]) for name in "ab"}, state

    def loss(params: Any, batch: Any, **options: Any) -> Any:
        found, state = parts(params, batch, **options)
        return found["a"] + found["b"], state

    count = lambda batch: {name: jnp.sum(batch[name]) for name in "ab"}  # noqa: E731
    objective = ops.Objective(loss, count, parts)
    for precision in ("fp32", "fp16"):
        for accumulate in (1, 2, 4):
            optimizer = wrap(optax.sgd(1.0), get_precision(precision))
            state = init_state(jnp.float32(0.0), optimizer)
            state, _ = make_train_step(objective, optimizer, accumulate=accumulate)(state, batch)
            want = -(1 + 4 + 8) / 3 - (3 * 2 + 4) / 4  # by hand
            assert float(state.params) == pytest.approx(want, rel=1e-6)
