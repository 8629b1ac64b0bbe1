"""One Transformer twice: as written in float32, and with autocast's casting decisions by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax.interpret.core.walk import equations


class Size(NamedTuple):
    """Sizes of the model and its batch.

    Args:
      layers: blocks, unrolled.
      width: of the residual stream.
      heads: of attention.
      words: of the vocabulary.
      batch: sequences.
      tokens: of a sequence.
    """

    layers: int = 12
    width: int = 64
    heads: int = 4
    words: int = 256
    batch: int = 2
    tokens: int = 16


def init(size: Size) -> Any:
    """Weights, float32."""
    D = size.width
    shapes = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, 4 * D)}
    shapes |= {"down": (4 * D, D)}
    key = jax.random.key(0)

    def draw(index: int, shape: tuple[int, ...]) -> Any:
        return jax.random.normal(jax.random.fold_in(key, index), shape) / shape[0] ** 0.5

    layers = [
        {name: draw(10 * layer + i, shape) for i, (name, shape) in enumerate(shapes.items())}
        | {"norm1": jnp.ones(D), "norm2": jnp.ones(D)}
        for layer in range(size.layers)
    ]
    return {"embed": 0.02 * draw(10**6, (size.words, D)), "layers": layers}


def batch(size: Size) -> Any:
    """Token ids."""
    return jax.random.randint(jax.random.key(1), (size.batch, size.tokens), 0, size.words)


def plain(size: Size) -> Callable[[Any, Any], Any]:
    """The loss as a user of float32 writes it."""
    T, H = size.tokens, size.heads

    def norm(x: Any, scale: Any) -> Any:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale[None, None]

    def loss(params: Any, ids: Any) -> Any:
        x = params["embed"][ids]
        mask = jnp.tril(jnp.ones((T, T), bool))[None, None]
        for p in params["layers"]:
            h = norm(x, p["norm1"])
            q, k, v = ((h @ p[n]).reshape(-1, T, H, size.width // H) for n in "qkv")
            scores = jnp.einsum("bthd,bshd->bhts", q, k) / (size.width // H) ** 0.5
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
            x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(-1, T, size.width) @ p["o"]
            x = x + jax.nn.gelu(norm(x, p["norm2"]) @ p["up"]) @ p["down"]
        log_p = jax.nn.log_softmax(x @ params["embed"].T)
        return -jnp.take_along_axis(log_p, ids[..., None], -1).mean()

    return loss


def by_hand(size: Size) -> Callable[[Any, Any], Any]:
    """The same with each cast written where autocast puts one."""
    T, H = size.tokens, size.heads
    low = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    full = lambda x: x.astype(jnp.float32)  # noqa: E731

    def norm(x: Any, scale: Any) -> Any:
        return low(x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale[None, None])

    def loss(params: Any, ids: Any) -> Any:
        x = params["embed"][ids]
        mask = jnp.tril(jnp.ones((T, T), bool))[None, None]
        for p in params["layers"]:
            h = norm(x, p["norm1"])
            q, k, v = ((h @ low(p[n])).reshape(-1, T, H, size.width // H) for n in "qkv")
            scores = jnp.einsum("bthd,bshd->bhts", q, k) / (size.width // H) ** 0.5
            weights = low(jax.nn.softmax(full(jnp.where(mask, scores, -1e9))))
            heads = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(-1, T, size.width)
            x = x + full(heads @ low(p["o"]))
            x = x + full(jax.nn.gelu(norm(x, p["norm2"]) @ low(p["up"])) @ low(p["down"]))
        log_p = jax.nn.log_softmax(full(low(x) @ low(params["embed"]).T))
        return -jnp.take_along_axis(log_p, ids[..., None], -1).mean()

    return loss


def counts(fn: Callable[..., Any], *args: Any) -> Counter[str]:
    """Products by operand dtype, and casts between floating-point dtypes, of a program."""
    found: Counter[str] = Counter()
    for site in equations(jax.make_jaxpr(fn)(*args)):
        name, operand = site.eqn.primitive.name, site.eqn.invars[0].aval if site.eqn.invars else 0
        if name == "dot_general":
            found[f"product of {operand.dtype.name}"] += 1
        elif name == "convert_element_type" and jnp.issubdtype(operand.dtype, jnp.floating):
            found["casts"] += 1
    return found
