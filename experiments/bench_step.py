"""What does the framework cost? Our compiled step against hand-written JAX of the same model.

Two references, both in this file and in plain JAX:
  careful: what a person would write who knows the platform: unrolled layers, 2-D products,
           float32 weight gradients, each cast by hand. Traced for an accelerator, ours must be
           the same program.
  naive:   the textbook step: `lax.scan` over layers, 3-D einsums, automatic differentiation.

Run:       python experiments/bench_step.py
Expected:  "same products and casts: yes" twice; time ratio ours/careful near 1.00, on a CPU about
           0.7 in bf16, where our products leave in float32, for which its library has faster code;
           naive/ours above 1.5 on CPU in fp32.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from common.bare_step import make_step
from common.stablehlo import products_and_casts
from mpjax.models import Decoder, decoder
from mpjax.ops import tracing_for
from mpjax.train import build
from mpjax.typing import Array, Batch, DType, DTypeLike, Params, PyTree

LR = 3e-4
Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Time our step against hand-written ones, interleaved in one process."""

    size: str = "small"
    """Model size; the hand-written steps are GPT-2-like (learned positions, LayerNorm, GELU)."""
    layers: int = 6
    """Layers of the model."""
    batch: int = 8
    """Sequences a step."""
    seq: int = 256
    """Tokens a sequence."""
    rounds: int = 15
    """Timed steps of each program, in turn."""


# --- careful: hand-written, one block after the other, products in 2-D ------------------------


def make_careful(model: Decoder, low: DType) -> Callable[[Params, Batch], Array]:
    """The same model as one would write it by hand; low is the compute dtype."""
    c = model.config
    H, K = c.heads, c.per_head
    precision = jax.lax.Precision.HIGHEST if low == jnp.float32 else None

    def dot(a: Array, b: Array, i: int, j: int, out: DTypeLike) -> Array:
        dims = (((i,), (j,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=out)

    @jax.custom_vjp
    def matmul(x: Array, w: Array) -> Array:
        return dot(x, w.astype(low), 1, 0, low)

    def matmul_bwd(saved: Pair, dy: Array) -> Pair:
        x, w = saved
        return dot(dy, w.astype(low), 1, 1, low), dot(x, dy, 0, 0, jnp.float32)

    matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), matmul_bwd)

    @jax.custom_vjp
    def unembed(x: Array, table: Array) -> Array:
        return dot(x, table.astype(low), 1, 1, jnp.float32)

    def unembed_bwd(saved: Pair, dy: Array) -> Pair:
        x, table = saved
        dy = dy.astype(low)
        return dot(dy, table.astype(low), 1, 0, low), dot(dy, x, 0, 0, jnp.float32)

    unembed.defvjp(lambda x, t: (unembed(x, t), (x, t)), unembed_bwd)

    @jax.custom_vjp
    def layer_norm(x: Array, scale: Array) -> Array:
        return normalised(x)[0] * scale[None, None]

    def normalised(x: Array) -> Pair:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + c.epsilon)
        return x * inverse, inverse

    def layer_norm_bwd(saved: Pair, dy: Array) -> Pair:
        x, scale = saved
        y, inverse = normalised(x)
        dn = dy * scale[None, None]
        dx = dn - y * jnp.mean(dn * y, -1, keepdims=True) - jnp.mean(dn, -1, keepdims=True)
        return (dx * inverse).astype(x.dtype), jnp.sum(dy * y, (0, 1))

    layer_norm.defvjp(lambda x, s: (layer_norm(x, s), (x, s)), layer_norm_bwd)

    @jax.custom_vjp
    def scores(q: Array, k: Array) -> Array:
        return jnp.einsum(
            "bhtk,bhsk->bhts", q, k, precision=precision, preferred_element_type=jnp.float32
        )

    def scores_bwd(saved: Pair, d: Array) -> Pair:
        q, k = saved
        d = d.astype(low)
        dq = jnp.einsum("bhts,bhsk->bhtk", d, k, precision=precision)
        return dq, jnp.einsum("bhts,bhtk->bhsk", d, q, precision=precision)

    scores.defvjp(lambda q, k: (scores(q, k), (q, k)), scores_bwd)

    def attention(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * K**-0.5, k, v))
        T, outs = q.shape[2], []
        block = T // 4 if T % 4 == 0 and T >= 128 else T
        for i in range(0, T, block):  # a block of queries sees no key behind it
            end = i + block
            seen = jnp.arange(i, end)[:, None] >= jnp.arange(end)[None]
            s = jnp.where(
                seen[None, None],
                scores(q[:, :, i:end], k[:, :, :end]),
                jnp.finfo(jnp.float32).min,
            )
            outs.append(
                jnp.einsum(
                    "bhts,bhsk->bhtk", jax.nn.softmax(s, -1).astype(low), v[:, :, :end],
                    precision=precision, preferred_element_type=low,
                )
            )  # fmt: skip
        return jnp.concatenate(outs, 2).transpose(0, 2, 1, 3)

    def loss(params: Params, batch: Batch) -> Array:
        ids, targets = batch["inputs"], batch["targets"]
        B, T = ids.shape
        D = c.width
        x = jnp.take(params["embed"], ids, axis=0).astype(low)
        x = x + params["position"][:T].astype(low)[None]
        for p in params["layers"]:
            y = layer_norm(x, p["norm_attention"]).astype(low).reshape(B * T, D)
            q, k, v = (matmul(y, p[n]).reshape(B, T, H, K) for n in ("query", "key", "value"))
            y = attention(q, k, v).reshape(B * T, D)
            x = x + matmul(y, p["out"]).reshape(B, T, D)
            y = layer_norm(x, p["norm_mlp"]).astype(low).reshape(B * T, D)
            y = jax.nn.gelu(matmul(y, p["up"]))
            x = x + matmul(y, p["down"]).reshape(B, T, D)
        x = layer_norm(x, params["norm"]).astype(low)
        logits = unembed(x.reshape(B * T, D), params["embed"])
        log_z = jax.nn.logsumexp(logits, -1)
        hit = targets.reshape(-1, 1) == jnp.arange(c.vocabulary)[None]
        return jnp.sum(log_z - jnp.sum(jnp.where(hit, logits, 0), -1)) / (B * T)

    return loss


