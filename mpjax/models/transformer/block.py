"""One Transformer block: attention, cross-attention where there is a source, and MLP.

Shapes: B batch, T tokens, S slots of the cache or tokens of the source, D width, H heads, G
key/value heads, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.models.core.layers import Linear, Norm
from mpjax.models.core.module import Layer, parts_of, save_input, unsharded
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.kv_cache import Cache, read, write
from mpjax.typing import Array, Shard

# a part of attention -> the name of what it gives, see `TransformerNetwork.collect`
_PROJECTIONS = {"query": "queries", "key": "keys", "value": "values"}

_LINEAR = 16.0  # from here on GELU is the identity in float16


def _gelu(x: Array) -> Array:
    """GELU in its tanh form, with a finite gradient at all float16 numbers.

    That of jax.nn.gelu is NaN from 148 on: the derivative of the cube, inf, times that of tanh, 0.
    """
    if x.dtype != jnp.float16:
        return jax.nn.gelu(x, approximate=True)
    near = jax.nn.gelu(jnp.clip(x, -_LINEAR, _LINEAR), approximate=True)
    return jnp.where(x >= _LINEAR, x, near)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
}


def activate(name: str, x: Array) -> Array:
    """Returns the nonlinearity of an activation by its name; that of a gated one is its gate's."""
    return _ACTIVATIONS[name](x)


class AttentionContext(NamedTuple):
    """Positions of the tokens of a call and what they attend to; the same in all blocks.

    Args:
      positions: of the tokens, (T,) or (B, T), for rotary positions; None where none are used.
      first: slot of the first token in the cache; 0 without one.
      keep_BS: which tokens, or slots of the cache, are no padding; None is all.
      segments_BT: number of the document that a token is of and attends to; None is one a row.
      source_BSD: input of cross-attention; None if there is none or the cache holds its keys.
      keep_source_BS: which of it is no padding; None is all.
    """

    positions: Array | None
    first: Array | int = 0
    keep_BS: Array | None = None
    source_BSD: Array | None = None
    keep_source_BS: Array | None = None
    segments_BT: Array | None = None


def split_heads(shard: Shard, heads: int, groups: int) -> ops.Split | None:
    """Returns how a kernel of attention runs on each device's part; None where it cannot.

    A mesh that cuts the heads of queries and not those of keys would part a query from its key.
    """
    if shard is unsharded:
        return ops.whole
    split = getattr(shard, "split", None)  # a constraint of one's own has none
    if split is None or parts_of(shard, "heads", heads) != parts_of(shard, "kv", groups):
        return None
    tokens = ("batch", None)
    axes = [("batch", name, None, None) for name in ("heads", "kv", "kv")] + [tokens, tokens]

    def parts(function: Callable[..., Array], *arrays: Array) -> Array:
        return split(function, axes[: len(arrays)], *arrays)

    return parts


class Attention(Layer):
    """Multi-head, grouped or multi-query attention.

    Args:
      config: shape.
      causal: whether tokens attend to no later ones.
      across: whether keys and values are those of the source.
    """

    config: BlockConfig
    causal: bool = True
    across: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array | None, context: AttentionContext, cache: Cache = ()
    ) -> tuple[Array | None, Cache]:
        """Returns the output (B, T, D) and the cache.

        Args:
          x_BTD: the tokens; None makes only the keys and values of the source.
          context: positions of the tokens and what they attend to.
          cache: keys and values, joined by those of the tokens; across, those of the source.
        """
        c = self.config
        source = context.source_BSD if self.across else x_BTD

        def project(x: ops.Saved, name: str, heads: int, axis: str) -> Array:
            bias = c.bias or c.qkv_bias
            y = Linear(self.context, heads * c.per_head, ("embed", axis), bias, name=name)(x)
            self.keep(_PROJECTIONS[name], y)
            return y.reshape(*y.shape[:2], heads, c.per_head)

        own = None if x_BTD is None else save_input(self, x_BTD, "query")
        q = None if own is None else project(own, "query", c.heads, "heads")
        if source is None:
            k, v = read(cache[0]), read(cache[1])
        else:
            # All layers share the array of the source; each would keep a narrow one of its own.
            told = ops.Saved(source) if own is None or self.across else own
            k = project(told, "key", c.groups, "kv")
            v = project(told, "value", c.groups, "kv")
        if c.qk_norm and q is not None:
            q = Norm(self.context, "rms", False, c.epsilon, name="norm_query")(q)
        if c.qk_norm and source is not None:
            k = Norm(self.context, "rms", False, c.epsilon, name="norm_key")(k)
        if q is None:
            return None, (k, v)
        if c.position == "rotary" and not self.across:  # two texts have no distance
            policy = self.policy("rotary")
            assert context.positions is not None
            turn = functools.partial(
                ops.rotary, positions=context.positions, theta=c.rope_theta, scaling=c.rope
            )
            q, k = turn(q, policy=policy), turn(k, policy=policy)
        if cache and not self.across:
            cache = write(cache[0], k, context.first), write(cache[1], v, context.first)
            k, v = read(cache[0]), read(cache[1])
        policy, softmax = self.policy(), self.policy("softmax")

        def attend(
            q: Array, k: Array, v: Array, first: Array | int, keep: Array | None,
            segments: Array | None,
        ) -> Array:  # fmt: skip
            return ops.attention(
                q, k, v, policy, softmax, first=first, causal=self.causal and not self.across,
                window=0 if self.across else c.window, keep_BS=keep, segments_BT=segments,
                kernel=c.kernel, split=split_heads(self.context.shard, c.heads, c.groups),
            )  # fmt: skip

        out = ops.from_saved(
            attend, tuple(save_input(self, x) for x in (q, k, v)),
            0 if self.across else context.first,
            context.keep_source_BS if self.across else context.keep_BS,
            None if self.across else context.segments_BT,
        )  # fmt: skip
        gain = (2 * c.layers) ** -0.5  # keeps the variance of the residual stream over the depth
        out = out.reshape(*out.shape[:2], c.heads * c.per_head)
        project_out = Linear(self.context, c.width, ("heads", "embed"), c.bias, gain, name="out")
        return project_out(save_input(self, out, "out", "heads")), cache


