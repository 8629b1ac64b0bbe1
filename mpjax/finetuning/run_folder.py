"""What the folder of a fine-tuning run holds.

run.json                 settings, shape of the model, labels, what was read
tokenizer.json           of the model
files/                   further files of the checkpoint that was tuned
metrics.jsonl            a record a step, and the scores of each judgement
checkpoints/             the last two judgements, for --resume
best.json                step, scores and file of the best weights
best-STEP.safetensors    these weights
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpjax.errors import ConfigError
from mpjax.files import write_bytes, write_text
from mpjax.json_text import parse_json
from mpjax.train import environment
from mpjax.typing import Settings

RUN, BEST, TOKENIZER, FILES = "run.json", "best.json", "tokenizer.json", "files"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunPage:
    """What a run is.

    Args:
      settings: all of `Finetuning` that decide a result.
      family: `encoder` or `decoder`.
      config: fields of the model's config.
      labels: names of classes or tags.
      tokenizer: `wordpiece` or `tokenizer`.
      metadata: fields of the config.json of the checkpoint that was tuned.
      steps: of the whole run.
      fingerprint: of the data as ids.
      data: in words.
      lines: what was read.
      environment: of JAX and XLA, where the run began.
    """

    settings: Settings
    family: str
    config: Settings
    labels: tuple[str, ...]
    tokenizer: str
    metadata: Settings
    steps: int
    fingerprint: str
    data: str
    lines: list[tuple[str, str]]
    environment: Settings = dataclasses.field(default_factory=environment)

    def write(self, folder: Path, tokenizer: str, files: Mapping[str, bytes | str]) -> None:
        """Writes the page last: a folder without it holds no run.

        Raises:
          ConfigError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / TOKENIZER, tokenizer)
            for name, content in files.items():
                if name != TOKENIZER:
                    path = folder / FILES / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(path, content.encode() if isinstance(content, str) else content)
            text = json.dumps(dataclasses.asdict(self), indent=2, default=str)
            write_text(folder / RUN, text + "\n")
        except OSError as error:
            raise ConfigError(
                f"out: {folder} cannot be written ({error.strerror}); choose another"
            ) from None

    @classmethod
    def read(cls, folder: Path) -> RunPage:
        """Reads the page of a folder.

        Raises:
          ConfigError: it holds no run, or the page is damaged.
        """
        path = folder / RUN
        if not path.is_file():
            raise ConfigError(f"{folder}: no run here ({RUN}); give the --out of a run")
        found = parse_json(path.read_bytes(), str(path))
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            raise ConfigError(f"{path}: is no page of a run, or of another version; run it again")
        page: Any = found | {"labels": tuple(found["labels"])}
        return cls(**page)


def best_weights(folder: Path) -> tuple[Path, int, dict[str, float]]:
    """Returns the file of the best weights, their step and their scores.

    Raises:
      ConfigError: no judgement has been made yet, or a file is damaged or gone.
    """
    path = folder / BEST
    if not path.is_file():
        raise ConfigError(f"{folder}: the run has not been judged yet; go on with it by resume")
    found: Any = parse_json(path.read_bytes(), str(path))
    try:
        weights = folder / found["weights"]
        step, scores = int(found["step"]), dict(found["scores"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: is damaged; go on with the run by resume") from None
    if not weights.is_file():
        raise ConfigError(f"{folder}: {weights.name} is gone; put it back, or run it again")
    return weights, step, scores
