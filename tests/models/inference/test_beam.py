"""Beam search against every continuation there is."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import beam_search, generate
from mpjax.models.inference.beam import search
from tests.models.shapes import IDS, logits, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")
V, N = 4, 4
# log p(next | previous two) of a chain with memory, for two prompts
CHAIN = np.log(np.random.default_rng(10).dirichlet(np.full(V, 0.4), size=(2, V, V))).astype(
    np.float32
)


def _chain(penalty: float, end: int | None, beams: int) -> Any:
    """Search of the chain; the state is (prompt's number, token before the last)."""

    def step(token_R1: Any, state: Any) -> Any:
        prompt, before = state["which"], state["before"]
        token = token_R1[:, 0]
        return jnp.asarray(CHAIN)[prompt, before, token], {"which": prompt, "before": token}

    state = {"which": jnp.arange(2), "before": jnp.zeros(2, jnp.int32)}
    return jax.jit(
        lambda: search(
            step, jnp.asarray(CHAIN)[:, 0, 0], state, beams=beams, new=N, end=end, penalty=penalty
        )
    )()


def _all(prompt: int, penalty: float, end: int | None) -> list[tuple[float, tuple[int, ...]]]:
    """Score and tokens of each continuation, best first."""
    found = {}
    for tokens in itertools.product(range(V), repeat=N):
        n = tokens.index(end) + 1 if end in tokens else N
        shown = tokens[:n] + (0 if end is None else end,) * (N - n)
        before, last, logp = 0, 0, 0.0
        for token in tokens[:n]:
            logp += float(CHAIN[prompt, before, last, token])
            before, last = last, token
        found[shown] = logp / n**penalty
    return sorted(((score, tokens) for tokens, score in found.items()), reverse=True)


@pytest.mark.parametrize(("penalty", "end"), [(0.0, None), (0.0, 1), (1.0, 1), (2.5, 1)])
def test_wide_beams_find_the_best_of_all(penalty: float, end: int | None) -> None:
    beams = 3 * V**2  # wide enough that nothing that matters is dropped
    found = _chain(penalty, end, beams)
    for prompt in range(2):
        best = _all(prompt, penalty, end)[:5]
        assert np.allclose(found.scores[prompt, :5], [score for score, _ in best], rtol=1e-5)
        assert [tuple(t) for t in found.tokens[prompt, :5].tolist()] == [t for _, t in best]


def test_the_length_penalty_decides_and_narrow_beams_lose() -> None:
    best = [[_all(b, penalty, 1)[0][1] for b in range(2)] for penalty in (0.0, 2.5)]
    assert best[0] != best[1], "or the test of the penalty compares nothing"
    one, wide = _chain(0.0, None, 1), _chain(0.0, None, 16)
    assert (one.scores[:, 0] <= wide.scores[:, 0] + 1e-6).all()
    assert (one.scores[:, 0] < wide.scores[:, 0] - 0.01).any(), "the chain tempts a greedy search"


def test_beams_that_do_not_exist_are_minus_infinity() -> None:
    found = _chain(0.0, None, 2 * V**N)
    assert np.isfinite(found.scores).sum(1).tolist() == [V**N] * 2
    assert np.isneginf(np.asarray(found.scores)[:, V**N :]).all()


def test_one_beam_is_greedy_and_more_are_at_least_as_likely() -> None:
    model = small()
    params = stirred(model)
    greedy = generate(model, params, IDS, new=5, temperature=0.0)
    one = beam_search(model, params, IDS, new=5, beams=1)
    assert np.array_equal(one.tokens[:, 0], greedy)
    four = beam_search(model, params, IDS, new=5, beams=4)
    assert (four.scores[:, 0] >= one.scores[:, 0] - 1e-5).all()
    whole = np.concatenate([IDS, four.tokens[:, 0]], axis=1)  # the score is the model's own
    z = logits(model, params, whole)[:, IDS.shape[1] - 1 : -1].astype(np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    own = np.take_along_axis(logp, np.asarray(four.tokens[:, 0])[..., None], axis=-1).mean((1, 2))
    assert np.allclose(own, four.scores[:, 0], atol=1e-4)


def test_wrong_settings_are_one_line() -> None:
    model = small()
    params = stirred(model)
    with pytest.raises(ConfigError, match="beams: 0 must be at least 1"):
        beam_search(model, params, IDS, new=2, beams=0)
    with pytest.raises(ConfigError, match="length_penalty: -1"):
        beam_search(model, params, IDS, new=2, length_penalty=-1.0)
