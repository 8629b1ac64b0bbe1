"""What the language-model experiments share: model from command line, validation, sampling."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike

from mpjax.data import Corpus, Tokenizer, validation_batches
from mpjax.errors import ConfigError
from mpjax.models import Decoder, DecoderConfig, decoder, decoder_config, generate
from mpjax.precision import Precision, get_precision
from mpjax.train import ShardActivations, TrainStep
from mpjax.typing import Json, ModelState, Params, Settings

CHECKPOINTS = "checkpoints"

_METAVARS = {int: "INT", float: "FLOAT", str: "STR", bool: "{True,False}"}


def _flag(kind: type) -> object:
    arg = tyro.conf.arg(metavar=_METAVARS[kind], help_behavior_hint="(default: the model's)")
    return Annotated[kind | None, arg]


_KINDS = typing.get_type_hints(DecoderConfig)
# Every field of DecoderConfig as an optional flag; its docstring is their help.
Shape = dataclasses.make_dataclass(
    "Shape",
    [(f.name, _flag(_KINDS[f.name]), None) for f in dataclasses.fields(DecoderConfig)],
    namespace={"__doc__": DecoderConfig.__doc__},
    frozen=True,
)


def shape_changes(shape: Json) -> Settings:
    """Returns the fields that were given."""
    return {key: value for key, value in dataclasses.asdict(shape).items() if value is not None}


def lm_model(size: str, shape: Json, precision: Precision, vocabulary: int, seq: int) -> Decoder:
    """Returns the decoder that the command line describes.

    Args:
      size: name of the size whose fields `shape` changes.
      shape: a Shape.
      precision: of the model.
      vocabulary: of the tokenizer.
      seq: tokens a sequence; the context is at least as long.

    Raises:
      ConfigError: a vocabulary smaller than the tokenizer's, a context shorter than a sequence.
    """
    changes = shape_changes(shape)
    if changes.setdefault("vocabulary", vocabulary) < vocabulary:
        raise ConfigError(
            f"vocabulary: {changes['vocabulary']} is smaller than the tokenizer's {vocabulary};"
            " leave it out or make it larger"
        )
    if changes.setdefault("context", max(seq, decoder_config(size).context)) < seq:
        raise ConfigError(
            f"context: {changes['context']} is shorter than --seq {seq}; raise it or lower --seq"
        )
    return decoder(size, precision, **changes)


def eval_precision(text: str) -> Precision:
    """Returns the Precision of `--eval-precision`, whose name stands in its errors."""
    try:
        return get_precision(text)
    except ConfigError as error:
        raise ConfigError(f"eval_{error}") from None


def agreed(requested: Callable[[], str | None], every: int = 8) -> Callable[[], str | None]:
    """Returns a question that all processes answer alike at the same step: is it time to stop?

    A process that left alone would keep the others waiting for its part of a sum. They ask each
    other every few steps only, since that waits for the devices.
    """
    if jax.process_count() == 1:
        return requested
    turn = itertools.count(1)

    def stop() -> str | None:
        if next(turn) % every:
            return None
        flags = multihost_utils.process_allgather(np.int32(requested() is not None))
        return (requested() or "a signal to another process") if flags.any() else None

    return stop


class Judge:
    """Validation loss of weights, in the precision of evaluation.

    Args:
      model: whose shape to use.
      precision: of the evaluation.
      corpus: its held-out text.
      config: has batch, seq and eval_batches.
      step: the train step, for its mesh.
    """

    def __init__(
        self, model: Decoder, precision: str, corpus: Corpus, config: Any, step: TrainStep
    ) -> None:
        judge = decoder(model.config, eval_precision(precision))
        if step.mesh is not None:
            judge = judge.sharded(ShardActivations(step.mesh))
        self._loss = jax.jit(lambda params, batch: judge.loss(params, batch)[0])
        self._place = step.place
        self._batches = validation_batches(
            corpus.validation, batch=config.batch, seq=config.seq, limit=config.eval_batches,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        self.last = math.nan

    def __call__(self, params: Params) -> float:
        losses = [self._loss(params, self._place(batch)) for batch in self._batches]
        self.last = float(np.mean(jax.device_get(losses)))
        return self.last


def prompt_ids(model: Decoder, tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Returns the ids of a prompt, shape (1, tokens).

    Raises:
      ConfigError: it is empty, or fills a context of learned positions.
    """
    ids = tokenizer.prompt(prompt).astype(np.int32)[None]
    if not ids.size:
        raise ConfigError(f"prompt: {prompt!r} holds no token; give some text")
    if model.config.position == "learned" and ids.size >= model.config.context:
        raise ConfigError(
            f"prompt: {ids.size} tokens fill the context of {model.config.context}; shorten it"
        )
    return ids


def room(model: Decoder, ids: np.ndarray, new: int) -> int:
    """Returns how many of the tokens asked for fit behind a prompt."""
    learned = model.config.position == "learned"
    return min(new, model.config.context - ids.shape[1]) if learned else new


def sample(
    model: Decoder, params: Params, tokenizer: Tokenizer, prompt: str, new: int, *,
    temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
    cache: str = "", state: ModelState = None,
) -> str:  # fmt: skip
    """Returns a prompt and its continuation as text."""
    ids = prompt_ids(model, tokenizer, prompt)
    out = generate(
        model, params, jnp.asarray(ids), new=room(model, ids, new), key=jax.random.key(seed),
        temperature=temperature, top_k=top_k, top_p=top_p, cache=cache, state=state,
    )  # fmt: skip
    return prompt + continuation(tokenizer, ids[0], out[0])


def continuation(tokenizer: Tokenizer, prompt: ArrayLike, ids: ArrayLike) -> str:
    """Returns the text of ids behind a prompt's.

    Those above the tokenizer's, which pad a vocabulary, have none.
    """
    ids = np.asarray(ids)
    return tokenizer.continuation(prompt, ids[ids < tokenizer.vocab_size])
