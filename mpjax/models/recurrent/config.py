"""Sizes and choices of the recurrent language model, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import ClassVar

from mpjax.errors import ConfigError
from mpjax.models.core.sizes import FieldValue, ModelConfig, named_config
from mpjax.typing import Settings

CELLS = {"lstm": 4, "gru": 3}  # gates of each


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(ModelConfig):
    """Shape of a recurrent language model.

    Args:
      vocabulary: V, number of token ids.
      layers: cells above each other.
      width: D, width of the embedding and of every cell.
      cell: `lstm` or `gru`.
      tied: whether the head is the transposed embedding.
      dropout: rate on embeddings and on each cell's outputs, not between time steps.
      loss_chunk: tokens of the sequence whose logits are held at a time; 0 is automatic.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("vocabulary", "layers", "width")
    head_bias: ClassVar[bool] = False  # this and the next are settings of a decoder
    logit_cap: ClassVar[float] = 0.0
    z_loss: ClassVar[float] = 0.0
    RATES: ClassVar[tuple[str, ...]] = ("dropout",)
    CHOICES: ClassVar[Mapping[str, Collection[str]]] = {"cell": CELLS}

    vocabulary: int = 256
    layers: int = 1
    width: int = 128
    cell: str = "lstm"
    tied: bool = True
    dropout: float = 0.0
    loss_chunk: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_chunk < 0:
            raise ConfigError(
                f"model: loss_chunk={self.loss_chunk} must not be negative; 0 is automatic"
            )


_SIZES: dict[str, Settings] = {
    "tiny": {},
    "small": dict(vocabulary=4096, layers=2, width=512),
    "zaremba-medium": dict(vocabulary=10000, layers=2, width=650, tied=False, dropout=0.5),
}


def recurrent_config(size: str | RecurrentConfig, **changes: FieldValue) -> RecurrentConfig:
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
