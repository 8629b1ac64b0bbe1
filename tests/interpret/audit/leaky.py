"""Small models with one planted float32 leak each; the planted statement is marked `# leak: NAME`.

Shapes: B batch, T tokens, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec

LOW = jnp.bfloat16
B, T, D, V = 2, 8, 16, 32
TABLE = np.linspace(0.5, 1.5, D, dtype=np.float32)
HALF = np.float32(0.5)
X = jax.ShapeDtypeStruct((B, T, D), LOW)
IDS = jax.ShapeDtypeStruct((B, T), jnp.int32)
W = jax.ShapeDtypeStruct((D, D), LOW)


@dataclasses.dataclass(frozen=True)
class Plant:
    """A function of weights and data with a leak.

    Args:
      fn: it; returns an array.
      weights: its first argument, shapes only.
      data: the others.
      mechanism: that the audit should name.
      gradient: whether only the gradient leaks.
    """

    fn: Callable[..., Any]
    weights: Any
    data: tuple[Any, ...]
    mechanism: str
    gradient: bool = False


PLANTS: dict[str, Plant] = {}


def plant(mechanism: str, weights: Any = W, *data: Any, gradient: bool = False) -> Any:
    """Registers a function as a plant under its name."""

    def register(fn: Any) -> Any:
        PLANTS[fn.__name__] = Plant(fn, weights, data or (X,), mechanism, gradient)
        return fn

    return register


def line_of(name: str, what: str = "leak") -> str:
    """`file:line` of the statement that plants a leak."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {what}: {name}")]
    return f"{__file__}:{number}"


