"""Prompts of different lengths as one array, padded on the left, and what a model makes of them.

Shapes: B prompts, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mpjax.errors import ConfigError, brief
from mpjax.models.core.checks import Initializable, as_counts, check_params
from mpjax.models.core.storage import Storage
from mpjax.models.inference.settings import (
    CacheStorage,
    Count,
    Ends,
    Lengths,
    Prompt,
    Prompts,
    as_cache,
    as_count,
    as_ends,
)
from mpjax.typing import Array, ModelState, Params


def left_pad(
    prompts: Prompts, length: Count = 0
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Returns prompts as one array, each ending in the last column, and their lengths.

    Args:
      prompts: token ids, at least one each.
      length: T; 0 takes the longest prompt's. A few fixed lengths spare compilations.

    Raises:
      ConfigError: no prompt, or one that is empty, not integers, or longer than `length`.

    Example:
      >>> left_pad([[5], [6, 7]])[0].tolist(), left_pad([[5], [6, 7]])[1].tolist()
      ([[0, 5], [6, 7]], [1, 2])
    """
    whole = isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable)
    if whole or getattr(prompts, "shape", None) == ():
        raise ConfigError(f"prompt: {brief(prompts)}; give a list of prompts, such as [[5, 6]]")
    rows = [_row(prompt) for prompt in prompts]
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


def _row(prompt: object) -> np.ndarray:
    """The ids of one prompt: integers that an int32 holds."""
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


@runtime_checkable
class Vocabulary(Protocol):
    """What generation asks of a model's configuration."""

    @property
    def vocabulary(self) -> int: ...


@runtime_checkable
class Continuable(Protocol):
    """What generation asks of a model; it may have `init` and `init_state` too.

    `init_cache` takes the batch and the length, and perhaps `storage` and `pads` as keywords.
    """

    @property
    def config(self) -> Vocabulary: ...
    @property
    def init_cache(self) -> Callable[..., ModelState]: ...
    def apply(
        self, params: Params, ids_BT: Array, /, *, state: ModelState
    ) -> tuple[Array, ModelState]: ...


class Start(NamedTuple):
    """The static settings of a generation.

    Args:
      new: tokens to add at most.
      cache: storage of keys and values.
      ends: tokens that end a text.
    """

    new: int
    cache: str | Storage
    ends: tuple[int, ...]


def prefill(
    model: Continuable, params: Params, prompt_BT: Array, lengths_B: Array | None, start: Start,
    state: ModelState,
) -> tuple[Array, ModelState]:  # fmt: skip
    """Returns the logits after the prompts, (B, V), and the state with their keys and values."""
    B, T = prompt_BT.shape
    storage = {"storage": start.cache} if start.cache else {}
    pads = {} if lengths_B is None else {"pads": T - lengths_B}
    state = (state or {}) | model.init_cache(B, T + start.new, **storage, **pads)
    logits, state = model.apply(params, prompt_BT, state=state)
    return logits[:, -1], state


def check_prompt(
    model: Continuable, params: Params, prompt: Prompt, lengths: Lengths, new: Count,
    cache: CacheStorage, end: Ends = None, state: object = None,
) -> tuple[Start, Array, Array | None, ModelState]:  # fmt: skip
    """Checks what `generate`, `stream` and `beam_search` have in common.

    Returns:
      The static settings, the prompt, the lengths if a row is padded, and the state.

    Raises:
      ConfigError: see `generate`.
    """
    if isinstance(model, Initializable):
        check_params(model, params, type(model).__name__.lower())
    array = isinstance(prompt, jax.Array | np.ndarray)
    if not array or prompt.ndim != 2 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        odd = f"{prompt.dtype} {prompt.shape}" if array else type(prompt).__name__
        raise ConfigError(
            f"prompt: {odd}; give integer ids of shape (B, T), such as left_pad([[5, 6]])[0]"
        )
    (B, T), vocabulary = prompt.shape, model.config.vocabulary
    if B < 1 or T < 1:
        raise ConfigError(f"prompt: shape {prompt.shape} is empty; give at least one token a row")
    new, storage = as_count(new, "new"), as_cache(cache)
    if new < 1:
        raise ConfigError(f"new: {new} tokens to add; ask for at least 1")
    ids = np.zeros(1) if isinstance(prompt, jax.core.Tracer) else np.asarray(prompt)
    if (wrong := ids[(ids < 0) | (ids >= vocabulary)]).size:
        raise ConfigError(
            f"prompt: {wrong[0]} is no token of the model, whose ids are 0..{vocabulary - 1}; take"
            " the tokenizer that it was trained with"
        )
    takes = inspect.signature(model.init_cache).parameters
    options = (("cache", storage, "storage"), ("lengths", lengths is not None, "pads"))
    for what, asked, name in options:
        if asked and name not in takes:
            raise ConfigError(
                f"{what}: {type(model).__name__} keeps no keys and values; leave {what} out"
            )
    lengths_B = np.asarray(as_counts([T] * B if lengths is None else lengths, "lengths"))
    if lengths_B.shape != (B,) or lengths_B.min() < 1 or lengths_B.max() > T:
        raise ConfigError(
            f"lengths: {lengths_B.tolist()} do not fit prompts of shape {(B, T)}; give for each"
            f" row how many of its last tokens are the prompt, 1..{T}"
        )
    padded = None if (lengths_B == T).all() else jnp.asarray(lengths_B, jnp.int32)
    start = Start(new, storage, as_ends(end, vocabulary))
    if state is None and hasattr(model, "init_state"):
        state = model.init_state()
    if state is not None and not isinstance(state, Mapping):
        raise ConfigError(
            f"state: {brief(state)}; give amax histories, of a training state state.model_state, or"
            " leave it out"
        )
    return start, jnp.asarray(prompt), padded, state
