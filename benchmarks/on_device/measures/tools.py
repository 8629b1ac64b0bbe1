"""Part d: what the tools cost on the device: autocast, monitor, trace_nonfinite, generation."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mpjax
from benchmarks.on_device import clock
from benchmarks.on_device.measures import fast
from mpjax.models import decoder, generate, quantize_weights
from mpjax.models.core.storage import stored_bytes
from mpjax.train import build

PROMPT, EVERY, SAMPLE = 128, 50, 4096


def autocast(size: Any) -> dict[str, Any]:
    """A gradient under autocast against the same casts written by hand."""
    from tests.interpret.autocast import twins

    shape = twins.Size(*size.twin)
    params, ids = twins.init(shape), twins.batch(shape)
    losses = {
        "autocast": mpjax.autocast(twins.plain(shape), "bf16"),
        "by hand": twins.by_hand(shape),
        "float32": twins.plain(shape),
    }
    compiled = {
        name: jax.jit(jax.value_and_grad(loss)).lower(params, ids).compile()
        for name, loss in losses.items()
    }

    def call(name: str) -> Any:
        return lambda: jax.block_until_ready(compiled[name](params, ids))

    times = clock.interleaved({name: call(name) for name in losses}, 2 * size.seconds)
    equal = compiled["autocast"](params, ids)[0] == compiled["by hand"](params, ids)[0]
    return {
        "model": shape._asdict(),
        "seconds": {name: clock.summary(values) for name, values in times.items()},
        "time": {
            "autocast / by hand": clock.ratio(times["autocast"], times["by hand"]),
            "float32 / autocast": clock.ratio(times["float32"], times["autocast"]),
        },
        "same_loss": bool(equal),
    }


def _quarter(size: Any) -> dict[str, Any]:
    """The model of part b with a quarter of its layers, which these tools compile sooner."""
    return size.model | {"layers": max(1, size.model["layers"] // 4)}


def monitoring(size: Any) -> dict[str, Any]:
    """What a monitor of a train step costs, called every 50 steps."""
    batch = fast.batch_of(size)
    model = decoder("tiny", "bf16", **_quarter(size))
    state, step = build(model, optax.adamw(fast.LR), clip=fast.CLIP)
    program = jax.jit(lambda *args: mpjax.monitor(step.function, sample=SAMPLE)(*args)[1])
    start = time.perf_counter()
    watch = program.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    measured = clock.interleaved(
        {"": lambda: jax.block_until_ready(watch(state, batch))}, size.seconds
    )[""]
    plain = fast.Stepper(step.compiled, state, batch, lambda metrics: metrics["loss"])
    times = clock.interleaved({"": plain}, size.seconds)[""]
    one, each = clock.summary(measured), clock.summary(times)
    return {
        "layers": model.config.layers,
        "step_s": each,
        "monitor_s": one,
        "compile_s": compile_s,
        "share": one["median"] / (EVERY * each["median"]),
        "every": EVERY,
    }


def planted(size: Any) -> dict[str, Any]:
    """Seconds in which trace_nonfinite finds an infinity that was planted in a product."""
    batch = fast.batch_of(size)
    model = decoder("tiny", "bf16", **_quarter(size))
    params = jax.jit(model.init)(jax.random.key(0))
    mlp = params["decoder"]["layers"]["mlp"]["down"]
    mlp["kernel"] = mlp["kernel"].at[-1].set(3e38)
    gradient = jax.value_and_grad(lambda params, batch: model.loss(params, batch)[0])
    start = time.perf_counter()
    found = mpjax.trace_nonfinite(gradient, params, batch, cure=False)
    seconds = time.perf_counter() - start
    path = "" if found is None else found.path
    return {
        "seconds": seconds,
        "found": path,
        "kind": "" if found is None else found.kind,
        "right": "mlp/down" in path,
        "layers": model.config.layers,
    }


def generation(size: Any, storage: str) -> dict[str, Any]:
    """Tokens a second that the model of part b writes, its weights stored in a format."""
    model = decoder("tiny", "bf16", **size.model)
    params = quantize_weights(jax.jit(model.init)(jax.random.key(0)), storage)
    prompt = min(PROMPT, size.tokens // 2)
    ids = fast.batch_of(size)["inputs"][:, :prompt]

    def write() -> Any:
        out = generate(model, params, ids, new=size.new, temperature=0.0)
        return jax.block_until_ready(out)

    start = time.perf_counter()
    tokens = write()
    first_s = time.perf_counter() - start
    times = clock.interleaved({"": write}, size.seconds)[""]
    return {
        "tokens_per_s": clock.rates(times, size.batch * size.new),
        "first_s": first_s,
        "prompt": prompt,
        "new": size.new,
        "batch": size.batch,
        "weight_bytes": stored_bytes(params),
        "peak_bytes": clock.peak_bytes(jax.devices()[0]),
        "known_ids": bool(jnp.all((tokens >= 0) & (tokens < model.config.vocabulary))),
    }