def wide(*shape: int) -> Any:
    """A float32 argument."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def softmax(x: Any) -> Any:
    """In float32, cast back."""
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(LOW)


def rms(x: Any) -> Any:
    """In float32, cast back."""
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)).astype(LOW)


# --- bare JAX


@plant("constant")
def constant_array(w: Any, x: Any) -> Any:
    h = rms(x @ w)
    h = h * TABLE  # leak: constant_array
    return h @ w


@plant("number")
def numpy_scalar(w: Any, x: Any) -> Any:
    scores = jnp.einsum("btd,bsd->bts", x, x @ w)
    scores = scores * HALF  # leak: numpy_scalar
    return jnp.einsum("bts,bsd->btd", scores, x)


@plant("made")
def mask(w: Any, x: Any) -> Any:
    causal = jnp.where(jnp.tril(jnp.ones((T, T), bool)), 0.0, jnp.full((T, T), -1e9, jnp.float32))
    scores = jnp.einsum("btd,bsd->bts", x @ w, x)
    scores = scores + causal  # leak: mask
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, axis=-1), x)


@plant("cast", {"scale": jax.ShapeDtypeStruct((D,), LOW), "up": W, "down": W})
def forgetful_norm(params: Any, x: Any) -> Any:
    def norm(x: Any) -> Any:
        y = x.astype(jnp.float32)  # leak: forgetful_norm
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return y * params["scale"]

    return x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]


@plant("made")
def rope_table(w: Any, x: Any) -> Any:
    position = jnp.arange(T, dtype=jnp.float32)[:, None]  # origin: rope_table
    angle = position * 0.01 ** jnp.arange(0, 1, 2 / D)[None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x @ w, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin  # leak: rope_table
    q = jnp.concatenate([a, b], axis=-1)
    return jnp.einsum("btd,bsd->bts", q, q)


@plant("product")
def preferred_result(w: Any, x: Any) -> Any:
    dims = (((2,), (0,)), ((), ()))
    h = lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)  # leak: preferred_result
    return jax.nn.relu(h) @ w


@plant("argument", {"w": W, "bias": wide(D)})
def float32_bias(params: Any, x: Any) -> Any:
    h = x @ params["w"]
    h = h + params["bias"]  # leak: float32_bias
    return jax.nn.silu(h) @ params["w"]


@plant("made", W, X, jax.ShapeDtypeStruct((2,), jnp.uint32))
def dropout_scale(w: Any, x: Any, key: Any) -> Any:
    keep = jax.random.bernoulli(key, 0.9, x.shape)
    h = (x @ w) * (keep.astype(jnp.float32) / 0.9)  # leak: dropout_scale
    return h @ w


@plant("cast", (W, W))
def float32_residual(weights: Any, x: Any) -> Any:
    stream = x.astype(jnp.float32)  # leak: float32_residual
    for w in weights:
        stream = stream + jax.nn.relu(stream @ w)
    return stream


@plant("argument", {"table": wide(V, D), "q": W, "k": W}, IDS)
def float32_embedding(params: Any, ids: Any) -> Any:
    h = params["table"][ids]  # leak: float32_embedding
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    return jnp.einsum("btd,bsd->bts", h @ params["q"], h @ params["k"])


@plant("cast")
def wide_probabilities(w: Any, x: Any) -> Any:
    q = x @ w
    scores = jnp.einsum("btd,bsd->bts", q, q).astype(jnp.float32)  # leak: wide_probabilities
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, axis=-1), x)


@plant("made", W, X)
def scan_carry(w: Any, x: Any) -> Any:
    start = jnp.zeros((B, D))  # origin: scan_carry

    def cell(carry: Any, x_BD: Any) -> Any:
        carry = 0.9 * carry + x_BD  # leak: scan_carry
        return carry, (carry @ w).astype(LOW)

    return lax.scan(cell, start, jnp.swapaxes(x, 0, 1))[1]


@jax.custom_vjp
def _gate(x: Any) -> Any:
    return _gate_fwd(x)[0]


def _gate_fwd(x: Any) -> Any:
    y = jax.nn.sigmoid(x.astype(jnp.float32))  # leak: custom_rule
    return y, (x, y)


_gate.defvjp(_gate_fwd, lambda kept, dy: ((dy * kept[1] * (1 - kept[1])).astype(kept[0].dtype),))


@plant("cast")
def custom_rule(w: Any, x: Any) -> Any:
    return _gate(x @ w) @ w


@plant("argument", {"w": W, "position": wide(T, D)})
def positional_table(params: Any, x: Any) -> Any:
    x = x + params["position"]  # leak: positional_table
    return jax.nn.relu(x @ params["w"]) @ params["w"]


@plant("made")
def wide_branch(w: Any, x: Any) -> Any:
    h = x @ w
    h = jnp.where(h > 0, h, jnp.zeros(h.shape))  # leak: wide_branch
    return h @ w


@plant("constant", jax.ShapeDtypeStruct((3, D, D), LOW), X)
def convolution(kernel: Any, x: Any) -> Any:
    dims = ("NWC", "WIO", "NWC")
    x = lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=dims)
    x = x - TABLE  # leak: convolution
    kernel = kernel.astype(x.dtype)
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=dims)


@plant("cast")
def one_branch(w: Any, x: Any) -> Any:
    def up(h: Any) -> Any:
        return 2 * h.astype(jnp.float32)  # leak: one_branch

    h = lax.cond(x[0, 0, 0] > 0, up, lambda h: jnp.zeros(h.shape, jnp.float32), x @ w)
    return h @ w


@plant("made")
def loop_accumulator(w: Any, x: Any) -> Any:
    def add(i: Any, total: Any) -> Any:
        return total + x[:, i]  # leak: loop_accumulator

    return lax.fori_loop(0, T, add, jnp.zeros((B, D))) @ w


@plant("cotangent", gradient=True)
def wide_scores(w: Any, x: Any) -> Any:
    q = x @ w
    s = jnp.einsum("btd,bsd->bts", q, q, preferred_element_type=jnp.float32)  # leak: wide_scores
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(s, axis=-1).astype(LOW), x)


@jax.custom_vjp
def _linear(x: Any, w: Any) -> Any:
    return x @ w


def _linear_bwd(kept: Any, dy: Any) -> Any:
    x, w = kept
    dy = dy.astype(jnp.float32)
    dx = jnp.einsum("btf,df->btd", dy, w)
    return dx.astype(x.dtype), jnp.einsum("btd,btf->df", x, dy).astype(w.dtype)


_linear.defvjp(lambda x, w: (_linear(x, w), (x, w)), _linear_bwd)


@plant("cast", gradient=True)
def backward_rule(w: Any, x: Any) -> Any:
    # JAX gives every operation of a backward rule the line that calls the function.
    return _linear(jax.nn.relu(x @ w), w)  # leak: backward_rule


@plant("argument", {"w": jax.ShapeDtypeStruct((3, D, D), LOW), "gain": wide(3, D)})
def layer_scale(params: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(x: Any, p: Any) -> Any:
        h = rms(x @ p["w"])
        h = h * p["gain"]  # leak: layer_scale
        return (h @ p["w"]).astype(LOW), None

    return lax.scan(layer, x, params)[0]


@plant("argument", W, X, wide())
def temperature(w: Any, x: Any, tau: Any) -> Any:
    def attend(x: Any) -> Any:
        scores = (x @ w) @ x.T / tau  # leak: temperature
        return jax.nn.softmax(scores, axis=-1) @ x

    return jax.vmap(attend)(x)


@plant("made", jax.ShapeDtypeStruct((4, D, D), LOW), X, IDS)
def routing(experts: Any, x: Any, chosen: Any) -> Any:
    gate = jax.nn.one_hot(chosen, 4)  # leak: routing
    return jnp.einsum("bte,btd->ebtd", gate, jnp.einsum("btd,edf->btf", x, experts))


@plant("made", {"w": W}, X, jax.ShapeDtypeStruct((D, D), jnp.int8))
def dequantised(params: Any, x: Any, stored: Any) -> Any:
    w = stored.astype(jnp.float32) * 0.05  # leak: dequantised
    return (x @ params["w"]) @ w


@plant("operation", W, X)
def host_callback(w: Any, x: Any) -> Any:
    @jax.custom_jvp
    def host(x: Any) -> Any:
        out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return jax.pure_callback(lambda x: np.tanh(np.float32(x)), out, x)  # leak: host_callback

    host.defjvp(lambda p, t: (host(*p), t[0].astype(jnp.float32)))
    return host(x @ w) @ w


@plant("inputs", {"patch": wide(D, D), "w": W}, wide(B, T, D))
def float32_images(params: Any, images: Any) -> Any:
    h = images @ params["patch"]  # leak: float32_images
    return h.astype(LOW) @ params["w"]


@plant("constant")
def in_a_shard(w: Any, x: Any) -> Any:
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))

    def each(x: Any, w: Any) -> Any:
        h = x @ w
        h = h * TABLE  # leak: in_a_shard
        return h @ w

    by = PartitionSpec("data")
    return jax.shard_map(each, mesh=mesh, in_specs=(by, PartitionSpec()), out_specs=by)(x, w)


@plant("made")
def alibi(w: Any, x: Any) -> Any:
    @jax.jit
    def bias(scores: Any) -> Any:
        distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
        slope = jnp.exp2(-jnp.float32(4))
        return scores - slope * distance  # leak: alibi

    q = x @ w
    return jnp.einsum("bts,bsd->btd", bias(jnp.einsum("btd,bsd->bts", q, q)), x)


@plant("made", (W, W))
def casts_that_follow(weights: Any, x: Any) -> Any:
    position = jnp.sin(jnp.arange(T, dtype=jnp.float32))[:, None]
    x = x + position  # leak: casts_that_follow
    for w in weights:
        h = rms(x) @ w
        x = x + h.astype(x.dtype) * jnp.tanh(x @ w.astype(x.dtype))
    return x


# --- an NNX-like module: state in an object, split into a tree and merged again


class Layer:
    def __init__(self, params: Any) -> None:
        self.params = params

    def __call__(self, x: Any) -> Any:
        with jax.named_scope("layer"):
            h = jax.nn.relu(x @ self.params["w"])
            return (h * self.params["gamma"]) @ self.params["w"]  # leak: object_gain


@plant("argument", {"w": W, "gamma": wide(D)})
def object_gain(params: Any, x: Any) -> Any:
    return Layer(params)(x)


# --- Flax Linen


def linen(mechanism: str, module: nn.Module, x: Any = X) -> Any:
    """Registers a module under its class's name, weights as it initialises them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        weights = jax.eval_shape(module.init, jax.random.key(0), x)
    PLANTS[type(module).__name__] = Plant(lambda w, x: module.apply(w, x), weights, (x,), mechanism)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(D, dtype=LOW)(x)
        q = k = v = x.reshape(B, T, 2, D // 2)
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
        probs = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)  # leak: LinenAttention
        return jnp.einsum("bhts,bshk->bthk", probs, v)


