"""The small decoders that the tests share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.models import Decoder, decoder

GPT = dict(norm="layer", position="learned", activation="gelu", bias=True, tied=True)
LLAMA = dict(norm="rms", position="rotary", activation="swiglu", bias=False, tied=False, kv_heads=2)
SIZE = dict(vocabulary=32, layers=2, width=16, heads=4, context=16)
KINDS = {"gpt": GPT, "llama": LLAMA}
T = 8
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, T + 1)), jnp.int32)
BATCH = {"inputs": IDS[:, :-1], "targets": IDS[:, 1:]}


def small(precision: Any = "fp32", kind: str = "llama", **changes: Any) -> Decoder:
    """A decoder of two layers of width 16."""
    return decoder("tiny", precision, **(SIZE | KINDS[kind] | changes))


# Half the compile time; what LLVM does to the code is not what these tests are about.
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def stirred(model: Decoder, seed: int = 1) -> Any:
    """Parameters with biases and scales away from 0 and 1, where mistakes in them would hide.

    Drawn by numpy: to compile the initialisation of each small model takes longer than to run it.
    """

    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        name = path[-1].key if hasattr(path[-1], "key") else ""
        size = 0.2 + (leaf.shape[-2] ** -0.5 if name == "kernel" else 0.0)
        x = (name == "scale") + size * rng.normal(size=leaf.shape)
        return jnp.asarray(x, jnp.float32).astype(leaf.dtype)

    abstract = jax.eval_shape(model.init, jax.random.key(seed))
    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.cache
def drawn(model: Any, seed: int = 1) -> Any:
    """Parameters away from 0 and 1 like `stirred`, drawn by numpy: nothing is compiled."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> Any:
        noise = 0.3 * rng.normal(size=like.shape).astype(np.float32)
        return jnp.asarray(noise + (path[-1].key == "scale"), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def applied(model: Any) -> Any:
    """`model.apply`, compiled once; all but weights and inputs by keyword."""

    def run(params: Any, inputs: Any, **more: Any) -> Any:
        return model.apply(params, inputs, **more)

    return jax.jit(run, compiler_options=FAST, static_argnames="train")


def logits(model: Decoder, params: Any, ids: Any) -> np.ndarray:
    """Logits in float32."""
    return np.asarray(
        jax.jit(lambda p, i: model.apply(p, i)[0], compiler_options=FAST)(params, ids), np.float32
    )


def judged(model: Decoder, params: Any) -> float:
    """Loss of BATCH in evaluation."""
    return float(jax.jit(lambda p: model.loss(p, BATCH)[0], compiler_options=FAST)(params))


def _training_loss(model: Decoder) -> Any:
    return lambda p: model.loss(p, BATCH, key=jax.random.key(0), train=True)[0]


@functools.cache
def loss_and_gradients(model: Decoder, seed: int = 1) -> Any:
    """Loss and gradients of BATCH in training at `stirred` parameters."""
    return jax.jit(jax.value_and_grad(_training_loss(model)), compiler_options=FAST)(
        stirred(model, seed)
    )


@functools.cache
def lowered(model: Decoder) -> Any:
    """Loss and gradients in training, lowered."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.jit(jax.value_and_grad(_training_loss(model))).lower(params)
