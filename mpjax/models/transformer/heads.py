"""What features are turned into: pooled, logits of each kind, and the loss of next tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.models.core.checks import targets_of
from mpjax.models.core.layers import Linear, Norm, head_logits
from mpjax.models.core.module import At, Layer
from mpjax.models.transformer.block import activate
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.decoder_config import DecoderConfig
from mpjax.models.transformer.transformer import Parts, Transformer


class Pooler(Layer):
    """tanh(x_0 W + b) of the first token."""

    width: int

    @nn.compact
    def __call__(self, x_BTD: Any) -> Any:
        y = Linear(self.context, self.width, ("embed", None), True, name="dense")(x_BTD[:, 0])
        policy = self.policy("activation")
        return jnp.tanh(y.astype(policy.compute_dtype)).astype(policy.output_dtype)


class MeanPooler(Layer):
    """sum_t m_t x_t / sum_t m_t over the tokens that are no padding, summed in float32."""

    @nn.compact
    def __call__(self, x_BTD: Any, keep_BT: Any = None) -> Any:
        policy = self.policy()
        x = x_BTD.astype(policy.compute_dtype)
        keep = jnp.ones(x.shape[:2], bool) if keep_BT is None else keep_BT
        total = jnp.sum(jnp.where(keep[..., None], x, 0), 1, dtype=jnp.float32)
        count = jnp.maximum(jnp.sum(keep, 1, dtype=jnp.float32), 1)
        return (total / count[:, None]).astype(policy.output_dtype)


class TiedHead(Layer):
    """x E^T + b with the embedding's table E."""

    @nn.compact
    def __call__(self, x: Any, table_VD: Any) -> Any:
        transposed = functools.partial(ops.linear, transposed=True)
        y = self.multiply(x, table_VD, transposed)
        rows = (table_VD.shape[0],)
        bias = self.weight("bias", nn.initializers.zeros, rows, ("vocab",))
        return ops.shift_by(y, bias, self.gradient_dtype)


class MaskedHead(Layer):
    """Logits of tokens: dense, activation, norm, and the head, which may be the embedding."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Any, table_VD: Any) -> Any:
        c = self.config
        y = Linear(self.context, c.width, ("embed", None), True, name="dense")(x)
        policy = self.policy("activation")
        # A gate would need a second product: SwiGLU models take SiLU here.
        y = activate(c.activation, y.astype(policy.compute_dtype)).astype(policy.output_dtype)
        y = Norm(self.context, c.norm, c.bias, c.epsilon, name="norm")(y)
        if c.tied:
            return TiedHead(self.context, name="head")(y, table_VD)
        return Linear(self.context, c.vocabulary, ("embed", "vocab"), True, name="head")(y)


class ClassHead(Layer):
    """Logits of classes, with dropout before.

    Args:
      classes: C.
      dropout: rate.
    """

    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Linear(self.context, self.classes, ("embed", None), True, name="head")(x)


def next_token_head(config: DecoderConfig, at: At) -> Parts:
    """Returns the head of a decoder as a part; none where it is the transposed embedding."""
    if config.tied:
        return {}
    axes = ("embed", "vocab")
    head = Linear(at("head"), config.vocabulary, axes, config.head_bias, name="decoder/head")
    return {"head": (head, (jnp.zeros((1, 1, config.width)),))}


def unembed(decoder: Transformer, p: Any, x: Any, key: Any = None) -> Any:
    """Returns features as logits in the output dtype of `decoder/head`.

    Args:
      decoder: the Transformer that they come from.
      p: weights below `decoder`.
      x: features (..., D).
      key: of recipes that draw, or None.
    """
    head, _ = decoder.parts.get("head", (None, ()))
    return head_logits(head, decoder.at("head"), p, x, key)


def next_token_logits(decoder: Transformer, p: Any, x: Any, key: Any, cap: float) -> Any:
    """Returns the logits of `unembed`, or `cap tanh(logits / cap)` of them if cap > 0."""
    logits = unembed(decoder, p, x, key)
    return cap * jnp.tanh(logits / cap) if cap else logits


def next_token_loss(
    decoder: Transformer, config: DecoderConfig, p: Any, x: Any, batch: Any, key: Any, train: bool
) -> Any:
    """Returns the mean cross-entropy of a batch's `targets`, by its `weights` if it has any.

    Args:
      decoder: the Transformer that the features come from.
      config: shape.
      p: weights below `decoder`.
      x: features (B, T, D).
      batch: `targets` (B, T), and `weights` (B, T) if not all tokens count alike.
      key: of recipes that draw, or None.
      train: whether the z-loss is part of it.
    """
    c, context = config, decoder.at("loss")
    targets = targets_of(batch, x.shape[:2], context.prefix[0])
    B, T = targets.shape
    return ops.cross_entropy(
        x,
        targets,
        lambda x: unembed(decoder, p, x, key),
        context.policy(()),
        chunk=ops.chunk_length(B, T, c.vocabulary, c.loss_chunk),
        z_loss=c.z_loss if train else 0.0,  # a regulariser, not part of what is judged
        logit_cap=c.logit_cap,
        weights_BT=batch.get("weights"),
    )
