"""Continuing prompts with a model's key/value cache.

Shapes: B batch, T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mpjax.errors import explains_calls
from mpjax.models.inference.beam import Beams, check_beams, is_end, search
from mpjax.models.inference.prompt import Continuable, Start, check_prompt, prefill
from mpjax.models.inference.sampling import Sampling
from mpjax.models.inference.settings import CacheStorage, Count, Ends, KeyLike, Lengths, Number
from mpjax.typing import Key, ModelState, Params

Ids: TypeAlias = Int[Array, "B T"] | Int[np.ndarray, "B T"]
# Tokens so far, the last ones, which rows have ended, the model's state, all tokens.
Carry: TypeAlias = tuple[Array, Array, Array, ModelState, Array]


class _Checked(NamedTuple):
    """The arguments of `generate` and `stream`, checked: arrays, and static settings."""

    prompt_BT: Array
    key: Key
    state: ModelState
    start: Start
    sampling: Sampling
    lengths_B: Array | None


def _checked(
    model: Continuable, params: Params, prompt: Ids, new: Count, key: KeyLike,
    temperature: Number, top_k: Count | None, top_p: Number | None, lengths: Lengths,
    cache: CacheStorage, end: Ends = None, state: ModelState = None,
) -> _Checked:  # fmt: skip
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check(model.config.vocabulary)
    checked = check_prompt(model, params, prompt, lengths, new, cache, end, state)
    start, prompt_BT, lengths_B, state = checked
    return _Checked(prompt_BT, sampling.need(key), state, start, sampling, lengths_B)


@functools.partial(jax.jit, static_argnames=("model", "start", "sampling"))
def _generate(
    model: Continuable, params: Params, prompt_BT: Array, key: Key, state: ModelState,
    start: Start, sampling: Sampling, lengths_B: Array | None,
) -> Array:  # fmt: skip
    last_BV, state = prefill(model, params, prompt_BT, lengths_B, start, state)
    keys, ends = jax.random.split(key, start.new), start.ends
    token_B = sampling.pick(last_BV, keys[0])
    out_BN = jnp.zeros((prompt_BT.shape[0], start.new), jnp.int32).at[:, 0].set(token_B)

    def goes_on(carry: Carry) -> Array:
        n, _, done_B, _, _ = carry
        return (n < start.new) & ~jnp.all(done_B)

    def body(carry: Carry) -> Carry:
        n, token_B, done_B, state, out_BN = carry
        logits, state = model.apply(params, token_B[:, None], state=state)
        picked_B = sampling.pick(logits[:, -1], keys[n])
        token_B = jnp.where(done_B, token_B, picked_B) if ends else picked_B
        done_B = done_B | is_end(token_B, ends)
        return n + 1, token_B, done_B, state, out_BN.at[:, n].set(token_B)

    carry = (jnp.int32(1), token_B, is_end(token_B, ends), state, out_BN)
    n, token_B, _, _, out_BN = jax.lax.while_loop(goes_on, body, carry)
    return jnp.where(jnp.arange(start.new)[None] < n, out_BN, token_B[:, None])


@explains_calls
def generate(
    model: Continuable, params: Params, prompt: Ids, *, new: Count, key: KeyLike = None,
    temperature: Number = 1.0, top_k: Count | None = 0, top_p: Number | None = 1.0,
    end: Ends = None, lengths: Lengths = None, cache: CacheStorage = "", state: ModelState = None,
) -> Int[Array, "B N"]:  # fmt: skip
    """Continues prompts.

    Args:
      model: a decoder, or another language model with `init_cache` and `apply`.
      params: its weights.
      prompt: token ids, at least one a row; see `left_pad` for rows of different lengths.
      new: N, tokens to add.
      key: of the draws; may be left out when temperature is 0.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draws among the k likeliest tokens; 0 or None among all.
      top_p: draws among the fewest likeliest tokens of probability p; 1 or None among all.
      end: token that ends a row, or several, such as `model.metadata.ends`; it fills the rest.
      lengths: how many tokens at the end of each row are its prompt; by default all.
      cache: storage of keys and values, such as `int8`; by default the compute dtype.
      state: amax histories of delayed scaling; without them scales are of current tensors.

    Returns:
      The new token ids.

    Raises:
      ConfigError: an empty prompt, a setting out of range, more tokens than the model's context, or
        another model's params.

    Example:
      >>> from mpjax.models import decoder
      >>> model = decoder("tiny", layers=1, width=16, heads=2)
      >>> params = model.init(jax.random.key(0))
      >>> generate(model, params, jnp.zeros((1, 2), jnp.int32), new=3, temperature=0.0).shape
      (1, 3)
    """
    checked = _checked(
        model, params, prompt, new, key, temperature, top_k, top_p, lengths, cache, end, state
    )
    return _generate(model, params, *checked)


@functools.partial(jax.jit, static_argnames=("model", "start", "sampling"))
def _first(
    model: Continuable, params: Params, prompt_BT: Array, key: Key, state: ModelState,
    start: Start, sampling: Sampling, lengths_B: Array | None,
) -> tuple[Array, ModelState]:  # fmt: skip
    last_BV, state = prefill(model, params, prompt_BT, lengths_B, start, state)
    return sampling.pick(last_BV, key), state


@functools.partial(
    jax.jit, static_argnames=("model", "sampling"), donate_argnames=("token_B", "state")
)
def _next(
    model: Continuable, params: Params, token_B: Array, key: Key, state: ModelState,
    sampling: Sampling,
) -> tuple[Array, ModelState]:  # fmt: skip
    logits, state = model.apply(params, token_B[:, None], state=state)
    return sampling.pick(logits[:, -1], key), state


@explains_calls
def stream(
    model: Continuable, params: Params, prompt: Ids, *, new: Count, key: KeyLike = None,
    temperature: Number = 1.0, top_k: Count | None = 0, top_p: Number | None = 1.0,
    lengths: Lengths = None, cache: CacheStorage = "",
) -> Iterator[Int[Array, " B"]]:  # fmt: skip
    """Yields the tokens that `generate` returns, one for each row at a time.

    Args:
      model: a decoder, or another language model; this and all others as in `generate`.
      params: its weights.
      prompt: token ids.
      new: tokens to add; leave the loop earlier at an end token.
      key: of the draws.
      temperature: divides the logits.
      top_k: draws among the k likeliest.
      top_p: draws among the fewest likeliest of probability p.
      lengths: of the prompts.
      cache: storage of keys and values.

    Example:
      >>> from mpjax.models import decoder
      >>> model = decoder("tiny", layers=1, width=16, heads=2)
      >>> params, prompt = model.init(jax.random.key(0)), jnp.zeros((1, 2), jnp.int32)
      >>> tokens = stream(model, params, prompt, new=3, temperature=0.0)
      >>> [int(t[0]) for t in tokens] == generate(
      ...     model, params, prompt, new=3, temperature=0.0)[0].tolist()
      True
    """
    checked = _checked(model, params, prompt, new, key, temperature, top_k, top_p, lengths, cache)
    keys = jax.random.split(checked.key, checked.start.new)
    token_B, state = _first(model, params, *checked._replace(key=keys[0]))
    # The next token is computed while the caller shows this one.
    for n in range(1, len(keys)):
        shown = jnp.copy(token_B)  # the buffer of token_B is donated
        token_B, state = _next(model, params, token_B, keys[n], state, checked.sampling)
        yield shown
    yield token_B


@functools.partial(jax.jit, static_argnames=("model", "start", "beams", "penalty"))
def _beam_search(
    model: Continuable, params: Params, prompt_BT: Array, start: Start, beams: int,
    penalty: float, lengths_B: Array | None, state: ModelState,
) -> Beams:  # fmt: skip
    last_BV, state = prefill(model, params, prompt_BT, lengths_B, start, state)

    def step(token_R1: Array, state: ModelState) -> tuple[Array, ModelState]:
        logits, state = model.apply(params, token_R1, state=state)
        return logits[:, -1], state

    return search(step, last_BV, state, beams=beams, new=start.new, end=start.ends, penalty=penalty)


@explains_calls
def beam_search(
    model: Continuable, params: Params, prompt: Ids, *, new: Count, beams: Count = 4,
    length_penalty: Number = 1.0, end: Ends = None, lengths: Lengths = None,
    cache: CacheStorage = "", state: ModelState = None,
) -> Beams:  # fmt: skip
    r"""Returns the best continuations that beam search finds, best first.

    A continuation $y$ of n tokens, its end among them, has score $\log p(y) / n^\alpha$.

    Args:
      model: a decoder, or another language model with `init_cache` and `apply`.
      params: its weights.
      prompt: token ids, at least one a row; see `left_pad` for rows of different lengths.
      new: N, tokens to add at most.
      beams: K of each prompt; 1 is greedy, or returns a likelier one that ended earlier.
      length_penalty: $\alpha$, 0 or above; larger ones favour longer continuations.
      end: token that ends a continuation, or several; what follows it is filled with it.
      lengths: how many tokens at the end of each row are its prompt; by default all.
      cache: storage of keys and values, such as `int8`; by default the compute dtype.
      state: amax histories, as in `generate`.

    Returns:
      Tokens (B, K, N) and their scores (B, K), -inf for beams beyond all continuations there are.

    Raises:
      ConfigError: an empty prompt, a setting out of range, more tokens than the model's context, or
        another model's params.

    Example:
      >>> from mpjax.models import decoder
      >>> model = decoder("tiny", layers=1, width=16, heads=2)
      >>> params = model.init(jax.random.key(0))
      >>> found = beam_search(model, params, jnp.zeros((1, 2), jnp.int32), new=3, beams=2)
      >>> found.tokens.shape, found.scores.shape
      ((1, 2, 3), (1, 2))

    References:
      Wu et al. 2016, Google's Neural Machine Translation System, section 7 (length normalisation).
    """
    width, penalty = check_beams(beams, length_penalty)
    checked = check_prompt(model, params, prompt, lengths, new, cache, end, state)
    start, prompt_BT, lengths_B, state = checked
    return _beam_search(model, params, prompt_BT, start, width, penalty, lengths_B, state)
