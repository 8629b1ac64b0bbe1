"""Sizes and choices of the decoder, by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mpjax.errors import ConfigError
from mpjax.models.core.sizes import FieldValue, named_config
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.typing import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """Shape of a decoder-only Transformer: that of its blocks, and its logits and loss.

    Args:
      head_bias: whether a head of its own weights (tied=False) has biases.
      logit_cap: soft-cap of the logits; 0 is none.
      z_loss: weight of the squared log-normaliser in the loss; 0 is none.
      loss_chunk: tokens of the sequence whose logits are held at a time; 0 is automatic.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    OPTIONAL: ClassVar[tuple[str, ...]] = (
        *BlockConfig.OPTIONAL, "logit_cap", "z_loss", "loss_chunk",
    )  # fmt: skip

    head_bias: bool = False
    logit_cap: float = 0.0
    z_loss: float = 0.0
    loss_chunk: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_bias and self.tied:
            raise ConfigError(
                "model: head_bias=True with tied=True; a tied head is the embedding and has none:"
                " set tied=False or head_bias=False"
            )


_GPT: Settings = dict(norm="layer", position="learned", activation="gelu")
_GPT2: Settings = _GPT | dict(vocabulary=50257, bias=True)
_LLAMA: Settings = dict(tied=False, context=4096)
_LLAMA3: Settings = _LLAMA | dict(vocabulary=128256, kv_heads=8, rope_theta=500000.0, context=8192)
_SIZES: dict[str, Settings] = {
    "tiny": {},
    "small": _GPT | dict(vocabulary=4096, layers=6, width=384, heads=6, context=256),
    "gpt2": _GPT2 | dict(layers=12, width=768, heads=12),
    "gpt2-medium": _GPT2 | dict(layers=24, width=1024, heads=16),
    "gpt2-large": _GPT2 | dict(layers=36, width=1280, heads=20),
    "gpt2-xl": _GPT2 | dict(layers=48, width=1600, heads=25),
    "llama-7b": _LLAMA | dict(vocabulary=32000, layers=32, width=4096, heads=32, mlp_width=11008),
    "llama-13b": _LLAMA | dict(vocabulary=32000, layers=40, width=5120, heads=40, mlp_width=13824),
    "llama3-8b": _LLAMA3 | dict(layers=32, width=4096, heads=32, mlp_width=14336),
}


def decoder_sizes() -> tuple[str, ...]:
    """Returns the names of all sizes."""
    return tuple(_SIZES)


def decoder_config(size: str | DecoderConfig, **changes: FieldValue) -> DecoderConfig:
    """Returns the configuration of a named size with some fields changed.

    Args:
      size: a name that `decoder_sizes` lists, or a DecoderConfig.
      changes: fields of DecoderConfig.

    Raises:
      ConfigError: unknown size or field.

    Example:
      >>> decoder_config("gpt2", layers=2).width
      768

    References:
      Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama 2); Llama Team 2024 (Llama 3).
    """
    return named_config(DecoderConfig, _SIZES, size, changes)
