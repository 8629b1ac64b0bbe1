"""What an encoder's features are turned into: pooled, and logits of each kind."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.models.block import activate
from mpjax.models.block_config import BlockConfig
from mpjax.models.context import Layer
from mpjax.models.layers import Linear, Norm


class Pooler(Layer):
    """tanh(x_0 W + b) of the first token."""

    width: int

    @nn.compact
    def __call__(self, x_BTD: Any) -> Any:
        y = Linear(self.context, self.width, ("embed", None), True, name="dense")(x_BTD[:, 0])
        policy = self.policy("activation")
        return jnp.tanh(y.astype(policy.compute_dtype)).astype(policy.output_dtype)


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
