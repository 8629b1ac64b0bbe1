"""A run of `experiments/train_lm.py` as a model that answers and is exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mpjax.data import Tokenizer
from mpjax.errors import ConfigError
from mpjax.finetuning.run_folder import CHECKPOINTS
from mpjax.models import Decoder, decoder, decoder_config
from mpjax.paths import leaves_with_names
from mpjax.precision import Precision, get_precision
from mpjax.train import CheckpointReader
from mpjax.typing import Json, Params


@dataclasses.dataclass(frozen=True)
class LanguageRun:
    """What lies in the folder of a language model's training.

    Args:
      model: in the Precision that was asked for.
      params: of the newest whole checkpoint, as stored.
      tokenizer: that it was trained with.
      config: settings of the run.
      step: of the checkpoint.
    """

    model: Decoder
    params: Params
    tokenizer: Tokenizer
    config: dict[str, Json]
    step: int


def is_language_run(folder: Path) -> bool:
    """Whether a folder holds checkpoints of a language model's training."""
    return (folder / CHECKPOINTS).is_dir() and bool(CheckpointReader(folder / CHECKPOINTS).steps())


def load_language_run(folder: Path, precision: str | Precision | None) -> LanguageRun:
    """Loads the newest whole checkpoint of a run of `train_lm.py`.

    Raises:
      ConfigError: checkpoints of something else, or none that is whole.
    """
    reader = CheckpointReader(folder / CHECKPOINTS)
    step = reader.newest_good()
    meta: dict[str, Any] = reader.read_meta(step)
    try:
        config, tokenizer = meta["config"], Tokenizer.from_text(meta["tokenizer"])
        changes = {name: x for name, x in config["shape"].items() if x is not None}
        size, seq, stored_in = config["model"], config["seq"], meta["precision"]
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{folder}: its checkpoints are of no language model; give a folder of"
            " experiments/train_lm.py or experiments/finetune.py"
        ) from None
    changes.setdefault("vocabulary", tokenizer.vocab_size)
    changes.setdefault("context", max(seq, decoder_config(size).context))
    stored = decoder(size, get_precision(stored_in), **changes)
    shapes = {"params": jax.eval_shape(stored.init, jax.random.key(0))}
    leaves = reader.read(dict(leaves_with_names(shapes)), step)
    tree = [leaves[name] for name, _ in leaves_with_names(shapes)]
    params = jax.tree.unflatten(jax.tree.structure(shapes), tree)["params"]
    model = dataclasses.replace(stored, precision=get_precision(precision or "fp32"))
    return LanguageRun(model, params, tokenizer, config, step)
