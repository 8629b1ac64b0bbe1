"""Part a: does the device compute what the CPU does, and what it should?

Every check runs the same code on the device and on the CPU of the same process; many compare with
numpy too, which a mistake on both sides would not pass. A row of a result holds `differ` (numbers
whose bits are not the CPU's) and `error` with its `bound`; on a CPU `differ` must be 0 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from benchmarks.on_device.measures.compare import Row, both, compiled, differ, distance, row, sides
from mpjax.formats import Format, quantize, round_to
from mpjax.models import decoder
from mpjax.ops.attention import attention as attend
from mpjax.precision import parse_policy
from mpjax.train import build

FORMATS = (
    "tf32", "bfloat16", "float16", "e5m2", "e4m3", "e3m4", "e3m2", "e2m3", "e2m1", "e4m3ieee",
    "e5m2fnuz", "e4m3fnuz", "e4m3b11fnuz", "e8m0", "e4m4", "e6m9", "int16", "int8", "int4", "q8.8",
)  # fmt: skip
# The formats whose numbers numpy has, by ml_dtypes, so that numpy's own cast is an oracle.
ORACLES = {
    "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3fn, "e3m4": ml_dtypes.float8_e3m4,
    "e4m3ieee": ml_dtypes.float8_e4m3, "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn, "e2m3": ml_dtypes.float6_e2m3fn,
}  # fmt: skip
SCALINGS = (
    ("e4m3", "tensor"), ("e5m2", "tensor"), ("int8", "tensor"), ("e4m3", "row"), ("int8", "row"),
    ("int4", "row"), ("e4m3", "block(1x128)"), ("e4m3", "block(128x128)"), ("e4m3", "mx(32)"),
    ("e2m1", "mx(32)"), ("e2m1", "nv(16)"), ("e2m1", "nv(16x16)"),
)  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------


def patterns(count: int) -> Any:
    """Float32 patterns: random bits, so all exponents alike, with inf, NaN, zeros, subnormals."""
    drawn = np.random.default_rng(0).integers(0, 2**32, count, np.uint32)
    ends = np.array([0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC00000], np.uint32)
    return np.concatenate([ends, drawn[ends.size :]]).view(np.float32)


def rounding(size: Any) -> dict[str, Any]:
    """`round_to` of every format, nearest and floor."""
    x, rows = patterns(size.patterns), []
    for way in ("nearest", "floor"):
        found, expected = both(lambda x, way=way: [round_to(x, f, way) for f in FORMATS])(x)
        for name, ours, cpu in zip(FORMATS, found, expected, strict=True):
            rows.append(row(f"{name}, {way}", differ=differ(ours, cpu)))
            if way == "nearest" and name in ORACLES:
                top = Format(name).max
                with np.errstate(over="ignore", invalid="ignore"):
                    cast = np.clip(x, -top, top).astype(ORACLES[name]).astype(np.float32)
                cast = np.where(np.isnan(x), np.nan, cast)
                wrong = ~((ours == cast) | (np.isnan(ours) & np.isnan(cast)))
                rows.append(row(f"{name}, nearest, against numpy's cast", error=float(wrong.sum())))
    return {"rows": rows, "numbers": x.size * len(FORMATS) * 2}


def quantized(size: Any) -> dict[str, Any]:
    """`quantize` and `dequantize` of every scaling; scales of tensors and rows against numpy.

    Each is a program of its own: a device may lack the dtype of one.
    """
    del size
    rng = np.random.default_rng(1)
    spread = np.exp2(rng.integers(-6, 6, (256, 1)))
    x = (rng.normal(size=(256, 256)) * spread).astype(np.float32)
    rows = []
    for format, scaling in SCALINGS:
        try:
            rows += _quantized(x, format, scaling)
        except Exception as error:
            rows.append(row(f"{format}, {scaling}: {type(error).__name__}", error=math.inf))
    return {"rows": rows, "numbers": x.size * len(SCALINGS)}


def _quantized(x: Any, format: str, scaling: str) -> list[Row]:
    def parts(x: Any) -> Any:
        q = quantize(x, format, scaling)
        return q.scales, q.values.astype(jnp.float32), q.dequantize()

    name = f"{format}, {scaling}"
    ours, cpu = both(parts)(x)
    rows = [row(name, differ=differ(ours, cpu))]
    scales, values, back = ours
    if scaling in ("tensor", "row"):
        amax = np.abs(x).max(None if scaling == "tensor" else 1).astype(np.float64)
        error = float(np.max(np.abs(scales.ravel() * Format(format).max / amax.ravel() - 1)))
        label, why = f"{name}: scales against amax / max", "two roundings of float32"
        rows.append(row(label, error=error, bound=2.0**-22, why=why))
    bound = 0.3 if Format(format).bits <= 4 else 0.06  # half a step of 1 or 2, of 3 bits
    label, why = f"{name}: what comes back", "half a step of the format"
    rows.append(row(label, error=distance(back, x), bound=bound, why=why))
    if format in ORACLES:
        again = values.astype(ORACLES[format]).astype(np.float32)
        wrong = float((again != values).sum())
        rows.append(row(f"{name}: values are the format's", error=wrong))
    return rows


# --- steps and attention ----------------------------------------------------------------------


def stochastic(size: Any) -> dict[str, Any]:
    """Stochastic rounding draws the CPU's bits, and its mean is the number."""
    rows = []
    for format, value, step in (("e4m3", 1.03, 0.125), ("bfloat16", 1.003, 2.0**-7)):
        x = np.full(size.draws, value, np.float32)
        draw = both(lambda x, f=format: round_to(x, f, "stochastic", jax.random.key(5)))
        ours, cpu = draw(x)
        share = (np.float64(np.float32(value)) - 1) / step
        deviation = step * np.sqrt(share * (1 - share) / size.draws)
        error = abs(float(ours.mean(dtype=np.float64)) - float(np.float32(value)))
        rows.append(row(f"{format}: bits", differ=differ(ours, cpu)))
        rows.append(row(f"{format}: mean of {size.draws}", error=error, bound=5 * deviation,
                        why="5 standard deviations"))  # fmt: skip
    return {"rows": rows, "numbers": 2 * size.draws}


