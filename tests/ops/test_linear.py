"""Products, scales, shifts and look-ups against exact numpy, and the dtype of their gradients."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.stablehlo import products_and_casts
from mpjax.ops import linear, look_up, scale_by, shift_by
from mpjax.ops.target import tracing_for
from mpjax.precision import parse_policy
from tests.ops.oracle import NUMPY, rounded

POLICIES = ("f32", "c=bf16", "c=f16", "c=bf16,o=f32", "bf16", "p=bf16,c=f32,o=bf16", "c=f32,o=f16")


def _eighths(seed: int, *shape: int) -> np.ndarray:
    """Numbers that 8 bits hold; sums of their products are exact in float32."""
    return np.random.default_rng(seed).integers(-100, 100, shape) / 8.0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("text", POLICIES)
def test_products_are_exact_and_rounded_once(text: str, transposed: bool) -> None:
    policy = parse_policy(text)
    p, c, o = (np.dtype(d) for d in (policy.param_dtype, policy.compute_dtype, policy.output_dtype))
    # A third makes the casts to the compute dtype matter; eighths keep sums exact.
    x, w, dy = _eighths(0, 2, 3, 16), _eighths(1, 16, 8), _eighths(2, 2, 3, 8)
    x_in = jnp.asarray(x, o)
    kernel = jnp.asarray(w.T if transposed else w, p)
    y, pull = jax.vjp(lambda x, w: linear(x, w, policy, transposed=transposed), x_in, kernel)
    dx, dw = pull(jnp.asarray(dy, y.dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (o, o, p)
    want_dw = x.reshape(-1, 16).T @ dy.reshape(-1, 8)
    np.testing.assert_array_equal(np.asarray(y), (x @ w).astype(o))
    np.testing.assert_array_equal(np.asarray(dx), (dy @ w.T).astype(o))
    np.testing.assert_array_equal(np.asarray(dw), (want_dw.T if transposed else want_dw).astype(p))


@pytest.mark.parametrize("low", ["bf16", "f16"])
def test_operands_are_cast_to_the_compute_dtype(low: str) -> None:
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(4, 32)), rng.normal(size=(32, 8))
    y = linear(
        jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), parse_policy(f"c={low},o=f32")
    )
    cast = rounded(x, low) @ rounded(w, low)
    assert np.abs(cast - x @ w).max() > 1e-4  # the casts matter
    np.testing.assert_allclose(np.asarray(y), cast, rtol=1e-5, atol=1e-6)


def test_float32_against_float64() -> None:
    rng = np.random.default_rng(4)
    x, w, dy = rng.normal(size=(4, 64)), rng.normal(size=(64, 8)), rng.normal(size=(4, 8))
    f32 = parse_policy("f32")
    y, pull = jax.vjp(
        lambda x, w: linear(x, w, f32), *(jnp.asarray(a, jnp.float32) for a in (x, w))
    )
    dx, dw = pull(jnp.asarray(dy, jnp.float32))
    for got, want in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5)


def _weight_product(fn: Any, low: str) -> str:
    """Dtype of the wgrad product, the one of inputs x outputs, read from StableHLO."""
    x, w = jnp.ones((6, 5), NUMPY[low]), jnp.ones((5, 3))
    grad = jax.grad(lambda w, x: jnp.sum(fn(x, w).astype(jnp.float32)))
    lowered = jax.jit(grad).lower(w, x)
    dots = [key for key in products_and_casts(lowered) if key.startswith("dot")]
    found = [d for d in dots if "-> tensor<5x3x" in d or "-> tensor<3x5x" in d]
    assert len(found) == 1, dots
    return found[0].rpartition("x")[2].rstrip(">")


@pytest.mark.parametrize("low", ["bf16", "f16"])
def test_the_weight_gradient_leaves_its_product_in_float32(low: str) -> None:
    policy = parse_policy(f"c={low}")
    assert _weight_product(lambda x, w: x @ w.astype(NUMPY[low]), low) == low  # the control
    assert _weight_product(lambda x, w: linear(x, w, policy), low) == "f32"
    narrow = lambda x, w: linear(x, w, policy, gradient_dtype=NUMPY[low])  # noqa: E731
    with tracing_for("tpu"):
        assert _weight_product(narrow, low) == low


def test_a_float32_weight_gradient_is_worth_it() -> None:
    x, dy = jnp.ones((257, 1), jnp.bfloat16), jnp.ones((257, 1), jnp.bfloat16)
    policy = parse_policy("c=bf16")

    def grad(product: Any) -> float:
        return jax.vjp(lambda w: product(x, w), jnp.ones((1, 1)))[1](dy)[0].item()

    assert grad(lambda x, w: linear(x, w, policy)) == 257.0
    assert grad(lambda x, w: x @ w.astype(jnp.bfloat16)) == 256.0


def _sum_of_ones(fn: Any, weight: Any) -> float:
    """Gradient of a weight that 257 tokens share with cotangent 1; bf16 holds 256 but not 257."""
    y, pull = jax.vjp(fn, weight)
    assert y.dtype == jnp.bfloat16
    return pull(jnp.ones_like(y))[0].ravel()[0].item()


X = jnp.ones((1, 257, 2), jnp.bfloat16)
IDS = jnp.zeros(257, jnp.int32)


@pytest.mark.parametrize(
    ("ours", "plain", "weight"),
    [
        (
            lambda b, dtype: shift_by(X, b, dtype),
            lambda b: X + b.astype(jnp.bfloat16)[None, None],
            jnp.ones(2),
        ),
        (
            lambda s, dtype: scale_by(X, s, dtype),
            lambda s: X * s.astype(jnp.bfloat16)[None, None],
            jnp.ones(2),
        ),
        (
            lambda t, dtype: look_up(t, IDS, jnp.bfloat16, dtype),
            lambda t: jnp.take(t.astype(jnp.bfloat16), IDS, axis=0),
            jnp.ones((3, 2)),
        ),
    ],
    ids=["shift_by", "scale_by", "look_up"],
)
def test_gradients_over_tokens_are_summed_in_float32(ours: Any, plain: Any, weight: Any) -> None:
    np.testing.assert_array_equal(np.asarray(ours(weight, jnp.float32)), np.asarray(plain(weight)))
    assert _sum_of_ones(lambda w: ours(w, jnp.float32), weight) == 257.0
    assert _sum_of_ones(plain, weight) == 256.0
    assert _sum_of_ones(lambda w: ours(w, jnp.bfloat16), weight) == 256.0  # as asked for
    # A low-precision weight cannot hold the sum either, but it is rounded only once.
    low = weight.astype(jnp.bfloat16)
    assert _sum_of_ones(lambda w: ours(w, jnp.float32), low) == 256.0


def test_look_up_gives_rows_and_scatters_their_gradients() -> None:
    table = np.arange(12.0).reshape(6, 2)
    ids = np.array([[1, 4, 1]])
    y, pull = jax.vjp(
        lambda t: look_up(t, jnp.asarray(ids), jnp.float32, jnp.float32),
        jnp.asarray(table, jnp.float32),
    )
    np.testing.assert_array_equal(np.asarray(y), table[ids])
    dy = np.array([[[1.0, 2], [3, 4], [10, 20]]])
    want = np.zeros_like(table)
    np.add.at(want, ids, dy)
    np.testing.assert_array_equal(np.asarray(pull(jnp.asarray(dy, jnp.float32))[0]), want)


@dataclasses.dataclass(frozen=True)
class Noted:
    """A cut of a table on one device, that notes what it is given."""

    seen: list[str] = dataclasses.field(hash=False, compare=False)
    parts: int = 0

    def whole(self, table: Any) -> Any:
        self.seen.append(f"table {table.dtype}")
        return table

    def by_width(self, dy: Any) -> Any:
        self.seen.append(f"dy {dy.dtype}")
        return dy

    def every(self, ids: Any) -> Any:
        self.seen.append("ids")
        return ids

    def replicas(self, rows: int) -> int:
        return self.parts


@pytest.mark.parametrize(
    ("stored", "out", "sent"),
    [("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "bfloat16"),
     ("float32", "float32", "float32"), ("float32", "float16", "uint16")],
)  # fmt: skip
def test_a_table_is_sent_in_the_narrower_dtype_and_is_the_same(
    stored: str, out: str, sent: str
) -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), stored)
    ids, seen = jnp.array([[0, 4, 4], [1, 0, 4]]), list[str]()

    def loss(table: Any, cut: Any) -> Any:
        return jnp.sum(
            look_up(table, ids, jnp.dtype(out), jnp.float32, cut).astype(jnp.float32) ** 2
        )

    plain, cut = (jax.value_and_grad(loss)(table, c) for c in (None, Noted(seen)))
    assert seen == [f"table {sent}", f"dy {out}", "ids"]
    assert plain[0] == cut[0] and jnp.array_equal(plain[1], cut[1])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_are_added_some_at_a_time(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mpjax.ops.linear"], "_ROWS", 5)
    rng = np.random.default_rng(parts)
    ids, dy = rng.integers(0, 6, (4, 8)), rng.integers(-9, 9, (4, 8, 3)).astype(np.float32)
    table = jnp.zeros((6, 3))
    _, pull = jax.vjp(
        lambda t: look_up(t, jnp.asarray(ids), jnp.float32, jnp.float32, Noted([], parts)), table
    )
    want = np.zeros((6, 3))
    np.add.at(want, ids, dy)
    np.testing.assert_array_equal(np.asarray(pull(jnp.asarray(dy))[0]), want)
