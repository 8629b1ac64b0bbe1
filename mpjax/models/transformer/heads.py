"""The encoder's heads: poolers, and the logits of tokens and classes."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.models.core.layers import Linear, Norm
from mpjax.models.core.module import Layer
from mpjax.models.transformer.block import activate
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.typing import Array


class Pooler(Layer):
    """tanh(x_0 W + b) of the first token."""

    width: int

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        y = Linear(self.context, self.width, ("embed", None), True, name="dense")(x_BTD[:, 0])
        policy = self.policy("activation")
        return jnp.tanh(y.astype(policy.compute_dtype)).astype(policy.output_dtype)


class MeanPooler(Layer):
    """sum_t m_t x_t / sum_t m_t over the tokens that are no padding, summed in float32."""

    @nn.compact
    def __call__(self, x_BTD: Array, keep_BT: Array | None = None) -> Array:
        policy = self.policy()
        x = x_BTD.astype(policy.compute_dtype)
        keep = jnp.ones(x.shape[:2], bool) if keep_BT is None else keep_BT
        total = jnp.sum(jnp.where(keep[..., None], x, 0), 1, dtype=jnp.float32)
        count = jnp.maximum(jnp.sum(keep, 1, dtype=jnp.float32), 1)
        return (total / count[:, None]).astype(policy.output_dtype)


class TiedHead(Layer):
    """x E^T + b with the embedding's table E."""

    @nn.compact
    def __call__(self, x: Array, table_VD: Array) -> Array:
        y = self.multiply(x, table_VD, functools.partial(ops.linear, transposed=True))
        bias = self.weight("bias", nn.initializers.zeros, table_VD.shape[:1], ("vocab",))
        return ops.shift_by(y, bias, self.gradient_dtype)


class MaskedHead(Layer):
    """Logits of tokens: dense, activation, norm, and the head, which may be the embedding."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Array, table_VD: Array) -> Array:
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
      classes: their number C.
      dropout: rate.
    """

    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Linear(self.context, self.classes, ("embed", None), True, name="head")(x)


class TaskHeads(Layer):
    """The logits of several tasks by name, each of a head of its own.

    Args:
      heads: name -> `token` or `class`, and the classes.
      dropout: rate.
    """

    heads: tuple[tuple[str, tuple[str, int]], ...]
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x_BTD: Array, pooled_BD: Array | None, train: bool = False
    ) -> dict[str, Array]:
        of: Any = {"token": x_BTD, "class": pooled_BD}  # None where no head reads it
        return {
            name: ClassHead(self.context, classes, self.dropout, name=name)(of[kind], train)
            for name, (kind, classes) in self.heads
        }
