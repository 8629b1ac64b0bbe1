"""Sizes and choices of the encoder-decoder, by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mpjax.models.core.sizes import FieldValue, named_config
from mpjax.models.transformer.decoder_config import DecoderConfig
from mpjax.typing import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(DecoderConfig):
    """Shape of an encoder-decoder: that of its decoder, and how its encoder differs.

    Args:
      encoder_layers: blocks of the encoder; 0 is as many as the decoder's.
      source_vocabulary: token ids of the source; 0 shares the target's, and its embedding.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    OPTIONAL: ClassVar[tuple[str, ...]] = (
        *DecoderConfig.OPTIONAL, "encoder_layers", "source_vocabulary",
    )  # fmt: skip

    norm: str = "layer"
    norm_first: bool = False
    position: str = "sinusoidal"
    activation: str = "relu"
    bias: bool = True
    scale_embed: bool = True
    encoder_layers: int = 0
    source_vocabulary: int = 0

    @property
    def encoder(self) -> Seq2SeqConfig:
        """The same shape with the encoder's layers and vocabulary."""
        return dataclasses.replace(
            self,
            layers=self.encoder_layers or self.layers,
            vocabulary=self.source_vocabulary or self.vocabulary,
        )


_SIZES: dict[str, Settings] = {
    "seq2seq-tiny": dict(layers=2, width=128, heads=4),
    "transformer-base": dict(layers=6, width=512, heads=8, dropout=0.1, vocabulary=37000),
    "transformer-big": dict(layers=6, width=1024, heads=16, dropout=0.3, vocabulary=37000),
}


def seq2seq_sizes() -> tuple[str, ...]:
    """Returns the names of all sizes."""
    return tuple(_SIZES)


def seq2seq_config(size: str | Seq2SeqConfig, **changes: FieldValue) -> Seq2SeqConfig:
    """Returns the configuration of a named size with some fields changed.

    Args:
      size: a name that `seq2seq_sizes` lists, or a Seq2SeqConfig.
      changes: fields of Seq2SeqConfig.

    Raises:
      ConfigError: unknown size or field.

    Example:
      >>> seq2seq_config("transformer-base").encoder.layers
      6

    References:
      Vaswani et al. 2017, table 3.
    """
    return named_config(Seq2SeqConfig, _SIZES, size, changes)
