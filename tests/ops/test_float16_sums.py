"""Sums over many terms under float16: right up to its largest number and along long axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.models.transformer.block import activate
from mpjax.ops import attention, cross_entropy, group_norm, norm, scale_by
from mpjax.precision import parse_policy
from tests.ops.oracle import gradient, rounded

HALF = parse_policy("f16")
EPSILON = 1e-5
pytestmark = pytest.mark.usefixtures("fast_compile")


def relative(got: Any, want: Any) -> float:
    got = np.asarray(got, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def normalised(x: Any, axes: tuple[int, ...], centre: bool) -> Any:
    x = x - x.mean(axes, keepdims=True) if centre else x
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + EPSILON)


@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0, 6000.0, 15000.0])
def test_norms_forward_and_backward(centre: bool, size: float) -> None:
    rng = np.random.default_rng(0)
    # a mean beside it: a difference of two numbers may be beyond float16 too
    x = rounded(np.clip(rng.normal(0, size, (3, 96)) - size, -65504, 65504), "f16")
    dy = rounded(rng.normal(size=x.shape) * 0.01, "f16")
    scale = rounded(rng.normal(size=96), "f16")
    y, pull = jax.vjp(
        lambda x, s: norm(x, s, None, HALF, centre=centre),
        jnp.asarray(x, jnp.float16), jnp.asarray(scale, jnp.float16),
    )  # fmt: skip
    assert y.dtype == jnp.float16
    assert relative(y, normalised(x, (-1,), centre) * scale) < 1e-3
    # a loss scale, as training has: dx falls with the size of x
    factor = 2.0 ** np.floor(np.log2(max(size, 1.0)))
    dx, dscale = pull(jnp.asarray(dy * factor, jnp.float16))
    dy = rounded(dy * factor, "f16")
    want = gradient(lambda x: (normalised(x, (-1,), centre) * scale * dy).sum(), x)
    assert relative(dx, want) < 2e-3
    assert relative(dscale, (normalised(x, (-1,), centre) * dy).sum(0)) < 1e-3


@pytest.mark.parametrize("size", [1.0, 300.0, 15000.0])
def test_group_norm(size: float) -> None:
    rng = np.random.default_rng(1)
    x = rounded(rng.normal(0, size, (2, 3, 4, 8)), "f16")
    dy = rounded(rng.normal(size=x.shape) * max(1.0, size / 100), "f16")

    def ours(x: Any) -> Any:
        one = jnp.ones(8, jnp.float16)
        return group_norm(x, one, 0 * one, HALF, groups=2)

    def oracle(x: Any) -> Any:
        return normalised(x.reshape(2, 3, 4, 2, 4), (1, 2, 4), True).reshape(x.shape)

    y, pull = jax.vjp(ours, jnp.asarray(x, jnp.float16))
    assert relative(y, oracle(x)) < 1e-3
    want = gradient(lambda x: (oracle(x) * dy).sum(), x)
    assert relative(pull(jnp.asarray(dy, jnp.float16))[0], want) < 2e-3


def test_a_long_axis_of_the_largest_numbers() -> None:
    x = jnp.full((1, 70000), 60000, jnp.float16)
    y = norm(x, jnp.ones(70000, jnp.float16), None, HALF, centre=False)
    assert (y == 1).all()
    assert not norm(x, jnp.ones(70000), None, HALF, centre=True).any()


def test_bfloat16_keeps_its_own_statistics() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 64)), jnp.bfloat16)
    y = norm(x, jnp.ones(64), None, parse_policy("bf16"), centre=False)
    square = jnp.mean(jnp.square(x), -1, keepdims=True)
    with jax.numpy_dtype_promotion("standard"):
        assert (y == x * jax.lax.rsqrt(square + EPSILON)).all()


def test_the_gradient_of_a_scale_has_its_terms_in_float32() -> None:
    x = jnp.full((4096, 1), 2.0**-13, jnp.float16)
    dy = jnp.full((4096, 1), 2.0**-13, jnp.float16)  # a product of 2^-26 is no float16
    got = jax.vjp(lambda s: scale_by(x, s, jnp.float32), jnp.ones(1))[1](dy)[0]
    assert got.item() == 4096 * 2.0**-26
    big = jnp.full((4, 1), 300.0, jnp.float16)
    assert jax.vjp(lambda s: scale_by(big, s, jnp.float32), jnp.ones(1))[1](big)[0] == 4 * 90000


@pytest.mark.parametrize("keys", [64, 70000])
def test_attention_over_many_keys(keys: int) -> None:
    rng = np.random.default_rng(3)
    q = rounded(rng.normal(size=(1, 2, 1, 4)), "f16")
    k = rounded(rng.normal(size=(1, keys, 1, 4)) * 0.01, "f16")
    v = rounded(1 + rng.normal(size=(1, keys, 1, 4)), "f16")

    def oracle(q: Any) -> Any:
        scores = np.einsum("bthk,bshk->bhts", q, k) / 2
        weights = np.exp(scores)
        return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)

    def ours(q: Any) -> Any:
        half = (jnp.asarray(a, jnp.float16) for a in (k, v))
        return attention(q, *half, HALF, HALF, causal=False)

    y, pull = jax.vjp(ours, jnp.asarray(q, jnp.float16))
    assert relative(y, oracle(q)) < 0.01  # probabilities of 2^-16 have 9 bits left
    if keys == 64:
        dy = jnp.ones_like(y)
        assert relative(pull(dy)[0], gradient(lambda q: oracle(q).sum(), q)) < 0.02


def test_scores_beyond_float16_do_not_look_ahead() -> None:
    # every score is about -113000: as -inf they would lie below what masks the keys ahead
    q, k = (jnp.full((1, 4, 1, 8), sign * 200.0, jnp.float16) for sign in (1, -1))
    v = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 1, 8))
    got = attention(q, k, v, HALF, HALF)[0, :, 0, 0]
    np.testing.assert_allclose(np.asarray(got), [0, 0.5, 1, 1.5], atol=1e-3)


@pytest.mark.parametrize("chunk", [2])
def test_the_loss_of_a_large_vocabulary(chunk: int) -> None:
    V = 2**17
    rng = np.random.default_rng(4)
    x = rounded(rng.normal(size=(1, 4, 8)), "f16")
    table = jnp.asarray(rng.normal(size=(8, V)) * 0.1, jnp.float16)
    targets = jnp.asarray([[1, 5, V - 1, 7]])
    policy = parse_policy("p=f32,c=f16,o=f32")

    def loss(x: Any) -> Any:
        return cross_entropy(x, targets, lambda x: jnp.matmul(x, table), policy, chunk=chunk)

    def oracle(x: Any) -> Any:
        logits = x @ np.asarray(table, np.float64)
        picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
        return (np.log(np.exp(logits).sum(-1)) - picked).mean()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(x, jnp.float16))
    assert float(value) == pytest.approx(oracle(x), rel=1e-3)
    # probabilities of 2^-17 are subnormal: a loss scale, as training has
    grad = jax.grad(lambda x: 4096 * loss(x))(jnp.asarray(x, jnp.float16))
    assert relative(grad / jnp.float16(4096), gradient(oracle, x)) < 0.02


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("chunk", [1024, 512])
def test_the_mean_over_many_tokens_in_float16(weighed: bool, chunk: int) -> None:
    B, T, V = 80, 1024, 4
    logits = jnp.zeros((B, T, V), jnp.float16)
    weights = jnp.ones((B, T), jnp.float16) if weighed else None
    loss = cross_entropy(
        logits, jnp.zeros((B, T), int), lambda x: x, HALF, chunk=chunk, weights_BT=weights
    )
    assert loss.dtype == jnp.float16
    assert float(loss) == pytest.approx(np.log(4), rel=1e-3)


def test_a_sum_of_many_chunks_does_not_stand_still_in_bfloat16() -> None:
    policy, tokens = parse_policy("bf16"), 2048
    ids = jnp.zeros((1, tokens), int)
    loss = cross_entropy(jnp.zeros((1, tokens, 4)), ids, lambda x: x, policy, chunk=1)
    assert float(loss) == pytest.approx(np.log(4), rel=2**-7)


def test_gelu_has_a_finite_gradient_at_every_number_of_float16() -> None:
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)]
    each = jax.jit(jax.vmap(jax.value_and_grad(lambda x: activate("gelu", x))))
    y, slope = (np.asarray(a, np.float64) for a in each(x))
    wide = x.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    want = wide * 0.5 * (1 + np.tanh(inner))
    with np.errstate(over="ignore"):
        cosh = np.minimum(np.cosh(np.clip(inner, -300, 300)), 1e100)
    steep = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * wide**2) / cosh**2
    want_slope = 0.5 * (1 + np.tanh(inner)) + 0.5 * wide * steep
    np.testing.assert_allclose(y, want, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(slope, want_slope, atol=4e-3)
