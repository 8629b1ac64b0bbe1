"""What is counted in StableHLO; and that our step holds no product or cast too many."""

from __future__ import annotations

import doctest
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments.common import stablehlo
from experiments.common.stablehlo import products_and_casts
from mpjax.models import decoder
from mpjax.ops.target import tracing_for
from mpjax.train import build


def _count(fn: Any, *args: Any) -> Counter[str]:
    return products_and_casts(jax.jit(fn).lower(*args))


def test_the_examples_of_the_counters() -> None:
    failed, attempted = doctest.testmod(stablehlo)
    assert attempted and not failed


def test_products_and_casts_are_counted_by_shape_and_dtype() -> None:
    def fn(x: Any, w: Any) -> Any:
        low = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
        return low.astype(jnp.float32), x @ w

    assert _count(fn, jnp.ones((2, 3)), jnp.ones((3, 4))) == {
        "cast tensor<2x3xf32> -> tensor<2x3xbf16>": 1,
        "cast tensor<3x4xf32> -> tensor<3x4xbf16>": 1,
        "cast tensor<2x4xbf16> -> tensor<2x4xf32>": 1,
        "dot (tensor<2x3xbf16>, tensor<3x4xbf16>) -> tensor<2x4xbf16>": 1,
        "dot (tensor<2x3xf32>, tensor<3x4xf32>) -> tensor<2x4xf32>": 1,
    }


def test_a_called_function_counts_at_every_call_and_a_repeated_cast_once() -> None:
    inner = jax.jit(lambda x: x @ x)
    assert sum(_count(lambda x: inner(inner(inner(x))), jnp.ones((2, 2))).values()) == 3
    twice = _count(lambda x: (x.astype(jnp.float16), x.astype(jnp.float16)), jnp.ones(3))
    assert sum(twice.values()) == 1
    apart = _count(lambda x, y: (x.astype(jnp.float16), y.astype(jnp.float16)), *[jnp.ones(3)] * 2)
    assert sum(apart.values()) == 2


def test_integers_and_scalars_are_not_mistaken() -> None:
    assert not _count(lambda x: x.astype(jnp.int32), jnp.ones(3))
    assert _count(lambda x: x.astype(jnp.float16), jnp.float32(1)) == {
        "cast tensor<f32> -> tensor<f16>": 1
    }
    assert _count(lambda x: x.astype(jnp.float8_e4m3fn), jnp.ones(2)) == {
        "cast tensor<2xf32> -> tensor<2xf8E4M3FN>": 1
    }


# --- the same small GPT by hand ------------------------------------------------------------------

L, D, H, V, T = 2, 16, 2, 32, 8


