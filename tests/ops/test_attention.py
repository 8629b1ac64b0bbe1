"""Attention against loops in float64 numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.ops import attention
from mpjax.ops.target import tracing_for
from mpjax.precision import parse_policy
from tests.ops.jaxprs import dtypes, equations, sizes
from tests.ops.oracle import gradient, rounded

F32 = parse_policy("f32")


pytestmark = pytest.mark.usefixtures("fast_compile")


def oracle(q: Any, k: Any, v: Any, first: int = 0) -> Any:
    B, T, H, K = q.shape
    group = H // k.shape[2]
    out = np.zeros(q.shape, np.result_type(q, k, v))
    for b, t, h in np.ndindex(B, T, H):
        seen = slice(0, first + t + 1)
        score = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(K)
        weight = np.exp(score - score.real.max())
        out[b, t, h] = weight @ v[b, seen, h // group] / weight.sum()
    return out


def _qkv(heads: int, groups: int, T: int = 5, S: int = 5, low: str = "f32") -> list[np.ndarray]:
    rng = np.random.default_rng(heads * 10 + groups)
    shapes = ((2, T, heads, 4), (2, S, groups, 4), (2, S, groups, 4))
    return [rounded(rng.normal(size=shape), low) for shape in shapes]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize(("first", "T", "S"), [(0, 5, 5), (3, 2, 5), (3, 1, 8)])
def test_against_loops(heads: int, groups: int, first: int, T: int, S: int) -> None:
    q, k, v = _qkv(heads, groups, T, S)
    want = oracle(q, k, v, first)
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(np.asarray(attention(*args, F32, F32, first=first)), want, atol=2e-6)
    # what lies behind the last query (an unwritten cache) does not matter; a traced first works
    args[1:] = [x.at[:, first + T :].set(1e4) for x in args[1:]]
    traced = jax.jit(lambda first: attention(*args, F32, F32, first=first))(jnp.int32(first))
    np.testing.assert_allclose(np.asarray(traced), want, atol=2e-6)


@pytest.mark.parametrize("groups", [4, 1])
def test_long_sequences_are_cut_into_blocks_of_queries(groups: int) -> None:
    T = 4 * 32
    q, k, v = _qkv(4, groups, T, T)
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]

    def loss(first: Any) -> Any:
        return lambda *a: jnp.sum(jnp.sin(attention(*a, F32, F32, first=first)))

    def largest(first: Any) -> int:
        return max(sizes(loss(first), *args))

    # A traced first takes the whole square at once: the reference, and the negative control.
    assert largest(0) < largest(jnp.int32(0)) == 2 * 4 * T * T
    np.testing.assert_allclose(
        np.asarray(jax.jit(lambda *a: attention(*a, F32, F32))(*args)), oracle(q, k, v), atol=3e-6
    )
    both = [jax.jit(jax.grad(loss(first), argnums=(0, 1, 2)))(*args) for first in (0, jnp.int32(0))]
    for ours, whole in zip(*both, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(whole), atol=1e-5)


@pytest.mark.parametrize(("causal", "window"), [(True, 2), (False, 0), (False, 2), (True, 0)])
def test_what_a_query_sees_against_loops(causal: bool, window: int) -> None:
    q, k, v = _qkv(4, 2, 5, 5)
    keep = np.array([[True] * 5, [False, True, True, False, True]])
    want = np.zeros(q.shape)
    for b, t, h in np.ndindex(2, 5, 4):
        seen = [
            s
            for s in range(5)
            if keep[b, s] and (s <= t or not causal) and (not window or abs(t - s) < window)
        ]
        if seen:
            weight = np.exp(k[b, seen, h // 2] @ q[b, t, h] / 2)
            want[b, t, h] = weight @ v[b, seen, h // 2] / weight.sum()
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out = attention(*args, F32, F32, causal=causal, window=window, keep_BS=jnp.asarray(keep))
    assert np.isfinite(np.asarray(out)).all()  # a query that sees nothing too
    some = np.abs(want).sum((2, 3)) > 0
    np.testing.assert_allclose(np.asarray(out)[some], want[some], atol=2e-6)
    if not causal:  # another length of keys, as across
        short = attention(*(x[:, :3] for x in args[:1]), *args[1:], F32, F32, causal=False)
        whole = attention(*args, F32, F32, causal=False)
        np.testing.assert_allclose(np.asarray(short), np.asarray(whole)[:, :3], atol=2e-6)


def test_cudnn_is_refused_with_padding_or_a_window() -> None:
    x = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
    policies = parse_policy("bf16"), parse_policy("c=f32,o=bf16")
    for masked in ({"window": 2}, {"keep_BS": jnp.ones((1, 4), bool)}):
        with pytest.raises(ConfigError, match=r"padding, window or segments; here: .*cache, pad"):
            attention(x, x, x, *policies, kernel="cudnn", **masked)


def test_the_oracle_tells_groupings_apart() -> None:
    q, k, v = _qkv(4, 2)
    tiled = oracle(q, np.tile(k, (1, 1, 2, 1)), np.tile(v, (1, 1, 2, 1)))  # 0 1 0 1, not 0 0 1 1
    assert np.abs(tiled - oracle(q, k, v)).max() > 0.1
    assert np.abs(oracle(q, k, v, 1) - oracle(q, k, v)).max() > 0.1  # a peek at the next token


@pytest.mark.parametrize(("low", "tolerance"), [("bf16", 0.03), ("f16", 4e-3)])
@pytest.mark.parametrize("softmax", ["f32", "low"])
def test_low_products_run_on_cpu(low: str, tolerance: float, softmax: str) -> None:
    q, k, v = _qkv(4, 2, low=low)
    policy = parse_policy(low)
    inner = policy if softmax == "low" else parse_policy(f"c=f32,o={low}")
    args = [jnp.asarray(x, policy.compute_dtype) for x in (q, k, v)]
    out = jax.jit(lambda *a: attention(*a, policy, inner, kernel="auto"))(*args)
    assert out.dtype == policy.output_dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), oracle(q, k, v), atol=tolerance)


def test_gradients_against_the_complex_step() -> None:
    full = _qkv(2, 1, T=3, S=3)
    dy = np.random.default_rng(9).normal(size=full[0].shape)
    args = [jnp.asarray(x, jnp.float32) for x in full]
    _, pull = jax.vjp(lambda *a: attention(*a, F32, F32), *args)
    for i, got in enumerate(pull(jnp.asarray(dy, jnp.float32))):

        def scalar(moved: Any, i: int = i) -> Any:
            return (oracle(*full[:i], moved, *full[i + 1 :]) * dy).sum()

        np.testing.assert_allclose(np.asarray(got), gradient(scalar, full[i]), atol=1e-5)


@pytest.mark.parametrize(
    ("softmax", "exp", "scores"),
    [
        ("c=f32,o=bf16", "float32", "float32"),
        ("bf16", "bfloat16", "bfloat16"),
        ("c=f32,o=f32", "float32", "float32"),
    ],
)
def test_the_softmax_has_its_own_policy(softmax: str, exp: str, scores: str) -> None:
    args = [jnp.asarray(x, jnp.bfloat16) for x in _qkv(4, 2)]

    def call(*args: Any) -> Any:
        return attention(*args, parse_policy("bf16"), parse_policy(softmax))

    assert dtypes("exp", call, *args) == {exp}
    assert dtypes("reduce_max", call, *args) == {exp}

    def products(fn: Any) -> list[Any]:
        return [e for e in equations(fn, *args) if e.primitive.name == "dot_general"]

    assert {e.outvars[0].aval.dtype.name for e in products(call)} == {"float32"}, "as a CPU wants"
    with tracing_for("tpu"):
        assert [e.outvars[0].aval.dtype.name for e in products(call)] == [scores, "bfloat16"]
    backward = jax.grad(lambda *a: jnp.sum(call(*a).astype(jnp.float32)), argnums=(0, 1, 2))
    assert len(products(backward)) == 6
    assert {v.aval.dtype.name for e in products(backward) for v in e.invars} == {"bfloat16"}


def test_float32_scores_keep_what_bfloat16_loses() -> None:
    # Two keys whose scores, 256 and 257, are one number in bfloat16.
    q = jnp.tile(jnp.array([32, 2, 0, 0], jnp.bfloat16), (1, 2, 1, 1))
    k = jnp.array([[16, 0, 0, 0], [16, 1, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([[0.0], [1.0]], jnp.bfloat16).repeat(4, axis=1).reshape(1, 2, 1, 4)
    bf16 = parse_policy("bf16")
    wide = attention(q, k, v, bf16, parse_policy("c=f32,o=f32"))[0, 1, 0, 0]
    assert float(wide) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=2e-3)
    assert float(attention(q, k, v, bf16, bf16)[0, 1, 0, 0]) == 0.5


@pytest.mark.parametrize(
    ("policy", "softmax", "first"),
    [
        ("f32", "f32", 0),
        ("bf16", "bf16", 0),
        ("bf16", "c=f32,o=bf16", 2),
        ("bf16", "c=f32,o=bf16", jnp.int32(0)),
        ("bf16", "c=f32,o=bf16", 0),  # nothing wrong but the backend: tests run on CPU
    ],
)
def test_cudnn_is_refused_where_it_does_not_serve(policy: str, softmax: str, first: Any) -> None:
    heads_of_8 = [np.tile(x, 2) for x in _qkv(4, 2)]
    args = [jnp.asarray(x, parse_policy(policy).compute_dtype) for x in heads_of_8]
    with pytest.raises(ConfigError, match="kernel 'cudnn' .*; use kernel 'xla' or 'auto'"):
        attention(*args, parse_policy(policy), parse_policy(softmax), first=first, kernel="cudnn")


def test_auto_leaves_heads_that_cudnn_lacks_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.ones((1, 4, 1, 12), jnp.bfloat16)
    policies = parse_policy("bf16"), parse_policy("c=f32,o=bf16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention(x, x, x, *policies, kernel="auto").shape == x.shape
    with pytest.raises(ConfigError, match="heads of 12"):
        attention(x, x, x, *policies, kernel="cudnn")
    asked = []  # the control: 16 goes to cuDNN
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, *_, **spec: asked.append(spec) or q
    )
    attention(*[jnp.ones((1, 4, 1, 16), jnp.bfloat16)] * 3, *policies, kernel="auto")
    assert asked == [{"is_causal": True, "implementation": "cudnn"}]
