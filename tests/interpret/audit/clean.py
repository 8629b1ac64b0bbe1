"""Small models whose products are all low: an audit must report no leak in them.

Shapes: B batch, T tokens, D width, K head width, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mpjax.interpret import autocast
from tests.interpret.audit.leaky import IDS, LOW, B, D, T, V, X, rms, softmax, wide
from tests.models.shapes import BATCH, small

L = 3
Clean = tuple[Callable[..., Any], tuple[Any, ...]]


def our_decoder(kind: str) -> Clean:
    """Ours, loss and gradient."""
    model = small("bf16", kind, loss_chunk=4)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.value_and_grad(lambda p: model.loss(p, BATCH)[0]), (params,)


def bare_transformer() -> Clean:
    """Rotary attention and a gated MLP in scan(remat), float32 weights cast at use."""
    angle = jnp.arange(T, dtype=jnp.float32)[:, None] * 0.01 ** jnp.linspace(0, 1, D // 2)[None]
    cos, sin = jnp.cos(angle).astype(LOW), jnp.sin(angle).astype(LOW)

    def rotate(x: Any) -> Any:
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    @jax.checkpoint
    def layer(x: Any, p: Any) -> Any:
        p = jax.tree.map(lambda w: w.astype(LOW), p)
        h = rms(x)
        q, k = rotate(h @ p["q"]), rotate(h @ p["k"])
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), jnp.einsum("btd,bsd->bts", q, k), -1e9)
        x = x + jnp.einsum("bts,bsd->btd", softmax(scores), h)
        return x + jax.nn.silu(rms(x) @ p["q"]) * (x @ p["k"]), None

    def loss(p: Any, ids: Any) -> Any:
        x = p["table"][ids].astype(LOW)
        x = lax.scan(layer, x, p["layers"])[0]
        logits = (x @ p["table"].T.astype(LOW)).astype(jnp.float32)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    params = {"table": wide(V, D), "layers": {"q": wide(L, D, D), "k": wide(L, D, D)}}
    return jax.jit(jax.grad(loss)), (params, IDS)


def linen_encoder() -> Clean:
    """Flax Linen: Dense, LayerNorm and Embed with their dtype set, softmax in float32."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.LayerNorm(dtype=LOW)(x)
            q, k, v = (nn.Dense(D, dtype=LOW, name=name)(h) for name in "qkv")
            x = x + jnp.einsum("bts,bsd->btd", softmax(jnp.einsum("btd,bsd->bts", q, k)), v)
            h = nn.gelu(nn.Dense(2 * D, dtype=LOW)(nn.RMSNorm(dtype=LOW)(x)))
            return x + nn.Dense(D, dtype=LOW)(h)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, ids: Any) -> Any:
            x = nn.Embed(V, D, dtype=LOW)(ids)
            for _ in range(2):
                x = nn.remat(Block)()(x)
            return nn.Dense(V, dtype=LOW)(x).astype(jnp.float32)

    model = Encoder()
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)
    return jax.grad(lambda p, ids: jnp.mean(jnp.square(model.apply(p, ids)))), (params, IDS)


def linen_convolutions() -> Clean:
    """Flax Linen: convolutions and GroupNorm of float32 images."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.GroupNorm(4, dtype=LOW)(nn.Conv(D, (3,), dtype=LOW)(x)))
            x = nn.Conv(D, (3,), strides=2, dtype=LOW)(x)
            return nn.Dense(4, dtype=LOW)(jnp.mean(x, axis=1)).astype(jnp.float32)

    model = Net()
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    return jax.grad(lambda p, x: jnp.sum(model.apply(p, x))), (params, wide(B, T, D))


def autocast_function() -> Clean:
    """A float32 function under autocast, gradient outside."""

    def loss(p: Any, x: Any) -> Any:
        h = jax.nn.gelu(x @ p["up"] + p["bias"][None, None])
        scores = jnp.einsum("btd,bsd->bts", h, h) * D**-0.5
        return jnp.mean(jnp.square(jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), h)))

    params = {"up": wide(D, D), "bias": wide(D)}
    return jax.grad(autocast(loss, "bf16")), (params, wide(B, T, D))


def object_with_experts() -> Clean:
    """Functional state of an object: routing by one-hot in float16, then an SGD step."""

    class Experts:
        def __init__(self, params: Any) -> None:
            self.params = params

        def __call__(self, x: Any, chosen: Any) -> Any:
            with jax.named_scope("experts"):
                gate = jax.nn.one_hot(chosen, 4, dtype=x.dtype)
                y = jnp.einsum("btd,edf->btef", x, self.params["w"].astype(x.dtype))
                return jnp.einsum("bte,btef->btf", gate, y)

    def step(params: Any, x: Any, chosen: Any) -> Any:
        def loss(p: Any) -> Any:
            return jnp.mean(Experts(p)(x, chosen).astype(jnp.float32) ** 2)

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    x = jax.ShapeDtypeStruct((B, T, D), jnp.float16)
    return step, ({"w": wide(4, D, D)}, x, IDS)


CLEAN: dict[str, Callable[[], Clean]] = {
    "our decoder, LLaMA": lambda: our_decoder("llama"),
    "our decoder, GPT": lambda: our_decoder("gpt"),
    "bare transformer": bare_transformer,
    "Linen encoder": linen_encoder,
    "Linen convolutions": linen_convolutions,
    "autocast": autocast_function,
    "object with experts": object_with_experts,
}
