"""Ranking: its losses and gradients against float64, with mutants; a model that learns to rank."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from mpjax.data import bucket_batches, candidates, train_wordpiece
from mpjax.errors import ConfigError
from mpjax.models import encoder
from mpjax.precision import get_precision
from mpjax.tasks import Ranking, ranking_scores
from mpjax.train import build
from tests.tasks.bag import Bag

pytestmark = pytest.mark.usefixtures("fast_compile")
B, K, D, TAU = 4, 3, 5, 0.5


class Vectors:
    """An encoder whose vectors are its parameters: `text` of token type 0, `item` of type 1."""

    def __init__(self, precision: str = "fp32", dtype: Any = jnp.float32):
        self.precision, self.dtype = get_precision(precision), dtype

    def apply(self, params, inputs, *, state=None, key=None, train=False):
        which = "item" if np.all(inputs["types"]) else "text"
        assert len(inputs["ids"]) == len(params[which])
        return {"pooled": params[which].astype(self.dtype)}, state


def vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "text": rng.normal(size=(B, D)).astype(np.float32),
        "item": rng.normal(size=(B * K, D)).astype(np.float32),
    }


def made() -> dict[str, Any]:
    """A batch in which row 1's target is a negative of row 0, and row 2's is row 3's too."""
    items = np.array([[3, 7, 0], [7, 1, 5], [5, 7, 2], [5, 8, 3]], np.int32)
    return {
        "ids": np.ones((B, 2), np.int32),
        "types": np.zeros((B, 2), np.int32),
        "item_ids": np.ones((B, K, 2), np.int32),
        "item_types": np.ones((B, K, 2), np.int32),
        "item_keep": np.ones((B, K, 2), bool),
        "items": items,
        "log_q": np.log(np.linspace(0.01, 0.3, 9)).astype(np.float32)[items],
    }


def exact(
    kind: str, params: Any, batch: Any, corrected: bool = True, copies: bool = False
) -> float:
    """The loss in float64, row by row."""
    u, v = (np.asarray(params[name], np.float64) for name in ("text", "item"))
    u, v = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, v))
    losses = []
    for b in range(B):
        s = v @ u[b] / TAU
        target = b * K
        if kind == "bpr":
            others = s[target + 1 : target + K]
            losses.append(np.mean(np.log1p(np.exp(others - s[target]))))
            continue
        if corrected:
            s = s - batch["log_q"].ravel().astype(np.float64)
        numbers = batch["items"].ravel()
        pool = [i for i in range(B * K) if copies or i == target or numbers[i] != numbers[target]]
        losses.append(-log_softmax(s[pool])[pool.index(target)])
    return float(np.mean(losses))


@pytest.mark.parametrize("kind", ["softmax", "bpr"])
def test_loss_and_gradient_are_float64s(kind: str) -> None:
    batch, params = made(), vectors()
    objective = Ranking(kind, TAU).objective(Vectors())  # type: ignore[arg-type]
    loss, grads = jax.value_and_grad(lambda p: objective(p, batch)[0])(params)
    assert float(loss) == pytest.approx(exact(kind, params, batch), rel=1e-6)
    for name, found in grads.items():
        wide = {k: x.astype(np.float64) for k, x in params.items()}
        for place in np.ndindex(*found.shape):
            ends = []
            for h in (1e-6, -1e-6):
                moved = wide[name].copy()
                moved[place] += h
                ends.append(exact(kind, wide | {name: moved}, batch))
            assert found[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=2e-6)


def test_mutants_are_told_apart() -> None:
    batch, params = made(), vectors()
    right = exact("softmax", params, batch)
    swapped = {"text": params["text"][::-1], "item": params["item"]}
    for wrong in (
        exact("softmax", params, batch, corrected=False),
        exact("softmax", params, batch, copies=True),
        exact("softmax", swapped, batch),
        exact("bpr", params, batch),
    ):
        assert abs(wrong / right - 1) > 0.001, wrong
    del batch["log_q"]
    loss = Ranking("softmax", TAU).objective(Vectors())(params, batch)[0]  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(exact("softmax", params, batch, corrected=False), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["softmax", "bpr"])
def test_low_vectors_are_normed_in_float32(kind: str, dtype: Any) -> None:
    batch = made()
    params = {name: 1000 * x for name, x in vectors().items()}  # squares are inf in float16
    stored = {name: jnp.asarray(x).astype(dtype) for name, x in params.items()}
    assert dtype == jnp.bfloat16 or not np.isfinite(jnp.square(stored["text"])).all()
    objective = Ranking(kind, TAU).objective(Vectors("fp16", dtype))  # type: ignore[arg-type]
    loss, grads = jax.value_and_grad(lambda p: objective(p, batch)[0])(params)
    wide = {name: np.asarray(x, np.float64) for name, x in stored.items()}
    assert float(loss) == pytest.approx(exact(kind, wide, batch), rel=1e-6)
    assert all(np.isfinite(g).all() and np.any(g) for g in grads.values())


GENRES = ("war", "love", "space", "crime")
ITEMS = [f"{GENRES[i % 4]} film{i}" for i in range(24)]


