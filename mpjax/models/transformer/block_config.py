"""Shape and choices of the Transformer blocks of every model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mpjax.errors import ConfigError
from mpjax.models.core.sizes import ModelConfig
from mpjax.ops import KERNELS
from mpjax.ops.rotary import ROPE_SCALINGS, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(ModelConfig):
    """Shape of a stack of Transformer blocks and of its embeddings.

    Args:
      vocabulary: V, number of token ids.
      layers: number of blocks.
      width: D, width of the residual stream.
      heads: H, query heads.
      kv_heads: G, key and value heads; H is multi-head, 1 multi-query, 0 means H.
      head_width: K, width of one head; 0 means D / H.
      mlp_width: hidden width of the MLP; 0 means 8/3 D rounded up to 32 for swiglu, else 4 D.
      context: longest sequence; only learned positions have a table of it.
      norm: `layer` or `rms`.
      norm_first: pre-norm, with a norm after the last block; else post-norm, without one.
      position: `learned`, `sinusoidal` or `rotary`.
      activation: `gelu` (tanh form), `gelu_exact` (erf form), `relu` or `swiglu`.
      tied: whether the head is the transposed embedding.
      bias: whether linear layers and LayerNorm have biases.
      qkv_bias: whether query, key and value have biases even without `bias`.
      scale_embed: whether embeddings are multiplied by sqrt(D).
      norm_embed: whether the sum of all embeddings is normalised.
      dropout: rate on embeddings and on each branch before it joins the residual stream.
      qk_norm: whether queries and keys are RMS-normalised per head.
      window: a query attends to the last `window` tokens, its own included; 0 is all.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched for a longer context: `none`, `linear` or `llama3`.
      rope_factor: by how much.
      rope_low: llama3: waves longer than rope_context / rope_low are stretched by rope_factor.
      rope_high: llama3: waves shorter than rope_context / rope_high are not.
      rope_context: llama3: context before the stretching.
      epsilon: of the norms.
      loop: over layers: `scan` (compiles one block), `unroll` (faster on CPU), `auto` unrolls on
        CPU and scans elsewhere.
      remat: what the backward pass recomputes: `none`, `full` (all of each block), `dots` (all but
        products), `dots_no_batch` (all but products without batch dimensions).
      kernel: of attention: `auto`, `xla`, `cudnn` or `splash`; see `mpjax.ops.attention`.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm": ("layer", "rms"),
        "position": ("learned", "sinusoidal", "rotary"),
        "activation": ("gelu", "gelu_exact", "relu", "swiglu"),
        "rope_scaling": ROPE_SCALINGS,
        "loop": ("auto", "scan", "unroll"),
        "remat": ("none", "full", "dots", "dots_no_batch"),
        "kernel": KERNELS,
    }
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "epsilon", "rope_theta", "rope_factor", "rope_low", "rope_high",
    )  # fmt: skip
    COUNTS: ClassVar[tuple[str, ...]] = (
        "vocabulary", "layers", "width", "heads", "context", "rope_context",
    )  # fmt: skip
    OPTIONAL: ClassVar[tuple[str, ...]] = ("kv_heads", "head_width", "mlp_width", "window")
    RATES: ClassVar[tuple[str, ...]] = ("dropout",)

    vocabulary: int = 256
    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 0
    head_width: int = 0
    mlp_width: int = 0
    context: int = 1024
    norm: str = "rms"
    norm_first: bool = True
    position: str = "rotary"
    activation: str = "swiglu"
    tied: bool = True
    bias: bool = False
    qkv_bias: bool = False
    scale_embed: bool = False
    norm_embed: bool = False
    dropout: float = 0.0
    qk_norm: bool = False
    window: int = 0
    rope_theta: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_context: int = 8192
    epsilon: float = 1e-5
    loop: str = "auto"
    remat: str = "none"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_width and self.width % self.heads:
            raise ConfigError(
                f"model: width={self.width} is not a multiple of heads={self.heads}; change one, or"
                " give head_width"
            )
        if self.heads % self.groups:
            raise ConfigError(
                f"model: heads={self.heads} is not a multiple of kv_heads={self.groups}; change one"
            )
        if self.position == "rotary" and self.per_head % 2:
            name = "head_width" if self.head_width else "width/heads"
            raise ConfigError(
                f"model: rotary positions need an even head width, {name}={self.per_head};"
                " change width or heads, or set position=learned"
            )
        if self.position == "sinusoidal" and self.width % 2:
            raise ConfigError(
                f"model: sinusoidal positions need an even width, width={self.width}; change it,"
                " or set position=learned"
            )
        if self.rope_scaling != "none" and self.position != "rotary":
            raise ConfigError(
                f"model: rope_scaling={self.rope_scaling!r} stretches rotary positions, position="
                f"{self.position!r} has none; set position=rotary or rope_scaling=none"
            )
        if self.rope_low >= self.rope_high:
            raise ConfigError(
                f"model: rope_low={self.rope_low} must be below rope_high={self.rope_high};"
                " change one"
            )

    @property
    def groups(self) -> int:
        """G, the number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def per_head(self) -> int:
        """K, the width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def hidden(self) -> int:
        """The MLP's hidden width."""
        if self.mlp_width:
            return self.mlp_width
        return -(-8 * self.width // 96) * 32 if self.activation == "swiglu" else 4 * self.width

    @property
    def rope(self) -> RopeScaling:
        """How the rotary frequencies are stretched."""
        return RopeScaling(
            self.rope_scaling, self.rope_factor, self.rope_low, self.rope_high, self.rope_context
        )
