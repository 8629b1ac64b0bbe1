"""Each module, operation and layer computes in the dtype that its path's rule names."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest

from experiments.common.stablehlo import products_and_casts
from mpjax.models import Decoder
from mpjax.precision import get_precision
from tests.models.shapes import BATCH, lowered, small
from tests.ops.jaxprs import dtypes

pytestmark = pytest.mark.usefixtures("fast_compile")

# Products of loss and gradients: three of each linear layer; two of attention, each with two more
# in its backward pass. A rule on a parent decides its children too.
LINEAR = ["attention/query", "attention/key", "attention/value", "attention/out"]
MLP = ["mlp/gate", "mlp/up", "mlp/down"]
PRODUCTS = {
    **{f"decoder/layers/0/{name}": 3 for name in (*LINEAR, *MLP)},
    "decoder/layers/0/mlp": 9,
    "decoder/layers/0/attention": 4 * 3 + 6,
    "decoder/layers/0": 7 * 3 + 6,
    "decoder/head": 3,
}


def _operands(model: Decoder) -> dict[str, int]:
    """How many products have operands of each dtype; mixed ones count as `f32+bf16`."""
    found: dict[str, int] = {}
    for key, count in products_and_casts(lowered(model)).items():
        if key.startswith("dot"):
            inputs = re.findall(r"(b?f\d+)>", key.split(" -> ")[0])
            name = "+".join(dict.fromkeys(inputs))
            found[name] = found.get(name, 0) + count
    return found


@pytest.mark.parametrize(
    ("path", "tied"), [*((path, False) for path in PRODUCTS), ("decoder/head", True)]
)
def test_a_rule_on_a_path_changes_the_products_of_that_path(path: str, tied: bool) -> None:
    rule = get_precision("bf16", rules=[f"{path}=p=f32,c=f16,o=f16"])
    model = small(rule, layers=1, tied=tied)
    all_products = 7 * 3 + 6 + 3
    assert _operands(small("bf16", layers=1, tied=tied)) == {"bf16": all_products}
    want = {"bf16": all_products - PRODUCTS[path], "f16": PRODUCTS[path]}
    assert _operands(model) == want


def test_every_path_that_holds_a_product_is_listed() -> None:
    leaves = (path for path in small(layers=1).paths if path.endswith("/kernel"))
    assert {path.removesuffix("/kernel") for path in leaves} <= set(PRODUCTS)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_rule_on_one_layer_acts_there_only(loop: str) -> None:
    rule = get_precision("bf16", rules=["decoder/layers/1/mlp=fp32"])
    # Scanned layers of one segment are one program; here each layer is a segment of its own.
    assert _operands(small(rule, loop=loop)) == {"bf16": 2 * 27 - 9 + 3, "f32": 9}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "low-bf16", "low-fp16", "fp32"])
def test_presets_run_all_products_in_one_dtype(precision: str) -> None:
    low = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[precision.removeprefix("low-")]
    assert _operands(small(precision, layers=1)) == {low: 30}


def _losses(precision: Any, **changes: Any) -> tuple[Any, Any]:
    model = small(precision, layers=1, **changes)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.grad(lambda p: model.loss(p, BATCH)[0]), params


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize(
    ("precision", "wide"),
    [("bf16", True), ("fp16", True), ("O2", True), ("low-bf16", False), ("low-fp16", False)],
)
def test_mixed_presets_keep_sensitive_operations_in_float32(
    precision: str, wide: bool, kind: str
) -> None:
    low = "float16" if precision.endswith(("fp16", "O2")) else "bfloat16"
    loss, params = _losses(precision, kind=kind)
    want = {"float32"} if wide else {low}
    # sums over many terms, and what is made of them, are float32 in float16
    sums = {"float32"} if low == "float16" else want
    assert dtypes("rsqrt", loss, params) == sums  # norms' statistics
    assert dtypes("exp", loss, params) == want  # softmax and loss
    assert dtypes("log", loss, params) == sums  # loss
    # a score is a sum too; of logits the largest
    assert dtypes("reduce_max", loss, params) == want | sums


@pytest.mark.parametrize(
    ("path", "primitive"),
    [
        ("decoder/layers/0/attention/softmax", "exp"),
        ("decoder/loss", "exp"),
        ("decoder/norm", "mul"),
        ("decoder/layers/0/norm_mlp", "mul"),
        ("decoder/layers/0/attention/norm_key", "mul"),
        ("decoder/layers/0/mlp/activation", "logistic"),
    ],
)
def test_a_rule_on_an_operation_changes_its_dtype(path: str, primitive: str) -> None:
    rule = get_precision("bf16", rules=[f"{path}=p=f32,c=f16,o=bf16"])
    before, params = _losses("bf16", qk_norm=True)
    after, _ = _losses(rule, qk_norm=True)
    assert "float16" not in dtypes(primitive, before, params)
    assert "float16" in dtypes(primitive, after, params)


def test_the_residual_stream_has_its_own_rule() -> None:
    rule = get_precision("bf16", rules=["**/residual=fp32", "decoder/embed=p=f32,c=f32,o=f32"])
    model, plain = small(rule, layers=1), small("bf16", layers=1)
    text = [lowered(m).as_text() for m in (plain, model)]
    adds = [len(re.findall(r"stablehlo\.add .*tensor<2x8x16xf32>", t)) for t in text]
    assert adds[1] > adds[0]
