"""Each method against a float64 account of it, with the variants that it must not be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from mpjax.models.core.module import part_key
from mpjax.tasks import Adversarial, TextClassification
from mpjax.tasks.adversarial import FGM, PGD, SMART, VAT, FreeLB, Method, RDrop
from tests.tasks.adversarial.mean import (
    C,
    D,
    Exact,
    batch_of,
    climbed,
    dropped,
    kl,
    mean_encoder,
    size,
)

pytestmark = pytest.mark.usefixtures("fast_compile")
TASK = TextClassification(tuple("abc"))
KEY = jax.random.key(3)
BATCH = batch_of()
MODEL = mean_encoder()
PARAMS = MODEL.init(jax.random.key(0))


def found(method: Method, model: Any = MODEL, **options: Any) -> Any:
    objective = Adversarial(TASK, method, special=(2,)).objective(model)
    assert objective.terms is not None
    return jax.jit(functools.partial(objective.terms, **options))(PARAMS, BATCH, key=KEY)


def numbers(terms: Any) -> dict[str, float]:
    return {name: float(x) for name, x in terms.losses.items()}


def start(kind: str) -> np.ndarray:
    draw, shape = part_key(KEY, "offset"), (*BATCH["ids"].shape, D)
    if kind == "normal":
        return np.asarray(jax.random.normal(draw, shape), np.float64)
    return np.asarray(jax.random.uniform(draw, shape, minval=-1.0, maxval=1.0), np.float64)


def test_fgm() -> None:
    exact = Exact(PARAMS, BATCH)
    g = exact.loss_slope(0.0)
    terms = found(FGM(0.7, weight=0.5))
    right = {"clean": exact.loss(), "adversarial": 0.5 * exact.loss(0.7 * g / size(g))}
    assert numbers(terms) == pytest.approx(right, rel=1e-5)
    assert float(terms.metrics["adversarial/norm"]) == pytest.approx(0.7, rel=1e-6)
    # normed over the batch, the examples would share the norm
    together = 0.5 * exact.loss(0.7 * g / np.sqrt((g**2).sum()))
    assert numbers(terms)["adversarial"] != pytest.approx(together, rel=1e-2)
    # the padding and the first token have none
    exact.room = np.ones_like(exact.room)
    g = exact.loss_slope(0.0)
    assert numbers(terms)["adversarial"] != pytest.approx(
        0.5 * exact.loss(0.7 * g / size(g)), rel=1e-4
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd(norm: str) -> None:
    exact = Exact(PARAMS, BATCH)
    epsilon, step = (0.8, 0.5) if norm == "l2" else (0.2, 0.15)
    terms = found(PGD(epsilon, step, 3, norm, clean=0.0))
    last = climbed(exact, 0.0, epsilon, step, 3, norm)[-1]
    assert numbers(terms) == pytest.approx({"adversarial": exact.loss(last)}, rel=1e-5)
    assert float(terms.metrics["adversarial/norm"]) == pytest.approx(size(last).mean(), rel=1e-5)
    free = climbed(exact, 0.0, 1e9, step, 3, norm)[-1]  # without the projection
    assert numbers(terms)["adversarial"] != pytest.approx(exact.loss(free), rel=1e-2)


def test_freelb() -> None:
    exact = Exact(PARAMS, BATCH)
    count = exact.room.sum((1, 2), keepdims=True) * D
    first = 0.9 * start("uniform") * exact.room / np.sqrt(count)
    walk = climbed(exact, first, 0.9, 0.4, 2)
    want = np.mean([exact.loss(offset) for offset in walk])
    assert numbers(found(FreeLB(0.9, 0.4, 3))) == pytest.approx({"adversarial": want}, rel=1e-5)
    assert want != pytest.approx(exact.loss(walk[-1]), rel=1e-2)  # the last loss alone


def test_smart() -> None:
    exact = Exact(PARAMS, BATCH)
    log_q = exact.log_p()
    offset = 0.05 * start("normal") * exact.room
    for _ in range(2):
        log_p = exact.log_p(offset)
        apart, p = kl(log_p, log_q)[:, None], np.exp(log_p)
        g = exact.pulled(p * (log_p - log_q - apart) + p - np.exp(log_q))
        g /= np.abs(g).max((1, 2), keepdims=True)
        offset = np.clip(offset + 0.1 * g, -0.15, 0.15)
    log_p = exact.log_p(offset)
    want = {"clean": exact.loss(), "smoothness": 2 * (kl(log_p, log_q) + kl(log_q, log_p)).mean()}
    method = SMART(epsilon=0.15, noise=0.05, step=0.1, steps=2, weight=2.0)
    got = numbers(found(method))
    assert got == pytest.approx(want | {"proximal": 0.0}, rel=1e-4)  # without an average
    alone = found(dataclasses.replace(method, proximal=0.0))
    assert numbers(alone) == pytest.approx(want, rel=1e-4)
    assert got["smoothness"] != pytest.approx(4 * kl(log_q, log_p).mean(), rel=1e-3)  # one side


def test_smart_stays_near_the_average_of_the_weights() -> None:
    exact = Exact(PARAMS, BATCH)
    past = {"embed": PARAMS["embed"] * 0.5, "head": PARAMS["head"] + jax.random.normal(KEY, (D, C))}
    log_q, log_p = Exact(past, BATCH).log_p(), exact.log_p()
    objective = Adversarial(TASK, SMART(proximal=1.5), special=(2,)).objective(MODEL)
    terms: Any = objective.terms
    near = lambda p, a: terms(p, BATCH, key=KEY, average=a).losses["proximal"]  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(near, (0, 1)))(PARAMS, past)
    assert float(value) == pytest.approx(1.5 * (kl(log_p, log_q) + kl(log_q, log_p)).mean())
    p, q = np.exp(log_p), np.exp(log_q)
    d = p * (log_p - log_q - kl(log_p, log_q)[:, None]) + p - q
    np.testing.assert_allclose(gradients[0]["head"], 1.5 * exact.h.T @ d / 6, atol=1e-5)
    assert np.abs(gradients[0]["head"]).max() > 1e-2
    assert not any(np.any(g) for g in jax.tree.leaves(gradients[1]))  # the average is held


def test_vat() -> None:
    exact = Exact(PARAMS, BATCH)
    log_q, d = exact.log_p(), start("normal") * exact.room
    d /= size(d)
    for _ in range(2):
        g = exact.pulled(np.exp(exact.log_p(0.1 * d)) - np.exp(log_q))
        d = g / size(g)
    want = {"clean": exact.loss(), "smoothness": kl(log_q, exact.log_p(0.6 * d)).mean()}
    method = VAT(epsilon=0.6, xi=0.1, steps=2)
    assert numbers(found(method)) == pytest.approx(want, rel=1e-4)
    # where unlabelled texts are most of a batch they are in the second term alone
    unlabelled = BATCH | {"labels": BATCH["labels"].at[1:].set(-100)}
    objective = Adversarial(TASK, method, special=(2,)).objective(MODEL)
    assert objective.terms is not None
    half = numbers(jax.jit(objective.terms)(PARAMS, unlabelled, key=KEY))
    assert half["smoothness"] == pytest.approx(want["smoothness"], rel=1e-4)
    assert half["clean"] != pytest.approx(want["clean"], rel=1e-2)


def test_r_drop() -> None:
    model = mean_encoder(dropout=0.1)
    keys = (KEY, part_key(KEY, "second"))
    masks = [np.asarray(dropped(key, (6, D)), np.float64) for key in keys]
    exact = Exact(PARAMS, BATCH)
    log_p, log_q = (exact.log_p(0.0, m) for m in masks)
    want = {
        "clean": np.mean([exact.loss(0.0, m) for m in masks]),
        "consistency": 3.0 * (kl(log_p, log_q) + kl(log_q, log_p)).mean() / 2,
    }
    got = numbers(found(RDrop(3.0), model, train=True))
    assert got == pytest.approx(want, rel=1e-5)
    assert got["consistency"] > 1e-2
    # both sides are pulled: with one held, half of the gradient would be gone
    terms: Any = Adversarial(TASK, RDrop(1.0), special=()).objective(model).terms
    apart = lambda p: terms(p, BATCH, key=KEY, train=True).losses["consistency"]  # noqa: E731
    gradient = jax.jit(jax.grad(apart))(PARAMS)["head"]
    p, q = np.exp(log_p), np.exp(log_q)
    d = {"p": p * (log_p - log_q - kl(log_p, log_q)[:, None]) + p - q,
         "q": q * (log_q - log_p - kl(log_q, log_p)[:, None]) + q - p}  # fmt: skip
    exact.log_p()
    sides = [(exact.h * m).T @ d[n] / 12 for n, m in zip("pq", masks, strict=True)]
    np.testing.assert_allclose(gradient, sides[0] + sides[1], atol=1e-5)
    assert np.abs(sides[1]).max() > 1e-2


def test_the_offset_is_no_path_for_gradients_of_weights() -> None:
    """The gradient is that at a constant offset: the worst case is not differentiated."""
    exact = Exact(PARAMS, BATCH)
    offset = climbed(exact, 0.0, 0.8, 0.5, 2)[-1]
    objective = Adversarial(TASK, PGD(0.8, 0.5, 2, clean=0.0), special=(2,)).objective(MODEL)
    got = jax.jit(jax.grad(lambda p: objective(p, BATCH)[0]))(PARAMS)
    wrong = np.exp(exact.log_p(offset)) - np.eye(C)[exact.labels]
    want = exact.h.T @ wrong / 6
    np.testing.assert_allclose(got["head"], want, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGM(0.0), "FGM: epsilon=0.0 is not a positive number"),
        (lambda: FGM(-1), "FGM: epsilon=-1 is not a positive number"),
        (lambda: PGD(step=float("nan")), "PGD: step=nan is not a positive number"),
        (lambda: PGD(step=float("inf")), "PGD: step=inf is not a positive number"),
        (lambda: SMART(decay=1.0), "SMART: decay=1 never moves; give one below 1"),
        (lambda: SMART(proximal=-1.0), "SMART: proximal=-1.0 is not 0 or a positive number"),
        (lambda: PGD(steps=0), "PGD: steps=0 is not a number of steps of 1 or above"),
        (lambda: PGD(steps=2.0), "PGD: steps=2.0 is not a number of steps"),  # type: ignore[arg-type]
        (lambda: PGD(norm="l1"), "PGD: unknown norm 'l1'; known: l2 linf"),
        (lambda: FreeLB(clean=-1.0), "FreeLB: clean=-1.0 is not 0 or a positive number"),
        (lambda: SMART(noise=True), "SMART: noise=True is not a positive number"),
        (lambda: VAT(xi=0.0), "VAT: xi=0.0 is not a positive number"),
        (lambda: RDrop("1"), "RDrop: weight='1' is not a positive number"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
