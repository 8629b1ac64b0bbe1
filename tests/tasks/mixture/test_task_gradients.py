"""Gradients of several tasks against NumPy: projections, balanced norms, shares and cosines."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.tasks import GradNorm, gradient_shares, pcgrad
from mpjax.tasks.mixture.task_gradients import Combination, products

pytestmark = pytest.mark.usefixtures("fast_compile")

NAMES = ("a", "b", "c", "d")
HEADS = {name: (3,) for name in NAMES}


def gradients(seed: int = 0, present: str = "abcd") -> list[dict[str, Any]]:
    """Of a trunk that all reach, a pooler that two reach, and a head each; some are opposed."""
    rng = np.random.default_rng(seed)
    found = []
    for name in NAMES:
        shapes = {"trunk": (4, 5), "bias": (6,), "pooler": (7,)} | HEADS
        grads = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
        reached = {"trunk", "bias", name} | ({"pooler"} if name in "ab" else set())
        here = name in present
        found.append({n: g if n in reached and here else 0 * g for n, g in grads.items()})
    return found


SHARED = ("trunk", "bias", "pooler")


def flat(grads: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(grads[name]).astype(np.float64) for name in SHARED])


def orders(key: Any, count: int) -> list[list[int]]:
    """The order in which each gradient meets the others."""
    keys = jax.random.split(key, count)
    return [np.asarray(jax.random.permutation(one, count)).tolist() for one in keys]


def surgery(grads: list[np.ndarray], turns: list[list[int]], clipped: bool = True) -> np.ndarray:
    """Algorithm 1 of Yu et al. 2020, in float64."""
    total = np.zeros_like(grads[0])
    for i, own in enumerate(grads):
        g = own.copy()
        for j in turns[i]:
            product = g @ grads[j]
            if j != i and (product < 0 or not clipped):
                g = g - product / (grads[j] @ grads[j]) * grads[j]
        total += g
    return total


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_the_papers_algorithm(seed: int) -> None:
    grads, key = gradients(seed), jax.random.key(seed)
    wide = [flat(g) for g in grads]
    assert any(a @ b < 0 for a, b in itertools.combinations(wide, 2)), "or there is no conflict"
    combine = jax.jit(Combination(NAMES, pcgrad=True))
    found, state, _ = combine(grads, jnp.ones(4), key, None)
    assert state is None
    want = surgery(wide, orders(key, 4))
    np.testing.assert_allclose(flat(found), want, rtol=2e-5, atol=2e-5)
    for mutant in (sum(wide), surgery(wide, orders(key, 4), clipped=False)):
        assert np.abs(mutant - want).max() > 1e-2
    for name, own in zip(NAMES, grads, strict=True):  # heads have the gradient of their task
        np.testing.assert_array_equal(found[name], own[name])


def test_orders_are_random_and_matter() -> None:
    gram = jnp.asarray(products(gradients(1)).gram)
    found = {tuple(np.asarray(pcgrad(gram, jax.random.key(i))).round(4)) for i in range(6)}
    assert len(found) > 1
    agreed = jnp.array([[1.0, 0.5], [0.5, 2.0]])
    assert pcgrad(agreed, jax.random.key(0)).tolist() == [1.0, 1.0]


def balance(
    w: np.ndarray, first: np.ndarray, losses: np.ndarray, norms: np.ndarray, own: GradNorm
) -> np.ndarray:
    """Equation 2 and algorithm 1 of Chen et al. 2018, in float64, by a difference quotient."""
    mean = np.mean(w * norms)
    progress = losses / first
    target = mean * (progress / progress.mean()) ** own.alpha  # held constant

    def cost(w: np.ndarray) -> float:
        return float(np.abs(w * norms - target).sum())

    each = np.eye(len(w)) * 1e-6
    slope = np.array([(cost(w + e) - cost(w - e)) / 2e-6 for e in each])
    moved = w - own.rate * slope / mean
    return moved * len(w) / moved.sum()


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_is_the_papers_update(alpha: float) -> None:
    own = GradNorm(alpha=alpha, rate=0.05)
    combine = jax.jit(Combination(NAMES, gradnorm=own))
    state: Any = own.init(4)
    w, first = np.ones(4), np.zeros(4)
    rng = np.random.default_rng(5)
    for step in range(6):
        grads = gradients(step)
        grads = [
            jax.tree.map(lambda g, f=f: f * g, g)
            for f, g in zip((1, 3, 9, 0.5), grads, strict=True)
        ]
        losses = rng.uniform(0.2, 2, 4)
        norms = np.array([np.linalg.norm(flat(g)) for g in grads])
        first = losses if step == 0 else first
        found, state, told = combine(
            grads, jnp.asarray(losses, jnp.float32), jax.random.key(0), state
        )
        weighted = sum(a * flat(g) for a, g in zip(w, grads, strict=True))
        np.testing.assert_allclose(flat(found), weighted, rtol=1e-4, atol=1e-4)
        assert [float(told[f"weight/{n}"]) for n in NAMES] == pytest.approx(w.tolist(), rel=1e-5)
        w = balance(w, first, losses, norms, own)
        np.testing.assert_allclose(state.weights, w, rtol=2e-5)
        np.testing.assert_allclose(state.first, first, rtol=1e-6)
    assert float(jnp.sum(state.weights)) == pytest.approx(4, rel=1e-6)
    assert w[2] < 1 < w[3], "the strong one is weakened and the weak one raised"


def test_a_task_that_is_not_in_a_batch_keeps_its_weight() -> None:
    own = GradNorm(rate=0.2)
    combine = jax.jit(Combination(NAMES, gradnorm=own))
    state: Any = own.init(4)
    losses = jnp.array([1.0, 2.0, 0.0, 3.0])
    _, state, _ = combine(gradients(0, "abd"), losses, jax.random.key(0), state)
    assert state.weights[2] == 1 and state.first.tolist() == [1, 2, 0, 3]
    assert float(jnp.sum(state.weights)) == pytest.approx(4) and state.weights[0] != 1
    _, after, _ = combine(gradients(1), jnp.full(4, 5.0), jax.random.key(0), state)
    assert after.first.tolist() == [1, 2, 5, 3]
    # of one task alone nothing is shared and nothing moves
    _, alone, _ = combine(gradients(2, "b"), losses, jax.random.key(0), state)
    assert alone.weights.tolist() == state.weights.tolist()


def test_a_gradient_that_is_not_finite_stays_so() -> None:
    grads = gradients(0)
    grads[1]["trunk"][0, 0] = np.inf
    for one in (Combination(NAMES, pcgrad=True), Combination(NAMES, GradNorm())):
        found, _, _ = jax.jit(one)(grads, jnp.ones(4), jax.random.key(0), one.init())
        assert not np.isfinite(found["trunk"]).all()


def test_shares_and_cosines_are_those_of_the_gradients() -> None:
    grads = gradients(3)

    def losses(params: Any, batch: Any) -> dict[str, Any]:
        return {
            name: sum(jnp.vdot(g[n], params[n]) for n in g) * batch
            for name, g in zip(NAMES, grads, strict=True)
        }

    params = jax.tree.map(jnp.ones_like, grads[0])
    found = gradient_shares(losses)(params, jnp.float32(2.0))
    wide = {name: 2 * flat(g) for name, g in zip(NAMES, grads, strict=True)}
    total = sum(np.linalg.norm(g) for g in wide.values())
    for name, g in wide.items():
        assert found[name] == pytest.approx(np.linalg.norm(g) / total, rel=1e-5)
    for a, b in itertools.combinations(NAMES, 2):
        want = wide[a] @ wide[b] / (np.linalg.norm(wide[a]) * np.linalg.norm(wide[b]))
        assert found[f"cosine {a} {b}"] == pytest.approx(want, abs=1e-5)
    assert len(found) == 4 + 6


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"rate": 0}, {"least": 0.0}, {"rate": float("inf")}, {"alpha": "x"}]
)
def test_settings_out_of_range_are_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"gradnorm: {next(iter(settings))}="):
        GradNorm(**settings)