# --- naive: the textbook step -----------------------------------------------------------------


def make_naive(model: Decoder) -> Callable[[Params, Batch], Array]:
    """Scanned blocks, 3-D einsums, automatic differentiation, float32."""
    c = model.config

    def layer_norm(x: Array, scale: Array) -> Array:
        mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + c.epsilon) * scale

    def block(x: Array, p: Params) -> tuple[Array, None]:
        B, T, D = x.shape
        y = layer_norm(x, p["norm_attention"])
        q, k, v = (
            jnp.einsum("btd,dn->btn", y, p[n]).reshape(B, T, c.heads, c.per_head)
            for n in ("query", "key", "value")
        )
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(c.per_head)
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e9)
        y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), v).reshape(B, T, D)
        x = x + jnp.einsum("btn,nd->btd", y, p["out"])
        y = jax.nn.gelu(jnp.einsum("btd,dn->btn", layer_norm(x, p["norm_mlp"]), p["up"]))
        return x + jnp.einsum("btn,nd->btd", y, p["down"]), None

    def loss(params: Params, batch: Batch) -> Array:
        ids = batch["inputs"]
        x = params["embed"][ids] + params["position"][: ids.shape[1]]
        x, _ = jax.lax.scan(block, x, params["layers"])
        logits = jnp.einsum("btd,vd->btv", layer_norm(x, params["norm"]), params["embed"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    return loss


# --- measuring --------------------------------------------------------------------------------


def flat(params: Params) -> dict[str, Params]:
    """Our tree as the hand-written steps name it, blocks still stacked."""
    p = params["decoder"]
    layers = {"norm_attention": p["layers"]["norm_attention"]["scale"]}
    layers |= {"norm_mlp": p["layers"]["norm_mlp"]["scale"]}
    layers |= {n: p["layers"]["attention"][n]["kernel"] for n in ("query", "key", "value", "out")}
    layers |= {n: p["layers"]["mlp"][n]["kernel"] for n in ("up", "down")}
    return {
        "embed": p["embed"]["table"],
        "position": p["position"]["table"],
        "norm": p["norm"]["scale"],
        "layers": layers,
    }


def programs(
    config: Config, precision: str
) -> tuple[dict[str, jax.stages.Wrapped], dict[str, PyTree], Batch]:
    """Compiled steps by name, and their first states."""
    model = decoder(
        config.size, precision, layers=config.layers, context=config.seq, loop="unroll",
        norm="layer", position="learned", activation="gelu", bias=False, tied=True,
        kernel="xla",  # as the others' attention, whatever the platform
    )  # fmt: skip
    state, step = build(model, optax.adamw(LR), gate=False)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocabulary, (config.batch, config.seq + 1), np.int32)
    batch = {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}
    tree = jax.tree.map(jnp.copy, flat(state.params))
    unstacked = dict(tree) | {
        "layers": [jax.tree.map(lambda x: x[i], tree["layers"]) for i in range(config.layers)]  # noqa: B023
    }
    compute = jnp.dtype(model.precision.rules[-1].policy.compute_dtype)
    careful, init = make_step(make_careful(model, compute), optax.adamw(LR))
    steps = {"ours": step.compiled, "careful": careful}
    states = {"ours": state, "careful": init(jax.tree.map(jnp.copy, unstacked))}
    if precision == "fp32":
        steps["naive"], init = make_step(make_naive(model), optax.adamw(LR))
        states["naive"] = init(tree)
    return steps, states, batch


def interleaved(
    steps: dict[str, jax.stages.Compiled], states: dict[str, PyTree], batch: Batch, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each program's steps, taken in turn, and each one's first loss."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    first: dict[str, float] = {}
    for turn in range(-2, rounds):
        for name in steps if turn % 2 else reversed(steps):
            start = time.perf_counter()
            states[name], out = steps[name](states[name], batch)
            out = jax.block_until_ready(out)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
            first.setdefault(name, float(out["loss"] if name == "ours" else out))
    return seconds, first


def ratio(a: list[float], b: list[float]) -> str:
    """Centre and 95 % interval of the paired ratio a/b, from 10,000 bootstrap means of logs."""
    logs = np.log(np.array(a) / np.array(b))
    rng = np.random.default_rng(0)
    means = np.exp(rng.choice(logs, (10_000, len(logs))).mean(axis=1))
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{np.exp(logs.mean()):.3f} [{low:.3f}, {high:.3f}]"


def main(config: Config) -> None:
    """Prints the comparison."""
    launch.positive(config, "layers", "batch", "seq", "rounds")
    console = Console()
    console.print(
        f"jax {jax.__version__} on {jax.default_backend()}, XLA_FLAGS={os.environ['XLA_FLAGS']}"
    )
    for precision in ("fp32", "bf16"):
        # The textbook step broadcasts as textbooks do, whatever the settings here.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            steps, states, batch = programs(config, precision)
            lowered = {name: step.lower(states[name], batch) for name, step in steps.items()}
            with tracing_for("tpu"):
                counts = {
                    name: products_and_casts(steps[name].lower(states[name], batch))
                    for name in ("ours", "careful")
                }
        ours, careful = counts["ours"], counts["careful"]
        console.print(
            f"\n[bold]{precision}[/bold]: {sum(n for k, n in ours.items() if 'dot' in k)} products"
        )
        console.print(f"same products and casts: {'yes' if ours == careful else 'NO'}")
        for name, odd in (("ours", ours - careful), ("careful", careful - ours)):
            for key, count in Counter(odd).items():
                console.print(f"  only in {name}: {count} x {key}")
        compiled = {name: low.compile() for name, low in lowered.items()}
        seconds, first = interleaved(compiled, states, batch, config.rounds)
        table = Table("step", "median s", "tokens/s", "first loss")
        for name, times in seconds.items():
            median = float(np.median(times))
            rate = config.batch * config.seq / median
            table.add_row(name, f"{median:.3f}", f"{rate:,.0f}", f"{first[name]:.6f}")
        console.print(table)
        console.print(f"time ours/careful {ratio(seconds['ours'], seconds['careful'])}")
        if "naive" in seconds:
            console.print(f"time naive/ours {ratio(seconds['naive'], seconds['ours'])}")


if __name__ == "__main__":
    launch.command(main, Config)
