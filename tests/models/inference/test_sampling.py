"""Filters and draws against numpy, and what a wrong setting gets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("fast_compile")
LOGITS = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3


def left(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens the filters leave, one at a time in float64."""
    out = np.zeros(logits.shape, bool)
    for row, keep in zip(logits.astype(np.float64) / temperature, out, strict=True):
        order = np.argsort(-row)[: top_k or None]
        p = np.exp(row[order] - row.max())
        total = 0.0
        for token, share in zip(order, p / p.sum(), strict=True):
            keep[token] = True
            total += share
            if total >= top_p:
                break
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 5, 1.0), (1.0, 0, 0.7), (2.0, 0, 0.7), (0.5, 10, 0.9), (1.0, 0, 1e-6), (1.0, 0, 1.0)],
)
def test_filters_leave_what_numpy_leaves(temperature: float, top_k: int, top_p: float) -> None:
    z = Sampling(temperature, top_k, top_p).filtered(jnp.asarray(LOGITS))
    expected = left(LOGITS, temperature, top_k, top_p)
    assert (np.isfinite(z) == expected).all()
    assert np.array_equal(np.asarray(z)[expected], (LOGITS / np.float32(temperature))[expected])


def test_draws_follow_the_filtered_distribution() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    rows = jnp.broadcast_to(logits, (8000, 4))
    drawn = np.bincount(Sampling(top_p=0.9).pick(rows, jax.random.key(0)), minlength=4) / 8000
    assert np.abs(drawn - np.array([0.5, 0.3, 0.15, 0]) / 0.95).max() < 0.02  # 3.5 sigma
    every = np.bincount(Sampling().pick(rows, jax.random.key(0)), minlength=4) / 8000
    assert every[3] > 0.03, "without the filter the last token is drawn"


def test_greedy_takes_the_likeliest_and_no_key() -> None:
    assert np.array_equal(
        Sampling(0.0).pick(jnp.asarray(LOGITS), Sampling(0.0).need(None)), LOGITS.argmax(-1)
    )


def test_bfloat16_logits_are_drawn_in_float32() -> None:
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    assert Sampling(0.7, 5).filtered(low).dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": -1}, "top_k: -1"),
        ({"top_p": 0.0}, "top_p: 0.0 must be in"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"temperature": 0.0, "top_p": 0.9}, "would filter nothing"),
    ],
)
def test_a_wrong_setting_is_one_line(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Sampling(**settings)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="top_k: 60 is more than the 50 tokens"):
        Sampling(top_k=60).check(50)
    with pytest.raises(ConfigError, match="needs a key"):
        Sampling().need(None)
