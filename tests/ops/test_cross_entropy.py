"""Cross-entropy against float64, whole and in chunks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.ops import chunk_length, cross_entropy
from mpjax.precision import parse_policy
from tests.ops.jaxprs import dtypes, sizes
from tests.ops.oracle import gradient

B, T, D, V = 2, 6, 3, 11
F32 = parse_policy("f32")
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(B, T, D)) * 3, RNG.normal(size=(D, V)) * 2
Y = RNG.integers(0, V, (B, T))


pytestmark = pytest.mark.usefixtures("fast_compile")


def oracle(x: Any, w: Any, z_loss: float = 0.0, cap: float = 0.0) -> Any:
    logits = x @ w
    logits = cap * np.tanh(logits / cap) if cap else logits
    top = logits.real.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, Y[..., None], -1)[..., 0]
    return (log_z - picked + z_loss * log_z**2).mean()


def ours(x: Any, w: Any, chunk: int = T, **options: Any) -> Any:
    policy = options.pop("policy", F32)
    return cross_entropy(x, jnp.asarray(Y), lambda x: x @ w, policy, chunk=chunk, **options)


X32, W32 = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)
OPTIONS = [{}, {"z_loss": 0.1}, {"logit_cap": 3.0}, {"z_loss": 0.1, "logit_cap": 3.0}]


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradients_against_float64(chunk: int, options: dict[str, float]) -> None:
    names = {"z_loss": "z_loss", "logit_cap": "cap"}
    theirs = {names[key]: value for key, value in options.items()}
    value, (dx, dw) = jax.jit(
        jax.value_and_grad(lambda x, w: ours(x, w, chunk, **options), argnums=(0, 1))
    )(X32, W32)
    assert float(value) == pytest.approx(oracle(X, W, **theirs), rel=1e-6)
    np.testing.assert_allclose(
        np.asarray(dx), gradient(lambda x: oracle(x, W, **theirs), X), atol=2e-6
    )
    np.testing.assert_allclose(
        np.asarray(dw), gradient(lambda w: oracle(X, w, **theirs), W), atol=5e-6
    )


def test_each_option_changes_the_loss() -> None:
    values = [float(ours(X32, W32, **options)) for options in OPTIONS]
    assert len({round(value, 3) for value in values}) == len(OPTIONS)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_large_logits_do_not_overflow(shift: float) -> None:
    w = W32 + jnp.float32(shift)
    want = oracle(X.astype(np.float32).astype(np.float64), np.asarray(w, np.float64))
    assert float(ours(X32, w)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_chunks_never_hold_all_logits(transform: Any) -> None:
    def largest(chunk: int) -> int:
        return max(sizes(jax.jit(transform(lambda x: ours(x, W32, chunk))), X32))

    assert largest(T) == B * T * V  # the negative control: one chunk holds them all
    assert largest(2) == B * 2 * V
    assert largest(1) == max(B * 1 * V, B * T * D)


@pytest.mark.parametrize(
    ("text", "exp", "mean"),
    [
        ("c=f32,o=f32", "float32", "float32"),
        ("c=bf16,o=f32", "bfloat16", "float32"),
        ("bf16", "bfloat16", "bfloat16"),
    ],
)
def test_the_policy_decides_the_dtypes_of_exponential_and_mean(
    text: str, exp: str, mean: str
) -> None:
    x, w = X32.astype(jnp.bfloat16), W32.astype(jnp.bfloat16)

    def call(x: Any) -> Any:
        return ours(x, w, 2, policy=parse_policy(text))

    assert dtypes("exp", call, x) == {exp}
    assert call(x).dtype.name == mean


def test_a_chunk_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss_chunk: 4 does not divide the sequence length 6"):
        chunk_length(B, T, V, 4)
    assert chunk_length(B, T, V, 3) == 3


SIZES = [(8, 1024, 50257), (1, 7, 2**25), (4, 4096, 128256)]


@pytest.mark.parametrize(("batch", "tokens", "vocabulary"), SIZES)
def test_the_automatic_chunk_is_the_largest_that_fits(
    batch: int, tokens: int, vocabulary: int
) -> None:
    divisors = [n for n in range(1, tokens + 1) if tokens % n == 0]
    fitting = [n for n in divisors if batch * n * vocabulary <= 2**24]
    assert chunk_length(batch, tokens, vocabulary) == max(fitting, default=1)
    # A wide head's gradient, which every chunk reads and writes, is twice as many numbers at least.
    wide = [n for n in divisors if batch * n * vocabulary <= max(2**24, 8192 * vocabulary // 2)]
    assert chunk_length(batch, tokens, vocabulary, width=8192) == max(wide, default=1)