def by_hand(low: Any) -> Any:
    """Loss of a GPT (LayerNorm, GELU, learned positions, tied head), each cast written out."""
    f32, K = jnp.float32, D // H

    def dot(a: Any, b: Any, i: int, j: int, out: Any) -> Any:
        return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=out)

    def product(j: int, out: Any) -> Any:
        """x w (j = 0) or x w^T (j = 1), with a float32 weight gradient."""

        @jax.custom_vjp
        def f(x: Any, w: Any) -> Any:
            return dot(x, w.astype(low), 1, j, out)

        def backward(kept: Any, dy: Any) -> Any:
            x, w = kept
            dy = dy.astype(low)
            dw = dot(dy, x, 0, 0, f32) if j else dot(x, dy, 0, 0, f32)
            return dot(dy, w.astype(low), 1, 1 - j, low), dw

        f.defvjp(lambda x, w: (f(x, w), (x, w)), backward)
        return f

    matmul, unembed = product(0, low), product(1, f32)

    @jax.custom_vjp
    def scores(q: Any, k: Any) -> Any:
        return jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=f32)

    def scores_backward(kept: Any, d: Any) -> Any:
        q, k, d = *kept, d.astype(low)
        return jnp.einsum("bhts,bhsk->bhtk", d, k), jnp.einsum("bhts,bhtk->bhsk", d, q)

    scores.defvjp(lambda q, k: (scores(q, k), (q, k)), scores_backward)

    def attention(*qkv: Any) -> Any:
        q, k, v = (x.reshape(-1, T, H, K).transpose(0, 2, 1, 3) for x in qkv)
        s = jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], scores(q * K**-0.5, k), -1e9)
        y = jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(s, -1).astype(low), v)
        return y.transpose(0, 2, 1, 3).reshape(-1, D)

    def normalised(x: Any) -> Any:
        x = x.astype(f32)
        x = x - jnp.mean(x, -1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)
        return x * inverse, inverse

    @jax.custom_vjp
    def norm(x: Any, scale: Any) -> Any:
        return (normalised(x)[0] * scale[None, None]).astype(low)

    def norm_backward(kept: Any, dy: Any) -> Any:
        (x, scale), dy = kept, dy.astype(f32)
        y, inverse = normalised(x)
        dn = dy * scale[None, None]
        dx = dn - y * jnp.mean(dn * y, -1, keepdims=True) - jnp.mean(dn, -1, keepdims=True)
        return (dx * inverse).astype(x.dtype), jnp.sum(dy * y, (0, 1))

    norm.defvjp(lambda x, s: (norm(x, s), (x, s)), norm_backward)

    def loss(p: Any, batch: Any) -> Any:
        ids = batch["inputs"]
        B = ids.shape[0]
        x = jnp.take(p["embed"], ids, axis=0).astype(low) + p["position"][:T].astype(low)[None]
        for q in p["layers"]:
            y = norm(x, q["norm_attention"]).reshape(B * T, D)
            y = attention(*(matmul(y, q[n]) for n in ("query", "key", "value")))
            x = x + matmul(y, q["out"]).reshape(B, T, D)
            y = jax.nn.gelu(matmul(norm(x, q["norm_mlp"]).reshape(B * T, D), q["up"]))
            x = x + matmul(y, q["down"]).reshape(B, T, D)
        logits = unembed(norm(x, p["norm"]).reshape(B * T, D), p["embed"])
        hit = batch["targets"].reshape(-1, 1) == jnp.arange(V)[None]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(hit, logits, 0), -1))

    return loss


def _flat(params: Any) -> dict[str, Any]:
    p, stacked = params["decoder"], params["decoder"]["layers"]

    def layer(i: int) -> dict[str, Any]:
        out = {n: stacked[n]["scale"][i] for n in ("norm_attention", "norm_mlp")}
        out |= {n: w["kernel"][i] for n, w in stacked["attention"].items()}
        return out | {n: w["kernel"][i] for n, w in stacked["mlp"].items()}

    return {
        "embed": p["embed"]["table"],
        "position": p["position"]["table"],
        "norm": p["norm"]["scale"],
        "layers": [layer(i) for i in range(L)],
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrapper_that_is_off_costs_nothing(precision: str) -> None:
    low = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[precision]
    model = decoder(
        "tiny", precision, vocabulary=V, layers=L, width=D, heads=H, context=T, loop="unroll",
        norm="layer", position="learned", activation="gelu",
    )  # fmt: skip
    tx = optax.adamw(1e-3)
    state, step = build(model, tx, gate=False)
    batch = {name: jnp.zeros((2, T), jnp.int32) for name in ("inputs", "targets")}
    params = _flat(state.params)
    opt_state = tx.init(params)

    def hand_step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(by_hand(low))(params, batch)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

    with tracing_for("tpu"):  # on a CPU products leave in float32 and are cast
        ours = products_and_casts(step.compiled.lower(state, batch))
        theirs = _count(hand_step, params, opt_state, batch)
    assert sum(n for k, n in ours.items() if k.startswith("dot")) == L * (6 * 3 + 6) + 3
    assert ours == theirs
    loss, mine = jax.jit(by_hand(low))(params, batch), jax.jit(model.loss)(state.params, batch)[0]
    # bfloat16: XLA keeps fused intermediates wider, here and there differently
    tolerance = {"fp32": 1e-6, "bf16": 1e-3}[precision]
    assert float(loss) == pytest.approx(float(mine), rel=tolerance)
    # the negative control: the same step in float16
    other = build(decoder(model.config, "fp16"), tx)[1]
    with tracing_for("tpu"):
        lowered = other.compiled.lower(jax.eval_shape(other.init, 0), batch)
    assert products_and_casts(lowered) != ours
