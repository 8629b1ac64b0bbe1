"""Part b: how fast products and train steps are on the device, and how much memory they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks.on_device import clock
from benchmarks.on_device.measures import right
from benchmarks.on_device.measures.products import MATMUL
from mpjax.formats.delayed import AmaxHistory
from mpjax.models import decoder
from mpjax.ops import dot_general
from mpjax.precision import get_precision, get_recipe
from mpjax.train import build

BURST = 8  # products that are queued before the host waits, so that its own time does not count
LR, CLIP = 3e-4, 1.0


def _plain(dtype: Any, out: Any, precision: Any = None) -> tuple[Any, Callable[..., Any]]:
    def multiply(a: Any, b: Any) -> Any:
        return lax.dot_general(a, b, MATMUL, precision=precision, preferred_element_type=out)

    return dtype, multiply


def _recipe(name: str) -> tuple[Any, Callable[..., Any]]:
    recipe = get_recipe(name)

    def multiply(a: Any, b: Any) -> Any:
        if not recipe.history:
            return dot_general(a, b, MATMUL, recipe, key=jax.random.key(0))
        known = jnp.full(3, 4, jnp.float32)  # a history that is not empty, as in training
        past = AmaxHistory.empty(recipe.history)._replace(amax=known)
        return dot_general(a, b, MATMUL, recipe, key=jax.random.key(0), amax=past)[0]

    return jnp.bfloat16, multiply


def product_of(kind: str) -> tuple[Any, Callable[..., Any]]:
    """Returns the dtype of the operands and the product of a kind.

    Args:
      kind: a dtype of operands, `tf32` for float32 at XLA's default precision, or `recipe NAME`
        for ours from bfloat16 to bfloat16, quantisation included.
    """
    if kind.startswith("recipe "):
        return _recipe(kind.removeprefix("recipe "))
    return {
        "fp32": _plain(jnp.float32, jnp.float32, lax.Precision.HIGHEST),
        "tf32": _plain(jnp.float32, jnp.float32, lax.Precision.DEFAULT),
        "bf16": _plain(jnp.bfloat16, jnp.bfloat16),
        "e4m3": _plain(jnp.float8_e4m3fn, jnp.bfloat16),
        "int8": _plain(jnp.int8, jnp.int32),
    }[kind]


def product(size: Any, kind: str) -> dict[str, Any]:
    """TFLOP/s of a product of two square matrices of random numbers."""
    dtype, multiply = product_of(kind)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def draw(key: Any) -> Any:
        x = jax.random.normal(key, (size.side, size.side), jnp.float32)
        return (jnp.round(20 * x) if dtype == jnp.int8 else x).astype(dtype)

    a, b = map(draw, keys)
    start = time.perf_counter()
    compiled = jax.jit(multiply).lower(a, b).compile()
    compile_s = time.perf_counter() - start

    def burst() -> None:
        jax.block_until_ready([compiled(a, b) for _ in range(BURST)])

    times = clock.interleaved({"": burst}, size.seconds / 3)[""]
    flops = 2.0 * size.side**3 * BURST
    return {"side": size.side, "tflops": clock.rates(times, flops / 1e12), "compile_s": compile_s}


def batch_of(size: Any, batch: int | None = None) -> dict[str, Any]:
    """Random tokens of the model's vocabulary, on the device."""
    drawn = right.batch_of(batch or size.batch, size.tokens, size.model["vocabulary"])
    return jax.tree.map(jnp.asarray, drawn)


class Stepper:
    """A compiled step that keeps its state: each call takes one step and waits for it.

    Args:
      step: `jax.jit` of (state, batch) -> (state, out), the state donated.
      state: the first one.
      batch: of every step.
      loss: the loss in what a step gives.
    """

    def __init__(self, step: Any, state: Any, batch: Any, loss: Callable[[Any], Any]) -> None:
        start = time.perf_counter()
        self._step = step.lower(state, batch).compile()
        self.compile_s = time.perf_counter() - start
        self._state, self._batch, self._loss = state, batch, loss
        self.losses: list[float] = []

    def __call__(self) -> None:
        self._state, out = self._step(self._state, self._batch)
        self.losses.append(float(jax.block_until_ready(self._loss(out))))

    def program_bytes(self) -> int | None:
        """Returns what the compiled program holds at a time, as its compiler says."""
        found = self._step.memory_analysis()
        if found is None:
            return None
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        return int(held + found.temp_size_in_bytes - found.alias_size_in_bytes)


def ours(size: Any, precision: str, batch: Any, remat: str = "none", moments: str = "") -> Any:
    """Returns the model and our train step of a precision: AdamW, clip, gate."""
    chosen = get_precision(precision, moments=moments or None)
    model = decoder("tiny", chosen, remat=remat, **size.model)
    state, step = build(model, optax.adamw(LR), clip=CLIP)
    return model, Stepper(step.compiled, state, batch, lambda metrics: metrics["loss"])


def train(size: Any, precision: str, remat: str, moments: str) -> dict[str, Any]:
    """Tokens a second, MFU and peak memory of a train step."""
    batch = batch_of(size)
    model, step = ours(size, precision, batch, remat, moments)
    times = clock.interleaved({"": step}, size.seconds)[""]
    found = clock.rates(times, size.batch * size.tokens)
    flops = clock.flops_per_token(model.config, size.tokens)
    device = jax.devices()[0]
    return {
        "tokens_per_s": found,
        "step_s": clock.summary(times),
        "compile_s": step.compile_s,
        "batch": size.batch,
        "tokens": size.tokens,
        "parameters": sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
        ),
        "flops_per_token": flops,
        "mfu": clock.utilisation(found["median"], flops, device.device_kind),
        "peak_bytes": clock.peak_bytes(device),
        "program_bytes": step.program_bytes(),
        "first_loss": step.losses[0],
        "last_loss": step.losses[-1],
    }
