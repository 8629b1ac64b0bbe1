"""Sample text from a checkpoint, with a key/value cache.

Run:       python experiments/generate.py --run runs/lm --prompt 'import ' --tokens 300
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import tyro
from lm import CHECKPOINTS, Shape, lm_model, sample

from mpjax.data import Tokenizer
from mpjax.errors import ConfigError
from mpjax.precision import get_precision
from mpjax.train.reader import CheckpointReader


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
    launch.not_negative(config, "temperature", "top_k", "seed")
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
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    leaves = reader.read(names, step)
    tree = jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in names])
    params, state = tree["params"], None if config.precision else tree["model_state"]
    text = sample(
        model, params, tokenizer, config.prompt, config.tokens, temperature=config.temperature,
        top_k=config.top_k, seed=config.seed, state=state,
    )  # fmt: skip
    launch.wide().print(text, highlight=False, markup=False)


if __name__ == "__main__":
    launch.command(main, Config)