class MLP(Layer):
    """GELU, ReLU or SwiGLU."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        names = ("gate", "up") if c.activation == "swiglu" else ("up",)
        policy, x = self.policy("activation"), save_input(self, x_BTD, names[0])

        def widen(name: str) -> ops.Saved:
            y = Linear(self.context, c.hidden, ("embed", "mlp"), c.bias, name=name)(x)
            return save_input(self, y.astype(policy.compute_dtype), axis="mlp")

        def activated(gate: Array, *up: Array) -> Array:
            hidden = activate(c.activation, gate)
            return (hidden * up[0] if up else hidden).astype(policy.output_dtype)

        hidden = save_input(
            self, ops.from_saved(activated, tuple(map(widen, names))), "down", "mlp"
        )
        gain = (2 * c.layers) ** -0.5
        return Linear(self.context, c.width, ("mlp", "embed"), c.bias, gain, name="down")(hidden)


class Block(Layer):
    """x + attention(norm(x)), then x + mlp(norm(x)); post-norm, norm(x + attention(x)) and so on.

    Args:
      config: shape.
      causal: whether tokens attend to no later ones.
      cross: whether there is cross-attention between the two.
    """

    config: BlockConfig
    causal: bool = True
    cross: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: AttentionContext, cache: Cache = (),
        train: bool = False,
    ) -> tuple[Array, Cache]:  # fmt: skip
        """Returns the features and the cache: keys and values, and across if there is a source."""
        c = self.config
        policy = self.policy("residual")

        def norm(name: str, x: Array, here: bool) -> Array:
            if not here:
                return x
            return Norm(self.context, c.norm, c.bias, c.epsilon, name=f"norm_{name}")(x)

        def join(name: str, x: Array, branch: Array | None) -> Array:
            assert branch is not None  # it is for a source alone
            if c.dropout:
                branch = nn.Dropout(c.dropout, deterministic=not train)(branch)
            x = x.astype(policy.compute_dtype) + branch.astype(policy.compute_dtype)
            x = self.context.shard(x.astype(policy.output_dtype), ("batch", "length", "embed"))
            return norm(name, x, not c.norm_first)

        own, known = cache[:2], cache[2:]
        name = "attention"
        attention = Attention(self.context, c, self.causal, name=name)
        branch, own = attention(norm(name, x_BTD, c.norm_first), context, own)
        x_BTD = join(name, x_BTD, branch)
        if self.cross:
            name = "cross_attention"
            across = Attention(self.context, c, across=True, name=name)
            branch, _ = across(norm(name, x_BTD, c.norm_first), context, known)
            x_BTD = join(name, x_BTD, branch)
        mlp = MLP(self.context, c, name="mlp")
        x_BTD = join("mlp", x_BTD, mlp(norm("mlp", x_BTD, c.norm_first)))
        self.keep("hidden", x_BTD)
        return x_BTD, own + known