class LinenDense(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(D, dtype=LOW)(x)
        x = nn.Dense(D, name="forgot")(x)  # leak: LinenDense
        return nn.Dense(D, dtype=LOW)(x)


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(D, dtype=LOW)(x)
        x = nn.LayerNorm()(x)  # leak: LinenNorm
        w = self.param("w", nn.initializers.ones, (D, D), LOW)
        return x @ w


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(D, (3,), dtype=LOW)(x)
        x = x * jnp.ones((D,))  # leak: LinenConv
        return nn.Conv(D, (3,))(x)


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                h = nn.Dense(D, dtype=LOW, name="up")(x)
                h = h * self.param("gain", nn.initializers.ones, (D,))  # leak: LinenScan
                w = self.param("down", nn.initializers.ones, (D, D), LOW)
                return (h @ w).astype(LOW), None

        block = nn.remat(Block, prevent_cse=False)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


class LinenEmbed(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        x = nn.Embed(V, D)(ids)  # leak: LinenEmbed
        w = self.param("w", nn.initializers.ones, (D, D), LOW)
        return nn.relu(x) @ w


class FlaxAttention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        attention = nn.MultiHeadDotProductAttention(2, dtype=LOW, force_fp32_for_softmax=True)
        return attention(x)  # leak: FlaxAttention


linen("cast", LinenAttention())
linen("cast", FlaxAttention())
linen("argument", LinenDense())
linen("cast", LinenNorm())
linen("made", LinenConv())
linen("argument", LinenScan())
linen("argument", LinenEmbed(), IDS)
