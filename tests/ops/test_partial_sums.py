"""Products under a recipe whose terms lie on several devices: each casts its sums first."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.models import decoder
from mpjax.ops import Sums, linear
from mpjax.precision import get_recipe, parse_policy
from mpjax.train import parse_mesh
from mpjax.train.sharding import ShardActivations

pytestmark = pytest.mark.usefixtures("fast_compile")
F32 = parse_policy("f32")


def unsharded(x: Any, axes: Any) -> Any:
    del axes
    return x


def operands() -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((48, 128), (128, 64), (48, 64))]


@pytest.mark.parametrize(
    "name", ["fp8", "fp8-row", "fp8-block", "mxfp8", "int8", "int8-switchback"]
)
def test_sums_of_parts_are_the_sums(name: str) -> None:
    x, w, dy = operands()

    def run(sums: Sums | None) -> list[Any]:
        y, back = jax.vjp(
            lambda x, w: linear(
                x, w, F32, recipe=get_recipe(name), key=jax.random.key(1), sums=sums
            ),
            x,
            w,
        )
        return [y, *back(dy)]

    for plain, parts in zip(run(None), run(Sums((4, 2), ("mlp", "mlp"), unsharded)), strict=True):
        np.testing.assert_allclose(parts, plain, atol=2e-6 * float(jnp.abs(plain).max()))


def test_the_sums_have_the_dtype_of_what_they_become() -> None:
    """In a program of `fsdp=4,tensor=2`, before the compiler of a platform widens anything."""
    mesh = parse_mesh("fsdp=4,tensor=2")
    model = decoder("tiny", "fp8", layers=1, width=32, heads=2, vocabulary=96)
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids = jnp.zeros((4, 16), jnp.int32)

    def program(model: Any) -> str:
        def loss(params: Any) -> Any:
            return model.loss(params, {"inputs": ids, "targets": ids})[0]

        return str(jax.make_jaxpr(jax.grad(loss))(params))

    # (parts, tokens, features) -> (tokens, features): out and down, gradients of five inputs
    sums = re.compile(r":(\w+)\[64,32\] = reduce_sum\[axes=\(0,\)")
    assert sums.findall(program(model.sharded(ShardActivations(mesh)))) == ["bf16"] * 7
    assert not sums.findall(program(model))


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_gradients_on_a_mesh_are_as_near_to_float32_as_on_one_device(name: str) -> None:
    sizes: dict[str, Any] = dict(layers=1, width=32, heads=2, vocabulary=64)
    model, exact = decoder("tiny", name, **sizes), decoder("tiny", "fp32", **sizes)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)

    def gradients(model: Any) -> list[Any]:
        def loss(params: Any) -> Any:
            return model.loss(params, {"inputs": ids, "targets": ids}, key=jax.random.key(2))[0]

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    meshed = model.sharded(ShardActivations(parse_mesh("fsdp=4,tensor=2")))
    alone, parts, right = (gradients(m) for m in (model, meshed, exact))

    def apart(found: list[Any]) -> float:
        norm = jnp.linalg.norm
        return max(float(norm(a - b) / norm(b)) for a, b in zip(found, right, strict=True))

    assert 0 < apart(parts) < 1.2 * apart(alone) < 0.25
