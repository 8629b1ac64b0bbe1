"""Prompts of different lengths as one array, padded on the left, and a model behind them.

Shapes: B prompts, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mpjax.errors import ConfigError, brief
from mpjax.models.core.checks import as_counts, check_params
from mpjax.models.core.storage import Storage
from mpjax.models.inference.settings import CacheStorage, Count, as_cache, as_count


def left_pad(
    prompts: Any, length: Count = 0
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Returns prompts as one array, each ending in the last column, and their lengths.

    Args:
      prompts: token ids, at least one each.
      length: T; 0 takes the longest prompt's. A few fixed lengths spare compilations.

    Raises:
      ConfigError: no prompt, one that is empty or not made of integers, or one that is longer than
        `length`.

    Example:
      >>> left_pad([[5], [6, 7]])[0].tolist(), left_pad([[5], [6, 7]])[1].tolist()
      ([[0, 5], [6, 7]], [1, 2])
    """
    rows = [_row(prompt) for prompt in _several(prompts)]
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1:
        raise ConfigError("prompt: empty; give at least one token for each")
    length = as_count(length, "length") or max(lengths)
    if max(lengths) > length:
        raise ConfigError(
            f"prompt: {max(lengths)} tokens do not fit length={length}; raise it or shorten it"
        )
    out = np.zeros((len(rows), length), np.int32)
    for to, row in zip(out, rows, strict=True):
        to[length - len(row) :] = row
    return out, np.asarray(lengths, np.int32)


def _several(prompts: Any) -> Any:
    whole = isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__iter__")
    if whole or getattr(prompts, "shape", None) == ():
        raise ConfigError(f"prompt: {brief(prompts)}; give a list of prompts, such as [[5, 6]]")
    return prompts


def _row(prompt: Any) -> np.ndarray:
    """The ids of one prompt, which must be whole numbers that an int32 holds."""
    try:
        row = np.asarray(prompt)
    except (TypeError, ValueError):
        row = np.asarray(None)
    if row.shape == (0,):
        return row.astype(np.int32)
    if row.ndim != 1:
        raise ConfigError(f"prompt: {brief(prompt)}; give a list of prompts, such as [[5, 6]]")
    if row.dtype.kind not in "iu":
        raise ConfigError(f"prompt: {brief(prompt)}; give token ids, which are integers")
    if row.min() < 0 or row.max() > np.iinfo(np.int32).max:
        odd = row.min() if row.min() < 0 else row.max()
        raise ConfigError(f"prompt: {odd} is no token; give token ids of the model's tokenizer")
    return row


class Start(NamedTuple):
    """What is static about a generation.

    Args:
      new: tokens to add at most.
      cache: storage of keys and values.
    """

    new: int
    cache: str | Storage


def prefill(
    model: Any, params: Any, prompt_BT: Any, lengths_B: Any, start: Start, state: Any
) -> tuple[Any, Any]:
    """Returns the logits behind the prompts, (B, V), and the state with their keys and values."""
    B, T = prompt_BT.shape
    options = {"storage": start.cache} if start.cache else {}
    if lengths_B is not None:
        options["pads"] = T - lengths_B
    state = (state or {}) | model.init_cache(B, T + start.new, **options)
    logits, state = model.apply(params, prompt_BT, state=state)
    return logits[:, -1], state


def check_prompt(
    model: Any,
    params: Any,
    prompt: Any,
    lengths: Any,
    new: Count,
    cache: CacheStorage,
) -> tuple[Start, Any]:
    """Checks what the ways of generating have in common.

    Returns:
      The static part and the lengths as an array, None where no row is padded.

    Raises:
      ConfigError: see `generate`.
    """
    if hasattr(model, "init"):
        check_params(model, params, type(model).__name__.lower())
    shape = getattr(prompt, "shape", None)
    if shape is None or len(shape) != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        kind_of = type(prompt).__name__ if shape is None else f"{prompt.dtype} {tuple(shape)}"
        raise ConfigError(
            f"prompt: {kind_of}; give integer ids of shape (B, T), such as left_pad([[5, 6]])[0]"
        )
    B, T = shape
    vocabulary = model.config.vocabulary
    if B < 1 or T < 1:
        raise ConfigError(f"prompt: shape {prompt.shape} is empty; give at least one token a row")
    new, storage = as_count(new, "new"), as_cache(cache)
    if new < 1:
        raise ConfigError(f"new: {new} tokens to add; ask for at least 1")
    ids = np.zeros(1) if isinstance(prompt, jax.core.Tracer) else np.asarray(prompt)
    if (odd := ids[(ids < 0) | (ids >= vocabulary)]).size:
        raise ConfigError(
            f"prompt: {odd[0]} is no token of the model, whose ids are 0..{vocabulary - 1}; take"
            " the tokenizer that it was trained with"
        )
    takes = inspect.signature(model.init_cache).parameters
    for what, asked, name in (
        ("cache", storage, "storage"),
        ("lengths", lengths is not None, "pads"),
    ):
        if asked and name not in takes:
            raise ConfigError(
                f"{what}: {type(model).__name__} keeps no keys and values; leave {what} out"
            )
    start = Start(new, storage)
    if lengths is None:
        return start, None
    lengths = np.asarray(as_counts(lengths, "lengths"))
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
        raise ConfigError(
            f"lengths: {lengths.tolist()} do not fit prompts of shape {(B, T)}; give for each row"
            f" how many of its last tokens are the prompt, 1..{T}"
        )
    return start, (None if (lengths == T).all() else jnp.asarray(lengths, jnp.int32))


def check_state(model: Any, state: Any) -> Any:
    """Returns the state that a generation begins with, checked.

    Raises:
      ConfigError: no state of a model.
    """
    if state is None:
        return model.init_state()
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"state: {brief(state)}; give amax histories, of a training state state.model_state, or"
            " leave it out"
        )
    return state
