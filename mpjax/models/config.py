"""Sizes and choices of the decoder, by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from mpjax.errors import ConfigError
from mpjax.ops import KERNELS

_CHOICES = {
    "norm": ("layer", "rms"),
    "position": ("learned", "rotary"),
    "activation": ("gelu", "swiglu"),
    "loop": ("auto", "scan", "unroll"),
    "remat": ("none", "full", "dots", "dots_no_batch"),
    "kernel": KERNELS,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder-only Transformer.

    Args:
      vocabulary: V, number of token ids.
      layers: number of blocks.
      width: D, width of the residual stream.
      heads: H, query heads.
      kv_heads: G, key and value heads; H is multi-head, 1 multi-query, 0 means H.
      mlp_width: hidden width of the MLP; 0 means 4 D for gelu, 8/3 D rounded up to 32 for swiglu.
      context: longest sequence; only learned positions have a table of it.
      norm: `layer` or `rms`.
      position: `learned` or `rotary`.
      activation: `gelu` (tanh form) or `swiglu`.
      tied: whether the head is the transposed embedding.
      bias: whether linear layers and LayerNorm have biases.
      dropout: rate on embeddings and on each branch before it joins the residual stream.
      qk_norm: whether queries and keys are RMS-normalised per head.
      logit_cap: soft-cap of the logits; 0 is none.
      z_loss: weight of the squared log-normaliser in the loss; 0 is none.
      rope_theta: base of the rotary frequencies.
      epsilon: of the norms.
      loop: over layers: `scan` (compiles one block), `unroll` (faster on CPU), `auto` unrolls on
        CPU and scans elsewhere.
      remat: what the backward pass recomputes: `none`, `full` (all of each block), `dots` (all but
        products), `dots_no_batch` (all but products without batch dimensions).
      loss_chunk: tokens of the sequence whose logits are held at a time; 0 is automatic.
      kernel: of attention: `auto`, `xla` or `cudnn`.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    vocabulary: int = 256
    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 0
    mlp_width: int = 0
    context: int = 1024
    norm: str = "rms"
    position: str = "rotary"
    activation: str = "swiglu"
    tied: bool = True
    bias: bool = False
    dropout: float = 0.0
    qk_norm: bool = False
    logit_cap: float = 0.0
    z_loss: float = 0.0
    rope_theta: float = 10000.0
    epsilon: float = 1e-5
    loop: str = "auto"
    remat: str = "none"
    loss_chunk: int = 0
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"model: {name}={getattr(self, name)} must be at least 1; raise it"
                )
        for name in ("kv_heads", "mlp_width", "logit_cap", "z_loss", "loss_chunk"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"model: {name}={getattr(self, name)} must not be negative; give a finite"
                    " number, 0 is off"
                )
        for name in ("epsilon", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"model: {name}={getattr(self, name)} must be positive; give a finite number"
                )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"model: {name}={getattr(self, name)!r} is unknown; known: {' '.join(choices)}"
                )
        if self.width % self.heads:
            raise ConfigError(
                f"model: width={self.width} is not a multiple of heads={self.heads}; change one"
            )
        if self.heads % self.groups:
            raise ConfigError(
                f"model: heads={self.heads} is not a multiple of kv_heads={self.groups}; change one"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise ConfigError(
                f"model: rotary positions need an even head width, width/heads={self.head_width};"
                " change width or heads, or set position=learned"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model: dropout={self.dropout} must be in [0, 1); lower it")

    @property
    def groups(self) -> int:
        """G, the number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """The MLP's hidden width."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.activation == "gelu" else -(-8 * self.width // 96) * 32


_GPT2: dict[str, Any] = dict(
    vocabulary=50257,
    norm="layer",
    position="learned",
    activation="gelu",
    bias=True,
)
_LLAMA: dict[str, Any] = dict(tied=False, context=4096)
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": dict(
        vocabulary=4096,
        layers=6,
        width=384,
        heads=6,
        norm="layer",
        position="learned",
        activation="gelu",
        context=256,
    ),
    "gpt2": _GPT2 | dict(layers=12, width=768, heads=12),
    "gpt2-medium": _GPT2 | dict(layers=24, width=1024, heads=16),
    "gpt2-large": _GPT2 | dict(layers=36, width=1280, heads=20),
    "gpt2-xl": _GPT2 | dict(layers=48, width=1600, heads=25),
    "llama-7b": _LLAMA | dict(vocabulary=32000, layers=32, width=4096, heads=32, mlp_width=11008),
    "llama-13b": _LLAMA | dict(vocabulary=32000, layers=40, width=5120, heads=40, mlp_width=13824),
    "llama3-8b": _LLAMA
    | dict(
        vocabulary=128256,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        mlp_width=14336,
        rope_theta=500000.0,
        context=8192,
    ),
}


def size_names() -> tuple[str, ...]:
    """Returns the names of all sizes."""
    return tuple(_SIZES)


def decoder_config(size: str, **changes: Any) -> DecoderConfig:
    """Returns the configuration of a named size with some fields changed.

    Raises:
      ConfigError: unknown size or field.

    Example:
      >>> decoder_config("gpt2", layers=2).width
      768

    References:
      Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama 2); Llama Team 2024 (Llama 3).
    """
    if size not in _SIZES:
        near = difflib.get_close_matches(size, _SIZES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"model: unknown size {size!r}; {hint}known: {' '.join(_SIZES)}")
    fields = {field.name for field in dataclasses.fields(DecoderConfig)}
    if unknown := sorted(set(changes) - fields):
        raise ConfigError(f"model: unknown field {unknown[0]!r}; known: {' '.join(sorted(fields))}")
    return DecoderConfig(**(_SIZES[size] | changes))
