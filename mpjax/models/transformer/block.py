"""One Transformer block: attention, cross-attention where there is a source, and MLP.

Shapes: B batch, T tokens, S slots of the cache or tokens of the source, D width, H heads, G
key/value heads, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.models.core.layers import Linear, Norm
from mpjax.models.core.module import Layer
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.kv_cache import read, write

_LINEAR = 16.0  # from here on the tanh of GELU is 1 in float16, and GELU the identity


def _gelu(x: Any) -> Any:
    """GELU in its tanh form, with a finite gradient at all numbers of float16.

    There jax.nn.gelu's gradient is NaN from 148 on: inf, of the derivative of the cube, times the
    zero of tanh's.
    """
    if x.dtype != jnp.float16:
        return jax.nn.gelu(x, approximate=True)
    near = jax.nn.gelu(jnp.clip(x, -_LINEAR, _LINEAR), approximate=True)
    return jnp.where(x >= _LINEAR, x, near)


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": _gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
}


def activate(name: str, x: Any) -> Any:
    """Returns the nonlinearity of an activation by its name; that of a gated one is its gate's."""
    return _ACTIVATIONS[name](x)


class AttentionContext(NamedTuple):
    """Where the tokens of a call stand and what they see; the same in all blocks.

    Args:
      positions: of the tokens, (T,) or (B, T), for rotary positions.
      first: slot of the first token in the cache; 0 without one.
      keep_BS: which tokens, or slots of the cache, are no padding; None is all.
      source_BSD: what to attend across to; None is nothing, or what the cache knows already.
      keep_source_BS: which of it is no padding; None is all.
    """

    positions: Any
    first: Any = 0
    keep_BS: Any = None
    source_BSD: Any = None
    keep_source_BS: Any = None


class Attention(Layer):
    """Multi-head, grouped or multi-query attention.

    Args:
      config: shape.
      causal: whether tokens see none behind them.
      across: whether keys and values are those of the source.
    """

    config: BlockConfig
    causal: bool = True
    across: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Any, attention_context: AttentionContext, cache: Any = None
    ) -> tuple[Any, Any]:
        """Returns what the tokens take in, and the cache.

        Args:
          x_BTD: the tokens; None makes only the keys and values of the source.
          attention_context: where the tokens stand and what they attend to.
          cache: keys and values of earlier tokens, which those of these tokens join; across,
            those of the source, if they are known.
        """
        c = self.config
        source = attention_context.source_BSD if self.across else x_BTD

        def project(x: Any, name: str, heads: int, axis: str) -> Any:
            bias = c.bias or c.qkv_bias
            y = Linear(self.context, heads * c.per_head, ("embed", axis), bias, name=name)(x)
            return y.reshape(*x.shape[:2], heads, c.per_head)

        q = None if x_BTD is None else project(x_BTD, "query", c.heads, "heads")
        if source is None:
            k, v = read(cache[0]), read(cache[1])
        else:
            k = project(source, "key", c.groups, "kv")
            v = project(source, "value", c.groups, "kv")
        if c.qk_norm and q is not None:
            q = Norm(self.context, "rms", False, c.epsilon, name="norm_query")(q)
        if c.qk_norm and source is not None:
            k = Norm(self.context, "rms", False, c.epsilon, name="norm_key")(k)
        if q is None:
            return None, (k, v)
        if c.position == "rotary" and not self.across:  # two texts have no distance
            policy = self.policy("rotary")
            q, k = (
                ops.rotary(
                    x, attention_context.positions, policy, theta=c.rope_theta, scaling=c.rope
                )
                for x in (q, k)
            )
        if cache is not None and not self.across:
            cache = (
                write(cache[0], k, attention_context.first),
                write(cache[1], v, attention_context.first),
            )
            k, v = read(cache[0]), read(cache[1])
        out = ops.attention(
            q, k, v, self.policy(), self.policy("softmax"),
            first=0 if self.across else attention_context.first,
            causal=self.causal and not self.across,
            window=0 if self.across else c.window,
            keep_BS=attention_context.keep_source_BS if self.across else attention_context.keep_BS,
            kernel=c.kernel,
        )  # fmt: skip
        gain = (2 * c.layers) ** -0.5  # the residual stream keeps its variance over the depth
        out = out.reshape(*out.shape[:2], c.heads * c.per_head)
        return Linear(self.context, c.width, ("heads", "embed"), c.bias, gain, name="out")(
            out
        ), cache


class MLP(Layer):
    """GELU, ReLU or SwiGLU."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD: Any) -> Any:
        c = self.config
        policy = self.policy("activation")

        def widen(name: str) -> Any:
            y = Linear(self.context, c.hidden, ("embed", "mlp"), c.bias, name=name)(x_BTD)
            return y.astype(policy.compute_dtype)

        if c.activation == "swiglu":
            hidden = activate(c.activation, widen("gate")) * widen("up")
        else:
            hidden = activate(c.activation, widen("up"))
        hidden = hidden.astype(policy.output_dtype)
        gain = (2 * c.layers) ** -0.5
        return Linear(self.context, c.width, ("mlp", "embed"), c.bias, gain, name="down")(hidden)


class Block(Layer):
    """x + attention(norm(x)), then x + mlp(norm(x)); post-norm, norm(x + attention(x)) and so on.

    Args:
      config: shape.
      causal: whether tokens see none behind them.
      cross: whether they attend to a source in between.
    """

    config: BlockConfig
    causal: bool = True
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: Any,
        attention_context: AttentionContext,
        cache: Any = None,
        train: bool = False,
    ) -> tuple[Any, Any]:
        """Returns the features and the cache: keys and values, and across if there is a source."""
        c = self.config
        policy = self.policy("residual")

        def norm(name: str, x: Any) -> Any:
            return Norm(self.context, c.norm, c.bias, c.epsilon, name=name)(x)

        def before(name: str, x: Any) -> Any:
            return norm(f"norm_{name}", x) if c.norm_first else x

        def join(name: str, x: Any, branch: Any) -> Any:
            if c.dropout:
                branch = nn.Dropout(c.dropout, deterministic=not train)(branch)
            x = x.astype(policy.compute_dtype) + branch.astype(policy.compute_dtype)
            x = self.context.shard(x.astype(policy.output_dtype), ("batch", "length", "embed"))
            return x if c.norm_first else norm(f"norm_{name}", x)

        own: Any = None if cache is None else cache[:2]
        known = None if cache is None else cache[2:]
        attention = Attention(self.context, c, self.causal, name="attention")
        branch, own = attention(before("attention", x_BTD), attention_context, own)
        x_BTD = join("attention", x_BTD, branch)
        if self.cross:
            name = "cross_attention"
            across = Attention(self.context, c, across=True, name=name)
            branch, _ = across(before(name, x_BTD), attention_context, known)
            x_BTD = join(name, x_BTD, branch)
        x_BTD = join("mlp", x_BTD, MLP(self.context, c, name="mlp")(before("mlp", x_BTD)))
        return x_BTD, None if cache is None else own + cache[2:]
