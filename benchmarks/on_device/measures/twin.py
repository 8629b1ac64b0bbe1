"""The decoder of part b as a careful person writes it in plain JAX for bfloat16.

Scanned blocks, each cast by hand, products whose weight gradients leave in float32, cuDNN's
attention on a GPU; RMSNorm, rotary positions, grouped queries, SwiGLU, a head of its own. It
computes what ours does under `bf16`; `experiments/bench_step.py` compares the programs of two such
twins cast by cast, this one is for time.

Shapes: B batch, T tokens, N = B T, D width, H heads, G key and value heads, K head width.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from common import bare_step

LOW = jnp.bfloat16


def dot(a: Any, b: Any, i: int, j: int, out: Any) -> Any:
    """2-D product over axis i of a and j of b."""
    return lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=out)


def linear(out: Any) -> Any:
    """Returns `x @ w` with x in bfloat16, w float32, and a float32 gradient of w."""

    @jax.custom_vjp
    def multiply(x: Any, w: Any) -> Any:
        return dot(x, w.astype(LOW), 1, 0, out)

    def backward(kept: Any, dy: Any) -> Any:
        x, w = kept
        dy = dy.astype(LOW)
        return dot(dy, w.astype(LOW), 1, 1, LOW), dot(x, dy, 0, 0, jnp.float32)

    multiply.defvjp(lambda x, w: (multiply(x, w), (x, w)), backward)
    return multiply


def norm(x: Any, scale: Any, epsilon: float) -> Any:
    """RMSNorm in float32, of and to bfloat16."""
    wide = x.astype(jnp.float32)  # a mean of squares in bfloat16 loses its small terms
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(LOW)


def rotate(x: Any, theta: float) -> Any:
    """Rotary positions, in float32, of and to bfloat16."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(LOW)


def make_loss(config: Any) -> Any:
    """Returns `loss(params, batch)`; params as ours, below `decoder`."""
    c = config
    H, G, K, D = c.heads, c.groups, c.per_head, c.width
    multiply, unembed = linear(LOW), linear(jnp.float32)
    fused: Literal["cudnn", "xla"] = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def loss(params: Any, batch: Any) -> Any:
        p, ids = params["decoder"], batch["inputs"]
        B, T = ids.shape

        def block(x_BTD: Any, w: Any) -> Any:
            y = norm(x_BTD, w["norm_attention"]["scale"], c.epsilon).reshape(B * T, D)
            q, k, v = (
                multiply(y, w["attention"][name]["kernel"]).reshape(B, T, heads, K)
                for name, heads in (("query", H), ("key", G), ("value", G))
            )
            q, k = rotate(q, c.rope_theta), rotate(k, c.rope_theta)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=fused)
            y = multiply(y.reshape(B * T, H * K), w["attention"]["out"]["kernel"])
            x_BTD = x_BTD + y.reshape(B, T, D)
            y = norm(x_BTD, w["norm_mlp"]["scale"], c.epsilon).reshape(B * T, D)
            y = jax.nn.silu(multiply(y, w["mlp"]["gate"]["kernel"])) * multiply(
                y, w["mlp"]["up"]["kernel"]
            )
            return x_BTD + multiply(y, w["mlp"]["down"]["kernel"]).reshape(B, T, D), None

        x = jnp.take(p["embed"]["table"], ids, axis=0).astype(LOW)
        x, _ = lax.scan(block, x, p["layers"])
        x = norm(x, p["norm"]["scale"], c.epsilon).reshape(B * T, D)
        logits = unembed(x, p["head"]["kernel"])
        targets = batch["targets"].reshape(-1, 1)
        hit = jnp.take_along_axis(logits, targets, -1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - hit)

    return loss


def make_step(config: Any, learning_rate: float, clip: float) -> tuple[Any, Any]:
    """Returns the compiled step (state, batch) -> (state, loss), and params -> state."""
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(learning_rate))
    return bare_step.make_step(make_loss(config), optimizer)
