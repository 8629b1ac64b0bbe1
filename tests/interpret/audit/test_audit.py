"""What an audit counts: FLOPs, bytes, casts, sums and donation; and how it prints."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import mpjax
from mpjax.errors import ConfigError
from mpjax.interpret.audit.audit import assert_low_precision, audit
from mpjax.interpret.audit.hlo import read
from tests.interpret.audit.clean import linen_encoder
from tests.interpret.audit.leaky import LOW, PLANTS, W, X, wide
from tests.interpret.audit.stablehlo import product_flops
from tests.models.shapes import BATCH, small

pytestmark = pytest.mark.usefixtures("fast_compile")
F32 = jnp.float32
# dtypes as StableHLO spells them
SHORT = {
    **{"float32": "f32", "bfloat16": "bf16"},
    **{"float8_e4m3fn": "f8E4M3FN", "float8_e5m2": "f8E5M2"},
}


def low(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, LOW)


@pytest.mark.parametrize(
    ("fn", "shapes", "flops"),
    [
        (lambda x, w: x @ w, ((3, 4), (4, 5)), 2 * 3 * 4 * 5),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), ((2, 3, 4), (2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (lambda x, w: jnp.einsum("i,j->ij", x, w), ((3,), (4,)), 2 * 3 * 4),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            ((2, 6, 7, 4), (3, 2, 4, 5)),
            2 * (2 * 4 * 6 * 5) * (3 * 2 * 4),
        ),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
            ),
            ((2, 7, 4), (3, 2, 6)),
            2 * (2 * 3 * 6) * (3 * 2),
        ),
        (
            lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 2], jnp.int32)),
            ((3, 4), (2, 4, 5)),
            2 * 3 * 4 * 5,
        ),
    ],
)
def test_product_flops(fn: Any, shapes: Any, flops: int) -> None:
    report = audit(fn, *(low(*shape) for shape in shapes))
    assert report.flops == report.by_dtype["bfloat16"].products == flops
    assert [p.operands for p in report.products] == [("bfloat16", "bfloat16")]


def test_flops_of_a_decoder_are_those_of_its_stablehlo() -> None:
    model = small("bf16", loss_chunk=8)
    params = jax.eval_shape(model.init, jax.random.key(0))
    step = jax.value_and_grad(lambda p: model.loss(p, BATCH)[0])
    report = audit(step, params)
    counted = product_flops(jax.jit(step).lower(params).as_text())
    assert sum(counted.values()) == report.flops
    assert counted["bf16", "bf16"] == report.by_dtype["bfloat16"].products
    layers = [p for p in report.by_path if p.startswith("decoder/layers/")]
    assert len({p.split("/")[2] for p in layers}) == 2
    sums = [sum(c.products for c in dtypes.values()) for dtypes in report.by_path.values()]
    assert sum(sums) == report.flops


def test_paths_are_the_same_forward_recomputed_and_backward() -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fn, args = linen_encoder()
        products = audit(fn, *args).products
    paths: dict[str, set[str]] = {}
    for product in products:
        paths.setdefault(product.direction, set()).add(product.path)
    assert len(paths["forward"]) == 2 * 6 + 1
    assert paths["backward"] == paths["forward"] > paths["recomputed"]


def test_loops_count_as_often_as_they_run() -> None:
    def inner(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]

    def outer(x: Any, ws: Any) -> Any:
        return lax.scan(jax.checkpoint(lambda x, w: (inner(x, w), None)), x, ws)[0]

    one, x = 2 * 4 * 8 * 8, low(4, 8)
    assert audit(outer, x, low(5, 8, 8)).flops == 15 * one
    report = audit(lambda x, ws: jax.grad(lambda ws: jnp.sum(outer(x, ws)))(ws), x, low(5, 8, 8))
    times = {d: sum(p.times for p in report.products if p.direction == d) for d in
             ("forward", "recomputed", "backward")}  # fmt: skip
    assert times == {"forward": 15, "recomputed": 15, "backward": 30}


def test_branches_whiles_and_shards_say_how_they_count() -> None:
    w = low(8, 8)
    both = audit(lambda w: lax.cond(w[0, 0] > 0, lambda w: w @ w, lambda w: w @ w.T, w), w)
    assert both.flops == 2 * 2 * 8**3
    assert any("branch" in note for note in both.notes)
    loop = audit(lambda w: lax.while_loop(lambda w: w[0, 0] > 0, lambda w: w @ w, w), w)
    assert loop.flops == 2 * 8**3
    assert any("while" in note for note in loop.notes)
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    by = PartitionSpec("data")
    sharded = jax.shard_map(lambda x: x @ jnp.ones((8, 8), LOW), mesh=mesh, in_specs=by,
                            out_specs=by)  # fmt: skip
    assert audit(sharded, low(16, 8)).flops == 2 * 16 * 8 * 8


def test_bytes_are_counted_by_the_dtype_of_each_array() -> None:
    report = audit(lambda x: x.astype(F32) * 2.0, low(3, 4))
    assert report.by_dtype["bfloat16"].bytes == 12 * 2  # read by the cast
    assert report.by_dtype["float32"].bytes == 12 * 4 * 3 + 4  # cast written, read, product, 2.0
    assert report.by_dtype["float32"].others == 12


def test_output_is_the_dtype_in_which_a_product_goes_on() -> None:
    def model(x: Any, w: Any) -> Any:
        y = lax.dot(x, w, preferred_element_type=F32)
        return y.astype(LOW)

    (product,) = audit(model, low(2, 3), low(3, 4)).products
    assert (product.accumulation, product.output) == ("float32", "bfloat16")

    def both(x: Any, w: Any) -> Any:
        y = lax.dot(x, w, preferred_element_type=F32)
        return y, y.astype(LOW)

    (product,) = audit(both, low(2, 3), low(3, 4)).products
    assert (product.accumulation, product.output) == ("float32", "float32")


def test_products_of_forward_mode_count() -> None:
    def product(x: Any, w: Any) -> Any:
        return mpjax.dot_general(x, w, (((1,), (0,)), ((), ())), "fp8")

    x, w = jnp.ones((4, 8)), jnp.ones((8, 16))
    found = mpjax.audit(lambda x, w: jax.jvp(product, (x, w), (x, w)), x, w)
    assert sum(p.flops for p in found.products) == 3 * 2 * 4 * 8 * 16  # x W, dx W, x dW
    assert {p.line.split(":")[0] for p in found.products} == {__file__}  # not a line of ours


def test_double_casts() -> None:
    def model(x: Any, y: Any) -> Any:
        rounded = x.astype(LOW).astype(F32)
        widened = y.astype(F32).reshape(4, 3).astype(LOW)
        return rounded, widened, jnp.sin(x.astype(jnp.float16)), jnp.cos(x.astype(jnp.float16))

    def clean(x: Any, y: Any) -> Any:
        return jnp.sin(x.astype(LOW)).astype(F32), jnp.sin(y.astype(F32)).astype(LOW)

    found = [f.what for f in audit(model, wide(3, 4), low(3, 4)).double_casts]
    assert found[:2] == ["float32 -> bfloat16 -> float32", "bfloat16 -> float32 -> bfloat16"]
    assert "float32 -> float16, made before" in found[2]
    assert len(found) == 3
    assert audit(clean, wide(3, 4), low(3, 4)).double_casts == ()


def test_dead_casts() -> None:
    def model(x: Any) -> Any:
        x.astype(F32)
        back = x.astype(jnp.float64 if jax.config.jax_enable_x64 else F32).astype(LOW)
        used = jnp.exp(x).astype(F32)
        return back, used, used.astype(LOW)

    def rounded(x: Any) -> Any:
        return x.astype(LOW).astype(F32)  # this changes numbers, so it is not dead

    assert audit(rounded, wide(3)).dead_casts == ()
    found = audit(model, low(3)).dead_casts
    assert [f.what for f in found] == [
        "bfloat16 -> float32, never used",
        "bfloat16 -> float32, cast straight back",
    ]
    lines = [int(f.line.split(".py:")[1].split(" ")[0]) for f in found]
    assert lines[1] == lines[0] + 1


def test_low_reductions() -> None:
    def model(x: Any) -> Any:
        low_sum = lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None)
        return low_sum, lax.cumsum(x), jnp.sum(x), jnp.mean(x), jnp.max(x)

    def bias(x: Any, b: Any) -> Any:
        return jnp.sum((x + jnp.broadcast_to(b, x.shape)).astype(F32))

    found = audit(model, low(4, 3)).low_reductions
    assert [f.what for f in found] == ["reduce_sum in bfloat16", "cumsum in bfloat16"]
    gradient = audit(jax.grad(bias, argnums=1), low(4, 3), low(1, 3)).low_reductions
    assert [(f.what, f.direction) for f in gradient] == [("reduce_sum in bfloat16", "backward")]


def test_missing_donation() -> None:
    big, small_one = wide(512, 1024), wide(4)

    def step(params: Any, opt: Any, batch: Any) -> Any:
        return params + batch[0], opt + batch[0]

    named = audit(jax.jit(step), big, big, small_one).missing_donation
    assert [(d.name, d.array, d.size) for d in named] == [
        ("args[0]", "float32[512,1024]", 2**21),
        ("args[1]", "float32[512,1024]", 2**21),
    ]
    half = audit(jax.jit(step, donate_argnums=0), big, big, small_one).missing_donation
    assert [d.name for d in half] == ["args[1]"]
    both = jax.jit(step, donate_argnums=(0, 1))
    assert audit(both, big, big, small_one).missing_donation == ()
    assert audit(step, big, big, small_one).missing_donation == ()
    assert audit(jax.jit(step), wide(8), wide(8), small_one).missing_donation == ()  # small

    def merge(a: Any, b: Any) -> Any:
        return a + b

    one = audit(jax.jit(merge), big, big).missing_donation
    assert [d.name for d in one] == ["args[0]"]  # one output takes one input's memory
    assert audit(jax.jit(merge, donate_argnums=1), big, big).missing_donation == ()


def leaky_report(**options: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return audit(PLANTS["forgetful_norm"].fn, PLANTS["forgetful_norm"].weights, X, **options)


def test_it_prints_plain_text_and_markdown() -> None:
    report = leaky_report()
    text, markdown = str(report), report.to_markdown()
    assert "\x1b" not in text
    assert text.startswith("Audit: product FLOPs 100.0% float32; 1 leaks")
    for section in ("Leaks", "By dtype", "By module path", "Products"):
        assert section in text
        assert f"## {section}" in markdown
    assert "leaky.py:" in text
    assert "/leaky.py" not in text.split("Products")[0]  # folders would fill the table
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_the_dictionary_is_json() -> None:
    report = leaky_report()
    found = json.loads(json.dumps(report.to_dict()))
    assert found["leaks"][0]["mechanism"] == "cast"
    assert found["leaks"][0]["products"][0]["operands"] == ["float32", "bfloat16"]
    assert found["by_dtype"]["float32"]["products"] == report.flops
    assert found["compiled"] is None


def test_compiled_reads_the_optimised_program() -> None:
    report = leaky_report(compiled=True)
    assert report.compiled is not None
    assert report.compiled.backend == "cpu"
    assert sum(report.compiled.products.values()) >= 2
    assert "no oracle of dtype" in str(report)
    assert "Optimised HLO on cpu" in report.to_markdown()


def test_hlo_is_read_with_operand_dtypes() -> None:
    text = """ENTRY %main (a: bf16[4,4], b: f32[4,4]) -> f32[4,4] {
      %a = bf16[4,4]{1,0} parameter(0)
      %b = f32[4,4]{1,0} parameter(1)
      %c = f32[4,4]{1,0} convert(%a)
      %i = s32[4,4]{1,0} convert(%b)
      %g = bf16[4,4]{1,0} custom-call(%a, %a), custom_call_target="__cublas$gemm"
      ROOT %d = f32[4,4]{1,0} dot(%c, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }"""
    found = read(text, "gpu")
    assert found.products == {"bf16 x bf16 -> bf16": 1, "f32 x f32 -> f32": 1}
    assert found.converts == {"bf16 -> f32": 1}
    assert found.dtypes == {"bf16": 2, "f32": 3, "s32": 1}


def test_arguments_may_be_anything_that_a_function_takes() -> None:
    def model(params: Any, x: Any, *, scale: float, compute: str) -> Any:
        return x.astype(compute) @ params["w"].astype(compute) * scale

    report = audit(model, {"w": W}, X, scale=2.0, compute="bfloat16")
    assert report.share("bfloat16") == 1.0
    report = audit(lambda compiled_by: compiled_by @ compiled_by, compiled_by=W)
    assert len(report.products) == 1


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="audit: 3 is not a function"):
        audit(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="audit: .*cannot be traced"):
        audit(lambda x: x if x[0, 0] > 0 else -x, W)
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ConfigError, match=r"audit: args\[0\] was donated"):
        audit(lambda x: x, gone)


def one_layer(recipe: str) -> Any:
    """A product of (8, 32) by (32, 16) as a recipe multiplies it, and its gradients."""

    def value(x: Any, w: Any) -> Any:
        numbers = (((1,), (0,)), ((), ()))
        return jnp.sum(mpjax.dot_general(x, w, numbers, recipe=recipe))

    # int8 rounds its gradients at random: loops, which StableHLO's text does not count
    return value if recipe == "int8" else jax.value_and_grad(value, (0, 1))


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_branch_of_one_platform_counts(recipe: str, platform: str) -> None:
    """The products are those of the program that JAX lowers for this platform."""
    step, args = one_layer(recipe), (wide(8, 32), wide(32, 16))
    report = audit(step, *args, platform=platform)
    lowered = jax.jit(step).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    counted = product_flops(lowered)
    assert sum(counted.values()) == (1 if recipe == "int8" else 3) * 2 * 8 * 32 * 16
    integers = counted.pop(("i8", "i8"), 0)  # an audit counts none of these, and says so
    assert (recipe == "int8") == (integers > 0) == any("integers" in n for n in report.notes)
    by_operands: dict[Any, int] = {}
    for product in report.products:
        pair = tuple(SHORT[name] for name in product.operands)
        by_operands[pair] = by_operands.get(pair, 0) + product.flops
    assert by_operands == dict(counted)
    assert (("f8E4M3FN", "f8E4M3FN") in counted) == (recipe == "fp8" and platform == "cuda")
    if platform == "cpu":
        assert str(audit(step, *args)) == str(report)  # here


def test_platforms_inside_of_control_flow() -> None:
    def by_platform(x: Any) -> Any:
        return lax.platform_dependent(
            x, cuda=lambda x: x @ x @ x, cpu=lambda x: x @ x, default=lambda x: x + x
        )

    x, one = low(4, 4), 2 * 4**3
    scan = lambda x: lax.scan(lambda c, _: (by_platform(c), None), x, None, length=3)[0]  # noqa: E731
    inside = jax.checkpoint(jax.jit(scan))
    for fn, times in ((by_platform, 1), (scan, 3), (inside, 3), (jax.vmap(scan), 6)):
        given = low(2, 4, 4) if times == 6 else x
        for platform, products in (("cpu", 1), ("cuda", 2), ("rocm", 0), (None, 1)):
            assert audit(fn, given, platform=platform).flops == products * times * one
    report = audit(lambda x: lax.cond(x[0, 0] > 0, by_platform, lambda x: x @ x.T, x), x)
    assert report.flops == 2 * one  # a branch that the numbers choose counts as ever
    assert len(report.notes) == 2
    assert_low_precision(by_platform, x, platform="cuda")
    with pytest.raises(ConfigError, match="audit: platform='gpu'; known: cpu cuda rocm tpu"):
        audit(by_platform, x, platform="gpu")