def attention(size: Any) -> dict[str, Any]:
    """Attention and its gradients: the device against the CPU; cuDNN's kernel against float32."""
    del size
    rng = np.random.default_rng(6)
    q, k, v = (rng.normal(size=(2, 128, heads, 64)).astype(np.float32) for heads in (8, 2, 2))

    def run(dtype: str, kernel: str) -> Callable[..., Any]:
        policy, softmax = parse_policy(f"c={dtype},o=f32"), parse_policy(f"c=f32,o={dtype}")

        def out_and_gradients(q: Any, k: Any, v: Any) -> Any:
            def total(q: Any, k: Any, v: Any) -> Any:
                out = attend(q, k, v, policy, softmax, kernel=kernel)
                return jnp.sum(jnp.square(out)), out

            grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
            return (out, *grads)

        return out_and_gradients

    rows = []
    ours, cpu = both(run("f32", "xla"))(q, k, v)
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, cpu, strict=True):
        rows.append(
            row(f"float32, xla: {name}", differ=differ(a, b), exact=False, error=distance(a, b),
                bound=1e-5, why="the order of float32 sums")
        )  # fmt: skip
    kernels = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    for kernel in kernels:
        low = compiled(run("bf16", kernel), "device")(q, k, v)
        for name, a, b in zip(("output", "dq", "dk", "dv"), low, cpu, strict=True):
            rows.append(row(f"bfloat16, {kernel}: {name} against float32", error=distance(a, b),
                            bound=2.0**-6, why="four roundings to 8 bits"))  # fmt: skip
    note = "" if "cudnn" in kernels else "cuDNN's kernel was not measured: it needs a GPU"
    return {"rows": rows, "note": note}


def small_model(precision: str) -> Any:
    """A decoder that compiles soon, the same on both sides."""
    return decoder(
        "tiny", precision, layers=1, width=64, heads=2, vocabulary=64, context=32, loop="unroll",
        kernel="xla",
    )  # fmt: skip


def batch_of(rows: int, tokens: int, vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """Random tokens and their successors, on the host."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, tokens + 1), np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def skipped(size: Any, precision: str) -> dict[str, Any]:
    """A step whose gradients are not finite changes no bit of weights, moments and histories."""
    del size
    with jax.default_device(sides()["device"]):
        state, step = build(small_model(precision), optax.adamw(1e-2), clip=1.0)
        start, batch = jax.device_get(state.params), batch_of(2, 16, 64)
        state, _ = step(state, batch)
        healthy = jax.device_get(state.params)
        norm = state.params["decoder"]["norm"]["scale"]
        state.params["decoder"]["norm"]["scale"] = norm.at[0].set(jnp.inf)
        before = jax.device_get(state)
        state, metrics = step(state, batch)
        after = jax.device_get(state)

    def kept(state: Any) -> Any:
        return state.params, state.model_state, state.opt_state.inner, state.opt_state.update_state

    moved = differ(kept(after), kept(before))
    rows = [
        row("numbers that a skipped step moves", error=float(moved)),
        row("it was skipped: 1 - skips", error=float(1 - int(metrics["skipped"]))),
        row("a step that is not skipped moves none", error=float(differ(healthy, start) == 0)),
    ]
    return {"rows": rows}


def twenty(size: Any) -> dict[str, Any]:
    """20 steps of fp32 training: each loss against the CPU's."""
    del size
    losses = {side: _losses(side, 20) for side in sides()}
    a, b = np.array(losses["device"]), np.array(losses["cpu"])
    error = float(np.max(np.abs(a - b) / np.abs(b)))
    rows = [row("losses", differ=int((a != b).sum()), exact=False, error=error, bound=1e-4,
                why="the order of float32 sums, through 20 steps of AdamW")]  # fmt: skip
    rows.append(row("the loss falls", error=float(a[-1] / a[0]), bound=0.95))
    return {"rows": rows, "first": float(a[0]), "last": float(a[-1])}


def _losses(side: str, steps: int) -> list[float]:
    with jax.default_device(sides()[side]):
        state, step = build(small_model("fp32"), optax.adamw(3e-3), clip=1.0)
        batch = jax.device_put(batch_of(4, 16, 64, seed=7), sides()[side])  # learned by heart
        found = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    return found
