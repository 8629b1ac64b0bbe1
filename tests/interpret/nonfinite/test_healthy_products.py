"""Products of finite numbers under every recipe have no operation that makes an infinity or NaN.

Else `trace_nonfinite` would look at each of them, and `jax_debug_infs` stop at what `where` drops.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.formats.delayed import AmaxHistory
from mpjax.interpret.core.trace import trace
from mpjax.interpret.nonfinite.instrument import InstrumentedProgram
from mpjax.ops import dot_general
from mpjax.precision import get_recipe, recipe_names

pytestmark = pytest.mark.usefixtures("fast_compile")


def made(name: str, a: np.ndarray, b: np.ndarray) -> list[str]:
    """Which operations of a product and its gradients make what is not finite."""
    recipe = get_recipe(name)
    state = AmaxHistory.empty(recipe.history) if recipe.history else None

    def loss(a: Any, b: Any) -> Any:
        y = dot_general(
            a, b, (((1,), (0,)), ((), ())), recipe, key=jax.random.key(0), amax=state
        )  # fmt: skip
        y = y[0] if isinstance(y, tuple) else y
        return jnp.vdot(y, y)

    program = trace("test", jax.grad(loss, (0, 1)), (jnp.asarray(a), jnp.asarray(b)), {})
    watch = InstrumentedProgram(program.closed)
    records, _ = watch(program.args)
    return [watch.sites[found.key].eqn.primitive.name for found in watch.found(records)]


@pytest.mark.parametrize("name", [*recipe_names(), "fixed-q8.8"])
def test_a_product_of_finite_numbers_makes_no_infinity(name: str) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(8, 32)).astype(np.float32)
    a[2] = 0
    b = (rng.normal(size=(32, 16)) * np.exp2(rng.integers(-12, 6, (32, 1)))).astype(np.float32)
    assert made(name, a, b) == []


def test_an_infinity_is_seen() -> None:
    a = np.full((2, 32), 3e38, np.float32)
    assert made("mxfp8", a, np.ones((32, 2), np.float32))
