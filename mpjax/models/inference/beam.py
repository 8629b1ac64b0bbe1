"""Beam search: the likeliest continuations among those that K beams reach.

Shapes: B prompts, K beams, N new tokens, V vocabulary; R = B K rows of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpjax.errors import ConfigError
from mpjax.models.inference.settings import Count, Ends, Number, as_count, as_ends, as_number
from mpjax.models.transformer.kv_cache import take_rows
from mpjax.typing import ModelState

# (tokens (R, 1), state) -> (logits (R, V), state)
Step: TypeAlias = Callable[[Array, ModelState], tuple[Array, ModelState]]
_NEVER = -1e30  # log-probability of an excluded beam; finite, so that 0 times it is 0


class Beams(NamedTuple):
    """The continuations that beam search found, best first.

    Args:
      tokens: (B, K, N); after its end a row holds the end token.
      scores: (B, K) log-probability over length to the power of the length penalty.
    """

    tokens: Int[Array, "B K N"]
    scores: Float[Array, "B K"]


class _Search(NamedTuple):
    """K live and K ended rows of each prompt.

    Args:
      last: (B K, V) logits after the live rows.
      state: of the model, B K rows.
      live: (B, K) log-probabilities, and (B, K, N) tokens.
      ended: (B, K) scores, and (B, K, N) tokens.
      length: tokens of the live rows.
    """

    last: Array
    state: ModelState
    live: tuple[Array, Array]
    ended: tuple[Array, Array]
    length: Array


def _top(values_BM: Array, tokens_BMN: Array, count: int) -> tuple[Array, Array, Array]:
    best_BK, which_BK = jax.lax.top_k(values_BM, count)
    return best_BK, jnp.take_along_axis(tokens_BMN, which_BK[..., None], axis=1), which_BK


def search(
    step: Step, last_BV: Array, state: ModelState, *, beams: int, new: int, end: Ends,
    penalty: float,
) -> Beams:  # fmt: skip
    """Searches with any function that decodes; `beam_search` does with a model.

    Args:
      step: (tokens (R, 1), state) -> (logits (R, V), state).
      last_BV: logits after the prompts.
      state: after the prompts; see `kv_cache.take_rows`.
      beams: their number K.
      new: number N of new tokens.
      end: the token that ends a continuation, several, or None.
      penalty: exponent of the length.
    """
    B, V = last_BV.shape
    K, N, stops = beams, new, as_ends(end, V)
    blank = jnp.full((B, K, N), stops[0] if stops else 0, jnp.int32)
    # The K rows of a prompt are equal at the start, so only the first one counts.
    start = jnp.where(jnp.arange(K) == 0, jnp.float32(0), jnp.float32(_NEVER))
    live = (jnp.broadcast_to(start[None], (B, K)), blank)
    spread = jnp.repeat(jnp.arange(B), K)
    begin = _Search(
        jnp.take(last_BV, spread, axis=0), take_rows(state, spread), live,
        (jnp.full((B, K), _NEVER), blank), jnp.int32(0),
    )  # fmt: skip

    def score(logp: Array, length: Array) -> Array:
        return logp / length.astype(jnp.float32) ** penalty

    def goes_on(s: _Search) -> Array:
        more = s.length < N
        if not stops:
            return more
        # A sum of log-probabilities only decreases: this bounds the scores of all longer rows.
        reach = score(s.live[0][:, 0], jnp.int32(N))
        return more & jnp.any(reach > s.ended[0][:, -1])

    def body(s: _Search) -> _Search:
        logp_RV = jax.nn.log_softmax(s.last.astype(jnp.float32), axis=-1)
        total_BKV = s.live[0][..., None] + logp_RV.reshape(B, K, V)
        # 2 K: up to K of them end here, and K rows must go on.
        total, which = jax.lax.top_k(total_BKV.reshape(B, K * V), min(2 * K, K * V))
        parent, token = which // V, (which % V).astype(jnp.int32)
        tokens = jnp.take_along_axis(s.live[1], parent[..., None], axis=1)
        tokens = tokens.at[:, :, s.length].set(token)
        length = s.length + 1
        ends, ended = is_end(token, stops), s.ended
        if stops:
            worth = jnp.where(ends, score(total, length), _NEVER)
            whole = jnp.where(jnp.arange(N) > s.length, token[..., None], tokens)
            both = jnp.concatenate([ended[0], worth], 1), jnp.concatenate([ended[1], whole], 1)
            ended = _top(*both, K)[:2]
        best, finished, at = _top(jnp.where(ends, _NEVER, total), tokens, K)
        parent = jnp.take_along_axis(parent, at, axis=1)
        rows = (jnp.arange(B)[:, None] * K + parent).reshape(-1)
        token_R1 = jnp.take_along_axis(token, at, axis=1).reshape(-1, 1)
        last, state = step(token_R1, take_rows(s.state, rows))
        return _Search(last, state, (best, finished), ended, length)

    s = jax.lax.while_loop(goes_on, body, begin)
    # A row of N tokens without an end is complete too.
    whole = jnp.where(s.length == N, score(s.live[0], s.length), _NEVER)
    both = jnp.concatenate([s.ended[0], whole], 1), jnp.concatenate([s.ended[1], s.live[1]], 1)
    scores, tokens, _ = _top(*both, K)
    return Beams(tokens, jnp.where(scores < _NEVER / N**penalty / 2, -jnp.inf, scores))


def is_end(token: Array, ends: tuple[int, ...]) -> Array:
    """Returns where tokens are one of the ends."""
    found = jnp.zeros_like(token, bool)
    for end in ends:
        found = found | (token == end)
    return found


def check_beams(beams: Count, penalty: Number) -> tuple[int, float]:
    """Returns the settings of a search, checked.

    Raises:
      ConfigError: no beam, or a penalty below 0 or not finite.
    """
    width, penalty = as_count(beams, "beams"), as_number(penalty, "length_penalty")
    if width < 1:
        raise ConfigError(f"beams: {width} must be at least 1; 1 keeps the likeliest alone")
    if not 0 <= penalty < math.inf:
        raise ConfigError(
            f"length_penalty: {penalty} must be 0 or above; 0 compares sums of log-probabilities"
        )
    return width, penalty
