"""What users call by itself, in a notebook, compiles as one program and not an operation at a time.

Compilations are counted; an operation takes JAX some 40 ms where it is called by itself first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.formats import quantize, round_to
from mpjax.models import decoder
from mpjax.ops import dot_general

DIMS = (((1,), (0,)), ((), ()))


pytestmark = pytest.mark.usefixtures("fast_compile")


def matrix(rows: int, columns: int) -> Any:
    """Numbers in a shape that no other test has: nothing of it has been compiled."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32))


def programs(call: Callable[[], Any]) -> int:
    """How many programs a call compiles."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(call())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


CALLS = {  # function, shapes of its arrays
    "quantize": (lambda x: quantize(x, "e4m3", "block(1x128)"), [(19, 163)]),
    "offset": (lambda x: quantize(x, "int4", "block(1x32)", offset=True), [(19, 165)]),
    "round_to": (lambda x: round_to(x, "e5m2"), [(19, 169)]),
    "product": (lambda x, w: dot_general(x, w, DIMS, "mxfp8"), [(19, 171), (171, 7)]),
    "init": (decoder("tiny", layers=1, width=34, heads=1, context=19).init, []),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_one(name: str) -> None:
    call, shapes = CALLS[name]
    arrays = [matrix(*shape) for shape in shapes] or [jax.random.key(0)]
    assert programs(lambda: call(*arrays)) == 1


def test_to_dequantise_is_one() -> None:
    assert programs(quantize(matrix(19, 167), "int8", "row").dequantize) == 1


def test_a_product_and_its_gradients_are_four() -> None:
    x, w = matrix(19, 173), matrix(173, 7)

    def pull() -> Any:
        y, back = jax.vjp(lambda x, w: dot_general(x, w, DIMS, "fp8-row"), x, w)
        return back(y)

    assert programs(pull) <= 4


def test_a_second_module_compiles_nothing() -> None:
    x, w = matrix(19, 177), matrix(177, 7)

    def pull(where: str) -> Any:
        product = lambda x, w: dot_general(x, w, DIMS, "fp8-row", where=where)  # noqa: E731
        y, back = jax.vjp(product, x, w)
        return back(y)

    pull("decoder/layers/0/mlp/up")
    assert programs(lambda: pull("decoder/layers/1/mlp/up")) == 0


class Unhashable:
    """A `shard` that a user wrote as a dataclass."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Any, axes: tuple[str | None, ...]) -> Any:
        return x


def test_how_activations_are_cut_is_no_part_of_the_draw() -> None:
    model = decoder("tiny", layers=1, width=38, heads=1, context=19)
    plain = model.init(jax.random.key(0))
    cut = model.sharded(Unhashable())
    assert programs(lambda: cut.init(jax.random.key(0))) == 0
    drawn = cut.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, plain, drawn)


def test_operations_are_counted() -> None:
    """The control: int8 with a scale for each row, an operation at a time."""
    x = matrix(19, 175)
    assert programs(lambda: jnp.round(x / jnp.max(jnp.abs(x), axis=1, keepdims=True) * 127)) >= 4
