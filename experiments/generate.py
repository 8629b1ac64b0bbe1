"""Sample text from a checkpoint, with a key/value cache.

Run:       python experiments/generate.py --run runs/lm --prompt 'import ' --tokens 300
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import tyro

from common.lm import CHECKPOINTS, Shape, continuation, lm_model, prompt_ids, room, sample
from mpjax.data import Tokenizer
from mpjax.errors import ConfigError
from mpjax.models import Sampling, Storage, beam_search, cache_storage, quantize_weights
from mpjax.paths import leaves_with_names
from mpjax.precision import get_precision
from mpjax.train import CheckpointReader


@dataclasses.dataclass(frozen=True)
class Config:
    """Continue a prompt with a trained decoder."""

    run: Path
    """Folder that train_lm.py wrote."""
    prompt: str = "def "
    """Text to continue."""
    tokens: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1 among all."""
    beams: int = 0
    """Search the likeliest text with so many beams instead of drawing; 0 draws."""
    length_penalty: float = 1.0
    """Of beam search: scores are log p / length to this power."""
    weights: str = ""
    """Storage of the weights, such as bf16, int8 or int4@32; as they were trained by default."""
    cache: str = ""
    """Storage of keys and values, such as int8; the compute dtype by default."""
    seed: int = 0
    """Of the draws."""
    precision: str = ""
    """Precision to compute in; the run's own by default."""
    step: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the newest)")
    ] = None
    """Checkpoint to read; damaged ones are passed over unless named."""


def main(config: Config) -> None:
    """Restores the weights and samples."""
    launch.positive(config, "tokens")
    launch.not_negative(config, "temperature", "top_k", "seed", "beams", "length_penalty")
    if config.beams:
        draws = ("temperature", "top_k", "top_p", "seed")
        drawing = [n for n in draws if getattr(config, n) != getattr(Config, n)]
        if drawing:
            raise ConfigError(f"{drawing[0]}: beam search draws nothing; leave it or --beams out")
    elif config.length_penalty != Config.length_penalty:
        raise ConfigError("length_penalty: scores of beam search; give --beams too")
    else:
        Sampling(config.temperature, config.top_k, config.top_p)
    if config.weights:
        Storage.parse(config.weights, "weights")
    if config.cache:
        cache_storage(config.cache)
    reader = CheckpointReader(config.run / CHECKPOINTS)
    steps = reader.steps()
    if not steps:
        raise ConfigError(f"run: {config.run} holds no checkpoint; give a folder of train_lm.py")
    if config.step is not None and config.step not in steps:
        raise ConfigError(f"step: no checkpoint at {config.step}; there are {steps}")
    step = reader.newest_good() if config.step is None else config.step
    meta = reader.read_meta(step)
    saved = meta["config"]
    tokenizer = Tokenizer.from_text(meta["tokenizer"])
    precision = get_precision(config.precision or meta["precision"])
    model = lm_model(
        saved["model"], Shape(**saved["shape"]), precision, tokenizer.vocab_size, saved["seq"]
    )
    stored = lm_model(
        saved["model"], Shape(**saved["shape"]), get_precision(meta["precision"]),
        tokenizer.vocab_size, saved["seq"],
    )  # fmt: skip
    shapes = jax.eval_shape(
        lambda key: {
            "params": stored.init(key),
            # amax histories of a schedule's precision are begun anew, as at a switch
            "model_state": None if "precision_schedule" in meta else stored.init_state(),
        },
        jax.random.key(0),
    )
    names = dict(leaves_with_names(shapes))
    leaves = reader.read(names, step)
    tree = jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in names])
    params, state = tree["params"], None if config.precision else tree["model_state"]
    if config.weights:
        params = quantize_weights(params, config.weights)
    if config.beams:
        ids = prompt_ids(model, tokenizer, config.prompt)
        found = beam_search(
            model, params, ids, new=room(model, ids, config.tokens), beams=config.beams,
            length_penalty=config.length_penalty, cache=config.cache, state=state,
        )  # fmt: skip
        text = config.prompt + continuation(tokenizer, ids[0], found.tokens[0, 0])
    else:
        text = sample(
            model, params, tokenizer, config.prompt, config.tokens, seed=config.seed,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            cache=config.cache, state=state,
        )  # fmt: skip
    launch.wide().print(text, highlight=False, markup=False)


if __name__ == "__main__":
    launch.command(main, Config)
