"""Microbatches: the mean of the whole batch for every objective, whatever its targets are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.tasks import MaskedLanguage, TextClassification, TokenClassification
from mpjax.train import build
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
        state, step = build(MODEL, optax.sgd(1.0), accumulate=accumulate, objective=task.objective)
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

    def terms(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
        mean = lambda w: jnp.sum(w * params * batch["x"]) / jnp.maximum(jnp.sum(w), 1)  # noqa: E731
        losses = {name: mean(batch[name]) for name in "ab"}
        return ops.Terms(losses, state, {"rows": jnp.float32(batch["x"].shape[0])})

    count = lambda batch: {name: jnp.sum(batch[name]) for name in "ab"}  # noqa: E731
    objective = ops.Objective.of_terms(terms, count)
    for precision in ("fp32", "fp16"):
        for accumulate in (1, 2, 4):
            optimizer = wrap(optax.sgd(1.0), get_precision(precision))
            state = init_state(jnp.float32(1.0), optimizer)
            step = make_train_step(objective, optimizer, accumulate=accumulate)
            state, metrics = step(state, batch)
            a, b = (1 + 4 + 8) / 3, (3 * 2 + 4) / 4  # by hand
            assert float(state.params) == pytest.approx(1 - a - b, rel=1e-6)
            told = [float(metrics[name]) for name in ("loss", "loss/a", "loss/b", "rows")]
            assert told == pytest.approx([a + b, a, b, 4 / accumulate], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_objective_trains_weights_of_its_own_and_knows_the_loss_scale(accumulate: int) -> None:
    """y = f(x) w with w of the objective, on a mesh too; the scale is the state's."""
    model = decoder("tiny", "fp16", layers=1, width=16, heads=2, vocabulary=32)

    def objective(model: Any) -> ops.Objective:
        def terms(
            params: Any, batch: Any, *, state: Any, key: Any, train: bool, loss_scale: Any = 1.0
        ) -> Any:
            loss, state = model.loss(params, batch, state=state, key=key, train=train)
            own = jnp.sum((params["own"]["w"] - 2.0) ** 2)
            metrics = {"scale": jnp.asarray(loss_scale, jnp.float32)}
            return ops.Terms({"model": loss.astype(jnp.float32), "own": own}, state, metrics)

        def count(batch: Any) -> Any:
            return {name: jnp.float32(len(batch["inputs"])) for name in ("model", "own")}

        draw = lambda key: {"own": {"w": jax.random.normal(key, (3,))}}  # noqa: E731
        return ops.Objective.of_terms(terms, count, init=draw, takes_scale=True)

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32, (8, 9)).astype(np.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    ends = []
    for mesh in (None, "data=2,fsdp=2,tensor=2"):
        options: Any = dict(mesh=mesh, objective=objective, accumulate=accumulate)
        state, step = build(model, optax.sgd(0.25), **options)
        first = np.asarray(state.params["own"]["w"])
        assert jax.tree.structure(step.init(0)) == jax.tree.structure(state)
        for _ in range(2):
            state, metrics = step(state, batch)
            assert float(metrics["scale"]) == float(metrics["loss_scale"]) > 1
        assert not int(metrics["skipped"])
        assert np.asarray(state.params["own"]["w"]) == pytest.approx(2 + (first - 2) / 4, rel=1e-3)
        ends.append(float(metrics["loss/own"]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    with pytest.raises(ConfigError, match=r"the model has the names \['decoder'\] too"):
        build(
            model,
            optax.sgd(0.1),
            objective=lambda m: dataclasses.replace(objective(m), init=lambda _: {"decoder": 0.0}),
        )
