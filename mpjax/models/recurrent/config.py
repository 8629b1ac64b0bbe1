"""Sizes and choices of the recurrent language model, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpjax.errors import ConfigError
from mpjax.models.core.sizes import named_config

CELLS = {"lstm": 4, "gru": 3}  # gates of each


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Shape of a recurrent language model.

    Args:
      vocabulary: V, number of token ids.
      layers: cells above each other.
      width: D, width of the embedding and of every cell.
      cell: `lstm` or `gru`.
      tied: whether the head is the transposed embedding.
      dropout: rate on embeddings and on what each cell hands upwards, never from step to step.
      loss_chunk: tokens of the sequence whose logits are held at a time; 0 is automatic.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    vocabulary: int = 256
    layers: int = 1
    width: int = 128
    cell: str = "lstm"
    tied: bool = True
    dropout: float = 0.0
    loss_chunk: int = 0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"model: {name}={getattr(self, name)} must be at least 1; raise it"
                )
        if self.cell not in CELLS:
            raise ConfigError(f"model: cell={self.cell!r} is unknown; known: {' '.join(CELLS)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model: dropout={self.dropout} must be in [0, 1); lower it")
        if self.loss_chunk < 0:
            raise ConfigError(
                f"model: loss_chunk={self.loss_chunk} must not be negative; 0 is automatic"
            )


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": dict(vocabulary=4096, layers=2, width=512),
    "zaremba-medium": dict(vocabulary=10000, layers=2, width=650, tied=False, dropout=0.5),
}


def recurrent_sizes() -> tuple[str, ...]:
    """Returns the names of all sizes."""
    return tuple(_SIZES)


def recurrent_config(size: str | RecurrentConfig, **changes: Any) -> RecurrentConfig:
    """Returns the configuration of a named size with some fields changed.

    Args:
      size: `tiny`, `small`, or `zaremba-medium` (Penn Treebank by words).
      changes: fields of RecurrentConfig.

    Raises:
      ConfigError: unknown size or field.

    Example:
      >>> recurrent_config("small", cell="gru").width
      512

    References:
      Zaremba et al. 2014, Recurrent Neural Network Regularization.
    """
    return named_config(RecurrentConfig, _SIZES, size, changes)
