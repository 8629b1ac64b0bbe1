"""Products of few bits in the form that a CPU has fast code for; elsewhere as they are written."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.ops.checks import Dims
from mpjax.ops.products.dot import dot
from mpjax.ops.target import tracing_for
from tests.ops.jaxprs import equations

pytestmark = pytest.mark.usefixtures("fast_compile")
# x W, dy W^T, x^T dy with the smaller operand on either side, and with batch axes
CASES: list[tuple[tuple[int, ...], tuple[int, ...], Dims]] = [
    ((5, 7), (7, 3), (((1,), (0,)), ((), ()))),
    ((5, 3), (7, 3), (((1,), (1,)), ((), ()))),
    ((7, 2), (7, 5), (((0,), (0,)), ((), ()))),
    ((7, 5), (7, 2), (((0,), (0,)), ((), ()))),
    ((2, 3, 7, 5), (2, 3, 7, 2), (((2,), (2,)), ((0, 1), (0, 1)))),
    ((7, 2, 5, 4), (2, 4, 7), (((0, 3), (2, 1)), ((1,), (0,)))),
    ((7,), (7, 3), (((0,), (0,)), ((), ()))),
    ((7, 5), (7,), (((0,), (0,)), ((), ()))),
]


def operands(a: tuple[int, ...], b: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    if dtype == jnp.int8:
        return draw.integers(-127, 128, a), draw.integers(-127, 128, b)
    wide = (draw.normal(size=a), draw.normal(size=b))
    low = tuple(np.asarray(jnp.asarray(x, jnp.float32).astype(dtype), np.float64) for x in wide)
    return low[0], low[1]


def by_numpy(a: np.ndarray, b: np.ndarray, dims: Dims) -> np.ndarray:
    (ca, cb), (ba, bb) = dims
    letters = iter("abcdefghijkl")
    left, right = [""] * a.ndim, [""] * b.ndim
    for i, j in (*zip(ba, bb, strict=True), *zip(ca, cb, strict=True)):
        left[i] = right[j] = next(letters)
    for side in (left, right):
        side[:] = [x or next(letters) for x in side]
    out = [left[i] for i in ba] + [x for x in left + right if (x in left) != (x in right)]
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(out)}", a, b)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_products_against_float64(case: Any, dtype: Any) -> None:
    a_shape, b_shape, dims = case
    a, b = operands(a_shape, b_shape, dtype)
    want = by_numpy(a, b, dims)
    for platform in ("cpu", "tpu"):  # the plain form runs on a CPU too, where it has these layouts
        with tracing_for(platform):
            got = dot(jnp.asarray(a).astype(dtype), jnp.asarray(b).astype(dtype), dims)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:4])
def test_a_cpu_emits_float32_and_others_what_is_asked_for(case: Any) -> None:
    a, b = (jnp.ones(shape, jnp.bfloat16) for shape in case[:2])

    def emitted(platform: str, devices: int = 1) -> list[str]:
        with tracing_for(platform, devices=devices):
            eqns = equations(lambda a, b: dot(a, b, case[2], jnp.bfloat16), a, b)
        return [e.outvars[0].aval.dtype.name for e in eqns if e.primitive.name == "dot_general"]

    assert emitted("cpu") == ["float32"] and emitted("tpu") == emitted("gpu") == ["bfloat16"]
    assert emitted("cpu", 8) == ["bfloat16"], "devices add up in the dtype that is asked for"


def test_other_platforms_get_the_plain_product() -> None:
    # the StableHLO, word for word
    for dtype, (a, b, dims) in itertools.product((jnp.bfloat16, jnp.float16), CASES[:5]):
        x, y = jnp.ones(a, dtype), jnp.ones(b, dtype)

        def plain(x: Any, y: Any, dims: Any = dims, dtype: Any = dtype) -> Any:
            return jax.lax.dot_general(x, y, dims, preferred_element_type=dtype)

        def ours(x: Any, y: Any, dims: Any = dims, dtype: Any = dtype) -> Any:
            return dot(x, y, dims, dtype)

        ours.__name__ = plain.__name__
        texts = []
        for function in (plain, ours):
            with tracing_for("tpu"):
                traced = jax.jit(function).trace(x, y)
                texts.append(traced.lower(lowering_platforms=("tpu",)).as_text())
        assert texts[0] == texts[1]


def test_the_left_operand_is_row_major_on_a_cpu() -> None:
    a, b, dims = CASES[3]
    x, y = jnp.ones(a, jnp.bfloat16), jnp.ones(b, jnp.bfloat16)
    text = jax.jit(lambda x, y: dot(x, y, dims)).lower(x, y).as_text()
    assert "LayoutConstraint" in text and "tensor<2x7xbf16>, tensor<7x5xbf16>" in text