def taste(seed: int, rows: int) -> tuple[list[str], np.ndarray]:
    """Histories of one genre each, and an item of the same genre that is not in it."""
    draw = np.random.default_rng(seed)
    picks = [draw.permutation(6)[:3] * 4 + genre for genre in draw.integers(0, 4, rows)]
    return [f"{ITEMS[a]} ; {ITEMS[b]}" for a, b, _ in picks], np.array([c for *_, c in picks])


@pytest.fixture(scope="module")
def ranked(fast_compile) -> Any:
    """(task, pieces, items, training examples, change of batches)."""
    task, pieces = Ranking("softmax", 0.2, output="class"), train_wordpiece(ITEMS * 3, 120)
    items = task.items(pieces, ITEMS, longest=8)
    texts, targets = taste(0, 96)
    examples = task.examples(pieces, texts, targets, longest=16)
    counts = np.bincount(targets, minlength=len(ITEMS))
    return task, pieces, items, examples, candidates(items, counts, 2, length=8)


@pytest.mark.parametrize("kind", ["softmax", "bpr"])
def test_it_learns_to_rank(ranked: Any, kind: str) -> None:
    _, pieces, items, examples, change = ranked
    task, model = Ranking(kind, 0.2, output="class"), Bag(pieces.vocab_size, {"class": 8})
    state, step = build(model, optax.adam(0.03), objective=task.objective)  # type: ignore[arg-type]
    texts, targets = taste(1, 40)
    held_out = task.examples(pieces, texts, targets, longest=16)
    predict = task.predictor(model, batch=16, lengths=(8, 16))  # type: ignore[arg-type]

    def judged(params: Any) -> dict[str, float]:
        scores = task.scores(predict(params, held_out), predict(params, items))
        return task.evaluate(scores, targets)

    before = judged(state.params)
    data = bucket_batches(examples, batch=16, seed=0, lengths=(16,), change=change)
    for batch in itertools.islice(data, 60):
        state, _ = step(state, batch)
    after = judged(state.params)
    # Six of 24 items are of the right genre.
    assert after["hr@10"] > 0.95 > before["hr@10"] and after["loss"] < before["loss"]
    popularity = np.tile(np.bincount([e["target"] for e in examples], minlength=24), (40, 1))
    assert after["ndcg@10"] > 0.1 + ranking_scores(popularity, targets)["ndcg@10"]


def test_microbatches_of_pairs_are_the_whole_batch(ranked: Any) -> None:
    _, pieces, _, examples, change = ranked
    batch = next(bucket_batches(examples, batch=16, seed=0, lengths=(16,), change=change))
    model = Bag(pieces.vocab_size, {"class": 8})
    after = {}
    for kind, n in itertools.product(("bpr", "softmax"), (1, 2)):
        task = Ranking(kind, 0.2, output="class")
        state, step = build(model, optax.sgd(1.0), objective=task.objective, accumulate=n)  # type: ignore[arg-type]
        after[kind, n] = step(state, batch)[0].params
    gap = {
        kind: max(
            float(np.abs(a - b).max())
            for a, b in zip(*(jax.tree.leaves(after[kind, n]) for n in (1, 2)), strict=True)
        )
        for kind in ("bpr", "softmax")
    }
    assert gap["bpr"] < 1e-6 < 1e-4 < gap["softmax"], "a pool is the microbatch's"


def test_an_encoder_trains_on_a_mesh(ranked: Any) -> None:
    _, pieces, _, examples, change = ranked
    model = encoder(
        "bert-tiny", "fp16", layers=1, width=16, heads=2, pool="mean",
        vocabulary=-(-pieces.vocab_size // 8) * 8, context=16,
    )  # fmt: skip
    state, step = build(
        model, optax.adam(1e-2), "data=2,fsdp=2,tensor=2", objective=Ranking().objective
    )
    losses = []
    data = bucket_batches(examples, batch=16, seed=0, lengths=(16,), change=change)
    for batch in itertools.islice(data, 20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert step.compiled._cache_size() == 1


def test_mistakes_are_one_line() -> None:
    pieces = train_wordpiece(ITEMS, 120)
    masked = encoder("bert-tiny", layers=1, width=16, heads=2, head="masked")
    single = encoder("bert-tiny", layers=1, width=16, heads=2, types=0)
    task = Ranking()
    for call, message in (
        (lambda: Ranking("triplet"), "unknown kind 'triplet'; known: softmax bpr"),
        (lambda: Ranking(temperature=0.0), "temperature=0.0 is not a positive number"),
        (lambda: Ranking(temperature=float("nan")), "temperature=nan is not a positive number"),
        (lambda: Ranking().objective(masked), "head 'masked' pools nothing; make it with head="),
        (lambda: Ranking().objective(single), "does not tell a text from an item; make it with"),
        (lambda: task.examples(pieces, ["a"], [0, 1], longest=8), "shape .2,. for 1 texts"),
        (lambda: task.examples(pieces, ["a"], [0.5], longest=8), "float64 of shape .1,. for 1"),
        (lambda: task.examples(pieces, ["a"], [-1], longest=8), "give the number of an item"),
        (lambda: task.objective(Vectors())({}, {"ids": 1}), "no 'items'; add it"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
