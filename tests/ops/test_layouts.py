"""Products in all kinds of orders of their dimensions; see `benchmarks/numerics/layouts.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpjax.ops.products.dot import dot
from mpjax.precision import recipe_names

sys.path.insert(0, str(Path(__file__).parent))
import layouts

pytestmark = pytest.mark.usefixtures("fast_compile")

# What XLA's CPU backend refuses if it is written as it is (JAX 0.10), and their neighbours.
REFUSED = ("b0c0x0|c0b0y0", "b0c0x0|y0b0c0", "c0x0|c0y0y1", "c0x0|y0c0y1")
OTHERS = ("x0c0|c0y0", "x0c0|y0c0", "c0x0|c0y0", "c0|c0", "x0|y0", "x0c0|c0", "c0|c0y0",
          "b0x0c0|b0c0y0", "c0c1x0|c1c0", "x0b0c0b1|b1y0b0c0")  # fmt: skip


def chosen(*names: str) -> list[Any]:
    known = {layouts.spelled(pair): pair for pair in layouts.orders(4)}
    return [known[name] for name in names]


def test_the_orders_are_counted() -> None:
    assert [len(layouts.orders(rank)) for rank in (0, 1, 2)] == [1, 6, 35]


def test_every_kind_of_order_runs_in_bfloat16_under_maps() -> None:
    pairs = chosen(*REFUSED, *OTHERS)
    make = lambda dims: lambda a, b: dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dims)  # noqa: E731
    transforms = [layouts.TRANSFORMS[:3]] * len(pairs)
    assert max(layouts.errors(pairs, make, transforms)) < 0.01


@pytest.mark.parametrize("names", [recipe_names()])
def test_every_recipe_runs_what_the_backend_refuses(names: tuple[str, ...]) -> None:
    pairs = chosen("b0c0x0|c0b0y0", "c0x0|y0c0y1")
    for number, name in enumerate(names):
        turns = [[layouts.TRANSFORMS[(number + i) % 4]] for i in (0, 1)]
        assert max(layouts.errors(pairs, layouts.by_recipe(name), turns)) < layouts.bar(name), name


def test_transposes_around_a_product_are_kept_out_of_it() -> None:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((16, 32), (16, 8)))
    dims = (((1,), (0,)), ((), ()))

    @jax.jit
    def both(a: Any, b: Any) -> Any:
        out = dot(a.T, b, dims).T
        wide = (x.astype(jnp.float32) for x in (b, a))
        return out, lax.dot_general(*wide, (((0,), (0,)), ((), ())), precision="highest")

    got, want = both(a, b)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_other_platforms_see_the_plain_product() -> None:
    a = jnp.ones((2, 16, 32), jnp.bfloat16)
    dims = (((0, 1), (0, 1)), ((), ()))
    traced = jax.jit(lambda a, b: dot(a, b, dims)).trace(a, a)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    for held in ("optimization_barrier", "reduce_precision"):
        assert {p for p, text in texts.items() if held in text} == {"cpu"}
    assert all(text.count("dot_general") == 1 for text in texts.values())


@pytest.mark.parametrize(
    ("name", "order"), [("fp8-block", "b0x0x1c0|b0y0c0"), ("mxfp8", "b0b1c0x0|c0b0b1y0")]
)
def test_a_gradient_that_is_transposed_does_not_end_the_process(name: str, order: str) -> None:
    (error,) = layouts.errors(chosen(order), layouts.by_recipe(name), [["grad"]])
    assert error < layouts.bar(name)


def test_a_result_that_is_transposed_runs() -> None:
    # as attention's scores; XLA folded the transpose into the product, and had nothing to run it
    a, b = (jax.random.normal(jax.random.key(i), (2, 4, 3, 8), jnp.bfloat16) for i in range(2))

    def scores(a: Any, b: Any) -> Any:
        y = dot(a, b, (((3,), (3,)), ((0, 1), (0, 1))))
        return jnp.swapaxes(y, 2, 3)

    right = np.einsum("bhxc,bhyc->bhyx", np.float64(a), np.float64(b))
    assert np.allclose(jax.jit(scores)(a, b), right, atol=1e-5)
