"""Language models of four libraries, unmodified: all of their products run low under autocast."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.interpret.audit.audit import audit
from mpjax.interpret.autocast.autocast import autocast
from mpjax.interpret.core.named import named
from tests.interpret.audit.stablehlo import low_share, product_flops

pytestmark = pytest.mark.usefixtures("fast_compile")

LIBRARIES = ("linen", "nnx", "equinox", "haiku")
SHAPE = {"vocabulary": 31, "width": 16, "layers": 1, "heads": 2, "context": 8}
BATCH = 3
LOW = {"bf16": ("bf16", "bf16"), "fp16": ("f16", "f16")}


def library(name: str) -> Any:
    return importlib.import_module(f"tests.interpret.models.{name}")


def loss_of(apply: Any) -> Any:
    def loss(weights: Any, ids: Any, targets: Any) -> Any:
        logits = apply(weights, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss


def batch() -> tuple[jax.Array, jax.Array]:
    ids = np.random.default_rng(0).integers(0, SHAPE["vocabulary"], (BATCH, SHAPE["context"] + 1))
    return jnp.asarray(ids[:, :-1], jnp.int32), jnp.asarray(ids[:, 1:], jnp.int32)


def counted(loss: Any, weights: Any) -> Counter[tuple[str, str]]:
    """Product FLOPs of one training step."""
    step = jax.jit(jax.value_and_grad(loss))
    return product_flops(step.lower(weights, *batch()).as_text())


def by_hand() -> int:
    """Product FLOPs of one training step: forward, and twice that backward."""
    width, tokens = SHAPE["width"], BATCH * SHAPE["context"]
    weights = SHAPE["layers"] * 12 * width * width + width * SHAPE["vocabulary"]
    attention = SHAPE["layers"] * 2 * SHAPE["context"] * width
    return 3 * 2 * tokens * (weights + attention)


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_product_of_a_step_runs_low(name: str) -> None:
    weights, apply = library(name).build(SHAPE, 0)
    loss = loss_of(apply)
    assert counted(loss, weights) == {("f32", "f32"): by_hand()}, "the count sees all products"
    for precision, dtypes in LOW.items():
        assert counted(autocast(loss, precision), weights) == {dtypes: by_hand()}
    report = audit(jax.value_and_grad(autocast(loss, "bf16")), weights, *batch())
    assert report.flops == by_hand() and report.share("bfloat16") == 1 and not report.leaks


@pytest.mark.parametrize("name", ("linen", "equinox"))
def test_a_step_is_near_that_of_float32(name: str) -> None:
    weights, apply = library(name).build(SHAPE, 0)
    loss = loss_of(apply)

    @jax.jit
    def both(weights: Any, *args: Any) -> Any:
        return [jax.value_and_grad(fn)(weights, *args) for fn in (loss, autocast(loss, "bf16"))]

    (exact, gradients), (low, found) = both(weights, *batch())
    assert low.dtype == exact.dtype and low != exact and abs(low / exact - 1) < 0.01
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(found), strict=True))
    assert all(a.dtype == b.dtype == jnp.float32 for a, b in pairs)
    # 2^-9 a rounding, some tens of roundings in a row.
    error = optax.tree.norm([a - b for a, b in pairs]) / optax.tree.norm(gradients)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_rule_by_path_leaves_attention_in_float32(name: str) -> None:
    of = library(name)
    weights, apply = (
        of.functional(named(of.model(SHAPE, 0))) if hasattr(of, "model") else of.build(SHAPE, 0)
    )
    kept = autocast(loss_of(apply), "bf16", rules=["**/attention=fp32"])
    width, tokens = SHAPE["width"], BATCH * SHAPE["context"]
    flops = 6 * tokens * SHAPE["layers"] * (4 * width * width + 2 * SHAPE["context"] * width)
    found = counted(kept, weights)
    assert found == {("f32", "f32"): flops, ("bf16", "bf16"): by_hand() - flops}
    assert low_share(found) < 0.99 and math.isclose(low_share(found), 1 - flops / by_hand())


CALLS = """module @jit_f {
  func.func public @main(%arg0: tensor<2x3xf32>) -> tensor<2x5xf32> {
    %0 = call @inner(%arg0, %1) : (tensor<2x3xf32>, tensor<3x5xbf16>) -> tensor<2x5xf32>
    %2 = call @inner(%arg0, %1) : (tensor<2x3xf32>, tensor<3x5xbf16>) -> tensor<2x5xf32>
  }
  func.func private @inner(%arg0: tensor<2x3xf32>, %arg1: tensor<3x5xbf16>) -> tensor<2x5xf32> {
    %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : LINE
  }
}"""


def test_the_count_follows_calls_and_refuses_what_it_cannot_read() -> None:
    text = CALLS.replace("LINE", "(tensor<2x3xf32>, tensor<3x5xbf16>) -> tensor<2x5xf32>")
    assert product_flops(text) == {("f32", "bf16"): 2 * 2 * (2 * 3 * 5)}
    assert low_share(product_flops(text)) == 0
    with pytest.raises(ValueError, match="cannot be read"):
        product_flops(CALLS)
    with pytest.raises(ValueError, match="a loop"):
        product_flops(text.replace("%2 = call @inner", "%2 = stablehlo.while"))
    x, w = jnp.ones((1, 6, 5, 4)), jnp.ones((3, 2, 2, 8))

    def conv(x: Any, w: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    found = product_flops(jax.jit(conv).lower(x, w).as_text())
    assert found == {("f32", "f32"): 2 * (4 * 4 * 8) * (3 * 2 * 2)}
