"""Part c: our bf16 step against torch and against hand-written JAX, interleaved in one process."""

from __future__ import annotations

import time
from typing import Any

import jax

from benchmarks.on_device import clock
from benchmarks.on_device.measures import fast, twin
from mpjax.models import decoder

ROOMY = 120e9  # bytes: below, half the batch, for two frameworks keep their memory side by side


def _rates(times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    return {name: clock.rates(seconds, tokens) for name, seconds in times.items()}


def _shared_batch(size: Any) -> int:
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    # XLA may use 3/4 of the device's memory
    small = memory is not None and memory / 0.75 < ROOMY
    return size.batch // 2 if small else size.batch


def against_careful(size: Any) -> dict[str, Any]:
    """Ours and the hand-written step, from the same weights."""
    batch = fast.batch_of(size)
    model, own = fast.ours(size, "bf16", batch)
    step, init = twin.make_step(model.config, fast.LR, fast.CLIP)
    params = jax.jit(model.init)(jax.random.key(0))
    hand = fast.Stepper(step, init(params), batch, lambda loss: loss)
    del params
    times = clock.interleaved({"ours": own, "careful": hand}, 2 * size.seconds)
    return {
        "tokens_per_s": _rates(times, size.batch * size.tokens),
        "speed": {"ours / careful": clock.ratio(times["careful"], times["ours"])},
        "first_loss": {"ours": own.losses[0], "careful": hand.losses[0]},
        "compile_s": {"careful": hand.compile_s},
        "program_bytes": {"ours": own.program_bytes(), "careful": hand.program_bytes()},
        "batch": size.batch,
    }


def _torch_steps(size: Any, batch: Any, params: Any) -> tuple[dict[str, Any], float]:
    """Torch's steps, compiled and eager, on one model; and seconds until the first is compiled."""
    from on_device import torch_model

    config = decoder("tiny", "bf16", **size.model).config
    model = torch_model.make(config, size.tokens, torch_model.where())
    if params is not None:
        torch_model.take_weights(model, params)
    host = jax.device_get(batch)
    eager = torch_model.Stepper(model, host, False, fast.LR, fast.CLIP)
    compiled = torch_model.Stepper(model, host, True, fast.LR, fast.CLIP, eager.optimizer)
    start = time.perf_counter()
    compiled()
    compile_s = time.perf_counter() - start
    return {"torch compiled": compiled, "torch eager": eager}, compile_s


def against_torch(size: Any) -> dict[str, Any]:
    """Ours and torch's steps, from the same weights."""
    rows = _shared_batch(size)
    batch = fast.batch_of(size, rows)
    model, own = fast.ours(size, "bf16", batch)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    steps, compile_s = _torch_steps(size, batch, params)
    del params
    times = clock.interleaved({"ours": own, **steps}, 3 * size.seconds)
    names = ("torch compiled", "torch eager")
    return {
        "tokens_per_s": _rates(times, rows * size.tokens),
        "speed": {f"ours / {name}": clock.ratio(times[name], times["ours"]) for name in names},
        "first_loss": {"ours": own.losses[0], "torch": steps["torch compiled"].losses[0]},
        "compile_s": {"torch": compile_s},
        "batch": rows,
    }


def torch_alone(size: Any) -> dict[str, Any]:
    """Torch's steps without ours beside them, for their memory."""
    from on_device import torch_model

    steps, compile_s = _torch_steps(size, fast.batch_of(size), None)
    compiled = steps["torch compiled"]
    times = clock.interleaved({"torch compiled": compiled}, size.seconds)
    peak = {"torch compiled": torch_model.peak_bytes()}
    times |= clock.interleaved({"torch eager": steps["torch eager"]}, size.seconds)
    peak["torch, both"] = torch_model.peak_bytes()
    return {
        "tokens_per_s": _rates(times, size.batch * size.tokens),
        "peak_bytes": peak,
        "compile_s": {"torch": compile_s},
        "batch": size.batch,
    }
