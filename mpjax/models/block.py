"""One Transformer block: attention and MLP, each behind its norm.

Shapes: B batch, T tokens, S cache length, D width, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from mpjax import ops
from mpjax.models.config import DecoderConfig
from mpjax.models.context import Layer
from mpjax.models.layers import Linear, Norm


class Attention(Layer):
    """Multi-head, grouped or multi-query causal self-attention."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Any, positions_T: Any, cache: Any) -> tuple[Any, Any]:
        c = self.config
        B, T, _ = x_BTD.shape

        def project(name: str, heads: int, axis: str) -> Any:
            linear = Linear(self.context, heads * c.head_width, ("embed", axis), c.bias, name=name)
            return linear(x_BTD).reshape(B, T, heads, c.head_width)

        q = project("query", c.heads, "heads")
        k = project("key", c.groups, "kv")
        v = project("value", c.groups, "kv")
        if c.qk_norm:
            q = Norm(self.context, "rms", False, c.epsilon, name="norm_query")(q)
            k = Norm(self.context, "rms", False, c.epsilon, name="norm_key")(k)
        if c.position == "rotary":
            policy = self.policy("rotary")
            q = ops.rotary(q, positions_T, policy, theta=c.rope_theta)
            k = ops.rotary(k, positions_T, policy, theta=c.rope_theta)
        first: Any = 0
        if cache is not None:
            first = positions_T[0]
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, first, 0, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, first, 0, 0))
            cache = (k, v)
        out = ops.attention(
            q, k, v, self.policy(), self.policy("softmax"), first=first, kernel=c.kernel
        )
        gain = (2 * c.layers) ** -0.5  # the residual stream keeps its variance over the depth
        out = out.reshape(B, T, c.heads * c.head_width)
        return Linear(self.context, c.width, ("heads", "embed"), c.bias, gain, name="out")(
            out
        ), cache


class MLP(Layer):
    """GELU or SwiGLU."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD: Any) -> Any:
        c = self.config
        policy = self.policy("activation")

        def widen(name: str) -> Any:
            y = Linear(self.context, c.hidden, ("embed", "mlp"), c.bias, name=name)(x_BTD)
            return y.astype(policy.compute_dtype)

        if c.activation == "swiglu":
            hidden = jax.nn.silu(widen("gate")) * widen("up")
        else:
            hidden = jax.nn.gelu(widen("up"), approximate=True)
        hidden = hidden.astype(policy.output_dtype)
        gain = (2 * c.layers) ** -0.5
        return Linear(self.context, c.width, ("mlp", "embed"), c.bias, gain, name="down")(hidden)


class Block(Layer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BTD: Any, positions_T: Any, cache: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        c = self.config
        policy = self.policy("residual")

        def join(x: Any, branch: Any) -> Any:
            if c.dropout:
                branch = nn.Dropout(c.dropout, deterministic=not train)(branch)
            x = x.astype(policy.compute_dtype) + branch.astype(policy.compute_dtype)
            return self.context.shard(x.astype(policy.output_dtype), ("batch", "length", "embed"))

        def norm(name: str) -> Norm:
            return Norm(self.context, c.norm, c.bias, c.epsilon, name=name)

        branch, cache = Attention(self.context, c, name="attention")(
            norm("norm_attention")(x_BTD), positions_T, cache
        )
        x_BTD = join(x_BTD, branch)
        x_BTD = join(x_BTD, MLP(self.context, c, name="mlp")(norm("norm_mlp")(x_BTD)))
        return x_BTD, cache
