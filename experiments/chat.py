"""A small language model answers in the terminal, its weights in 32, 16, 8 or 4 bits.

Shows what weight storage does to an answer, to bytes and to tokens a second. SmolLM2-135M-Instruct
is fetched on first use (93 MB); any checkpoint that mpjax.models.hf reads and that brings a chat
template will do, and so will a run of finetune.py --task instruct, by the template it was tuned by.

Run:       python experiments/chat.py --weights int8
           python experiments/chat.py --weights int4 --prompt 'What is the capital of France?'
           python experiments/chat.py --weights int4@32 --calibration stdlib
           python experiments/chat.py runs/a        # what finetune.py --task instruct has tuned
Expected:  "The capital of France is Paris." in all of them; int4 is the grid of this checkpoint.
           Fewer bits save memory here, not time: a CPU dequantises the weights for each token.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import tyro

from common.datasets.assets import fetch
from common.datasets.sources import DOCUMENTS
from mpjax.data import Tokenizer, read_documents, validation_batches
from mpjax.data.chat import Chat, Message
from mpjax.errors import ConfigError
from mpjax.finetuning import load_run
from mpjax.finetuning.tuned_chat import checkpoint_chat
from mpjax.models import (
    Decoder,
    Sampling,
    cache_storage,
    has_scales,
    input_moments,
    left_pad,
    quantize_weights,
    stored_bytes,
    stream,
)
from mpjax.models.hf import load_checkpoint, open_checkpoint
from mpjax.precision import get_precision
from mpjax.typing import Array, Params, PyTree

BLOCK = 64  # prompts are padded to a multiple of it: so many lengths share a compiled program
WINDOW, WINDOWS = 256, 64  # tokens, and how many of them, of a calibration text
ENOUGH = 32 * WINDOW * WINDOWS  # characters that hold more tokens than these
LONGEST = 200  # tokens of an answer, unless the user says so
WARM = 2  # the first token waits for the prompt, the second for a compilation


@dataclasses.dataclass(frozen=True)
class Config:
    """Talk to a checkpoint or a run."""

    run: tyro.conf.Positional[str] = ""
    """Folder of a run: --out of finetune.py --task instruct; else --checkpoint."""
    prompt: str = ""
    """Answer this and leave; without it, talk until an empty line."""
    checkpoint: str = ""
    """Folder or file of a checkpoint with its tokenizer; by default SmolLM2-135M-Instruct."""
    weights: str = "int8"
    """Storage of the weights: f32, bf16, int8, int4 (int4@32+offset) or FORMAT@SCALING."""
    calibration: str = ""
    """Text by whose inputs the weights are rounded (GPTQ), as --data of train_lm: `stdlib`, a file,
    a folder ...; without it to nearest."""
    rule: tuple[str, ...] = ()
    """PATTERN=STORAGE of some weights, such as '**/embed=int8', or PATTERN=keep."""
    precision: str = "fp32"
    """Precision to compute in; int8 with int8 weights multiplies integers."""
    cache: str = ""
    """Storage of keys and values, such as int8; the compute dtype by default."""
    system: str = ""
    """First message, of the system; the template's own by default."""
    tokens: int = 0
    """Longest answer; 0 takes 200, or what the context has room for."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""


class Talker(NamedTuple):
    """What answers.

    Args:
      model: a decoder.
      params: its weights.
      chat: its conversations as ids.
      tokenizer: text of its tokenizer.json.
    """

    model: Decoder
    params: Params
    chat: Chat
    tokenizer: str


def of_run(config: Config) -> Talker:
    """Returns what answers for a run.

    Raises:
      ConfigError: a run that was not tuned on conversations.
    """
    if config.checkpoint:
        raise ConfigError(f"checkpoint={config.checkpoint} and the run {config.run}; give one")
    tuned = load_run(config.run, config.precision)
    chat = tuned.chat
    # one block is compiled, not thirty
    config_of = dataclasses.replace(tuned.model.config, loop="scan")
    model = dataclasses.replace(tuned.model, config=config_of)
    return Talker(model, tuned.params, chat, tuned.tokenizer.to_text())


def of_checkpoint(config: Config) -> Talker:
    """Returns what answers for a checkpoint with a tokenizer and a chat template.

    Raises:
      ConfigError: it has none, or is no decoder.
    """
    source = Path(config.checkpoint) if config.checkpoint else fetch("smollm2")
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer_json()
    if tokenizer is None:
        raise ConfigError(
            f"checkpoint: {checkpoint.where.parent} has no tokenizer.json; name a model that can"
            " chat"
        )
    metadata = checkpoint.metadata({"eos_token_id"})
    chat = checkpoint_chat(tokenizer, metadata, f"checkpoint: {checkpoint.where.parent}")
    model, params = load_checkpoint(source, get_precision(config.precision), loop="scan")
    if not isinstance(model, Decoder):
        raise ConfigError(f"checkpoint: {source} is no decoder; take a language model")
    if chat.vocab_size > model.config.vocabulary:
        raise ConfigError(
            f"checkpoint: {source}: the tokenizer has {chat.vocab_size} tokens, the model"
            f" {model.config.vocabulary}; take the tokenizer of this model"
        )
    return Talker(model, params, chat, tokenizer)


def sample(source: str) -> str:
    """Returns enough text for the calibration, of documents from all over a source.

    Raises:
      ConfigError: no text can be read there.
    """
    try:
        documents = read_documents(source, sources=DOCUMENTS)
    except ConfigError as error:
        raise ConfigError(f"calibration: {error}") from None
    step = max(1, sum(len(document.text) for document in documents) // ENOUGH)
    return "\n\n".join(document.text for document in documents[::step])[:ENOUGH]


def moments_of(source: str, text: str, talker: Talker) -> Mapping[str, PyTree]:
    """Returns the moments of what the weights are multiplied by when the model reads a text."""
    model = talker.model
    ids = Tokenizer.from_text(talker.tokenizer).encode(text)
    seq = min(WINDOW, model.config.context)
    if len(ids) <= seq:
        raise ConfigError(
            f"calibration: {source} has {len(ids)} tokens where a window takes {seq + 1}; name a"
            " longer text"
        )
    return input_moments(
        model, talker.params, validation_batches(ids, batch=1, seq=seq, limit=WINDOWS)
    )


def say(chat: Chat, tokens: Iterable[Array], write: Callable[[str], None]) -> tuple[str, str]:
    """Writes an answer as its tokens come.

    Returns:
      The answer, and how fast it came.
    """
    ids: list[int] = []
    shown, start, warm = "", time.perf_counter(), 0.0
    first = 0.0
    for token in tokens:
        ids.append(int(token[0]))  # waits for the token
        now = time.perf_counter()
        first = first or now - start
        warm = now if len(ids) == WARM else warm
        if ids[-1] in chat.ends:
            break
        text = chat.text(ids)
        if not text.endswith("\ufffd"):  # a letter whose other bytes are still to come
            write(text[len(shown) :])
            shown = text
    took = time.perf_counter() - warm
    speed = f"{(len(ids) - WARM) / took:.1f} tokens/s" if len(ids) > WARM else "too short to time"
    return shown, f"{len(ids)} tokens, the first after {first:.1f} s, then {speed}"


def main(config: Config) -> None:
    """Loads the checkpoint, stores its weights as asked, and answers."""
    launch.not_negative(config, "tokens", "temperature", "top_k", "seed")
    Sampling(config.temperature, config.top_k, config.top_p)
    storage = "int4@32+offset" if config.weights == "int4" else config.weights
    rounded = has_scales(storage, config.rule)
    if config.calibration and not rounded:
        raise ConfigError(
            f"calibration: weights={config.weights} are not rounded to a grid with scales; drop it,"
            " or take --weights int4@32"
        )
    if config.cache:
        cache_storage(config.cache)
    get_precision(config.precision)
    text = sample(config.calibration) if config.calibration else ""
    talker = of_run(config) if config.run else of_checkpoint(config)
    model, params, chat, _ = talker
    whole = stored_bytes(params)
    moments = moments_of(config.calibration, text, talker) if config.calibration else None
    params = quantize_weights(params, storage, rules=config.rule, moments=moments)
    slot = stored_bytes(model.init_cache(1, 1, config.cache)["layers"])
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731
    note(
        f"{stored_bytes(params) / 1e6:,.1f} MB of weights in {storage} (float32:"
        f" {whole / 1e6:,.1f}), {slot:,} bytes of keys and values a token"
    )
    messages: list[Message] = []
    if config.system:
        messages.append({"role": "system", "content": config.system})

    def answer(text: str, turn: int) -> None:
        messages.append({"role": "user", "content": text})
        ids = chat.ids(messages)
        new = config.tokens or min(LONGEST, max(1, model.config.context - len(ids)))
        room = model.config.context - new
        if len(ids) > room:
            raise ConfigError(
                f"prompt: {len(ids)} tokens and an answer of {new} do not fit the context"
                f" of {model.config.context}; shorten it or lower --tokens"
            )
        prompt, lengths = left_pad([ids], min(-(-len(ids) // BLOCK) * BLOCK, room))
        tokens = stream(
            model, params, prompt, new=new, lengths=lengths, cache=config.cache,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            key=jax.random.fold_in(jax.random.key(config.seed), turn),
        )  # fmt: skip
        said, speed = say(chat, tokens, lambda part: print(part, end="", flush=True))
        print()
        note(speed)
        messages.append({"role": "assistant", "content": said})

    if config.prompt:
        answer(config.prompt, 0)
        return
    turn = 0
    while text := _ask():
        answer(text, turn)
        turn += 1


def _ask() -> str:
    """What the user types; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise ConfigError("prompt: what was typed is not UTF-8; set the terminal to it") from None


if __name__ == "__main__":
    launch.command(main, Config)
