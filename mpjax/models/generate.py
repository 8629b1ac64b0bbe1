"""Sampling from a decoder with its key/value cache.

Shapes: B batch, T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mpjax.errors import ConfigError
from mpjax.models.decoder import Model


def _pick(logits_BV: Any, key: Any, temperature: float, top_k: int) -> Any:
    logits_BV = logits_BV.astype(jnp.float32)  # a draw in bfloat16 would merge near-equal tokens
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "new", "temperature", "top_k"))
def _generate(
    model: Model, params: Any, prompt_BT: Any, key: Any, state: Any, new: int, temperature: float,
    top_k: int,
) -> Any:  # fmt: skip
    B, T = prompt_BT.shape
    state = (state or {}) | model.init_cache(B, T + new)
    logits, state = model.apply(params, prompt_BT, state=state)

    def body(carry: Any, key: Any) -> tuple[Any, Any]:
        last_BV, state = carry
        token_B = _pick(last_BV, key, temperature, top_k)
        logits, state = model.apply(params, token_B[:, None], state=state)
        return (logits[:, -1], state), token_B

    _, tokens_NB = jax.lax.scan(body, (logits[:, -1], state), jax.random.split(key, new))
    return tokens_NB.T


def generate(
    model: Model,
    params: Any,
    prompt: Int[Array, "B T"],
    *,
    new: int,
    key: Any = None,
    temperature: float = 1.0,
    top_k: int = 0,
    state: Any = None,
) -> Int[Array, "B N"]:
    """Continues prompts of equal length.

    Args:
      model: a decoder.
      params: its weights.
      prompt: token ids, at least one a row.
      new: N, tokens to add.
      key: of the draws; may be left out when temperature is 0.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draws among the k likeliest tokens; 0 among all.
      state: amax histories of a training with delayed scaling; without them the current tensors
        decide.

    Returns:
      The new token ids.

    Raises:
      ConfigError: an empty prompt, a setting out of range, or more tokens than the model's context.

    Example:
      >>> from mpjax.models import decoder
      >>> model = decoder("tiny", layers=1, width=16, heads=2)
      >>> params = model.init(jax.random.key(0))
      >>> generate(model, params, jnp.zeros((1, 2), jnp.int32), new=3, temperature=0.0).shape
      (1, 3)
    """
    if prompt.shape[1] < 1:
        raise ConfigError("prompt: empty; give at least one token")
    if new < 1 or temperature < 0 or not 0 <= top_k <= model.config.vocabulary:
        raise ConfigError(
            f"generate: new={new} must be positive, temperature={temperature} not negative and"
            f" top_k={top_k} in 0..{model.config.vocabulary}"
        )
    if key is None:
        if temperature:
            raise ConfigError("generate: sampling needs a key; pass key= or temperature=0")
        key = jax.random.key(0)
    state = model.init_state() if state is None else state
    return _generate(model, params, prompt, key, state, new, temperature, top_k)
