"""Recipes: texts, registration, rules that hold them, and what is refused."""

from __future__ import annotations

import pytest

from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.precision import (
    Operand,
    Precision,
    Recipe,
    get_precision,
    get_recipe,
    parse_rule,
    recipe_names,
    register_recipe,
)


def test_the_presets_are_what_their_sources_say() -> None:
    fp8 = get_recipe("fp8")
    assert [o and (o.format, o.scaling) for o in (*fp8.fprop, *fp8.dgrad, *fp8.wgrad)] == [
        ("e4m3", "tensor"), ("e4m3", "tensor"), ("e5m2", "tensor"), ("e4m3", "tensor"),
        ("e4m3", "tensor"), ("e5m2", "tensor"),
    ]  # fmt: skip
    assert get_recipe("fp8-delayed").history == 1024 and fp8.history == 0
    block = get_recipe("fp8-block")
    assert {str(o) for o in block.operands} == {
        "e4m3 block(1x128), scale 2^n up", "e4m3 block(128x128), scale 2^n up",
    }  # fmt: skip
    four = get_recipe("nvfp4")
    assert [o.rounding for o in four.operands] == [
        "nearest", "nearest", "stochastic", "nearest", "nearest", "stochastic",
    ]  # fmt: skip
    assert four.hadamard == 16 and str(four.fprop[1]) == "e2m1 nv(16x16)"
    assert get_recipe("int8-switchback").wgrad == get_recipe("fp8-row-hp").wgrad == (None, None)
    assert all(get_recipe(name).source for name in recipe_names())


def test_a_rule_holds_a_policy_and_a_recipe() -> None:
    assert str(parse_rule("**/mlp=p=f32,c=f16,o=f16,r=int8")) == "**/mlp=p=f32,c=f16,o=f16,r=int8"
    assert str(parse_rule("**/mlp=recipe=mxfp8")) == "**/mlp=p=f32,c=bf16,o=bf16,r=mxfp8"
    for text in ("fp8", "emulate(e3m4)", "fixed-q4.12"):
        assert parse_rule(f"a={text}").recipe == get_recipe(text)
    assert parse_rule("a=bf16").recipe is None


@pytest.mark.parametrize("name", [*recipe_names(), "emulate(e5m1)", "fixed-q8.8"])
def test_a_precision_with_a_recipe_round_trips_and_prints_its_source(name: str) -> None:
    precision = get_precision(name, rules=["decoder/layers/0/mlp/up=bf16", "**/query=r=mxfp4"])
    assert get_precision(precision.to_text()) == precision == get_precision(precision.to_json())
    assert precision.recipe("decoder/layers/1/mlp/up") == get_recipe(name)
    assert precision.recipe("decoder/layers/0/mlp/up") is None
    assert precision.recipe("decoder/layers/0/attention/query") == get_recipe("mxfp4")
    assert precision.recipe("decoder/head") is None
    assert get_recipe(name).source in str(precision)


def test_a_policy_may_carry_a_recipe_and_leaves_the_head_alone() -> None:
    precision = get_precision("p=f32,c=f16,o=f16,r=int8")
    assert precision.recipe("decoder/layers/0/mlp/up") == get_recipe("int8")
    assert precision.recipe("decoder/head") is None
    assert get_precision(precision.to_text()) == precision


def test_a_users_recipe_in_a_few_lines() -> None:
    operand = Operand("e3m4", "block(1x64)")
    mine = Recipe("mine", *(3 * [(operand, operand)]))
    register_recipe(mine)
    model = decoder("tiny", get_precision("bf16", rules=["**/mlp=r=mine"]), layers=1)
    assert model.precision.recipe("decoder/layers/0/mlp/up") is mine
    with pytest.raises(ConfigError, match="'mine' is taken"):
        register_recipe(mine)
    with pytest.raises(ConfigError, match="'fixed-q8.8' is taken"):
        register_recipe(Recipe("fixed-q8.8", *(3 * [(operand, operand)])))


def pairs(operand: Operand) -> tuple[tuple[Operand, Operand], ...]:
    return ((operand, operand),) * 3


MISTAKES = {
    "format: unknown name 'e4m4x'": lambda: Operand("e4m4x"),
    "scaling: unknown 'rows'; write": lambda: Operand("e4m3", "rows"),
    "unknown rounding 'up'": lambda: Operand("e4m3", rounding="up"),
    "scale_rounding: unknown 'near'": lambda: Operand("e4m3", scale_rounding="near"),
    "takes no scale": lambda: Operand("q8.8", "tensor"),
    "e4m3 scales, which integer format int8 does not take": lambda: Operand("int8", "nv(16)"),
    "e8m0 scales, powers of two": lambda: Operand("e4m3", "mx(32)", scale_rounding="none"),
    "holds scales, not values": lambda: Operand("e8m0"),
    "hadamard=12 is not a power of two": lambda: Recipe("a", *pairs(Operand("int8")), hadamard=12),
    "needs tensor scaling of every": lambda: Recipe(
        "a", *pairs(Operand("e4m3", "row")), history=16
    ),
    "chunk=0": lambda: Recipe("a", *pairs(Operand("int8")), chunk=0),
    "name is empty or holds": lambda: Recipe("a b", *pairs(Operand("int8"))),
    "unknown recipe 'mxfp9'; did you mean mxfp8": lambda: parse_rule("a=r=mxfp9"),
    "recipe stands twice": lambda: get_precision("bf16", rules=["a=r=fp8,r=fp8"]),
    "leaf pulls gradients at several scales": lambda: get_precision(
        "fp8-delayed", loss_scale="leaf"
    ),
    "sum their weight gradients in float32": lambda: get_precision("fp8", gradient_dtype="bf16"),
    "decoder/norm has none; it can be given to \\*\\*/down": lambda: decoder(
        "tiny", get_precision("bf16", rules=["**/norm*=r=fp8"]), layers=1
    ),
    "decoder/embed has none": lambda: decoder(
        "tiny", get_precision("bf16", rules=["decoder/embed=r=fp8"]), layers=1
    ),
    "decoder/head: recipe 'fp8-delayed' keeps an amax history": lambda: decoder(
        "tiny", get_precision("bf16", rules=["**/head=r=fp8-delayed"]), layers=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_in_one_line(message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        MISTAKES[message]()
    assert "\n" not in str(error.value)


def test_a_broad_rule_may_hold_a_recipe() -> None:
    model = decoder("tiny", get_precision("bf16", rules=["**/layers=r=fp8"]), layers=1)
    assert isinstance(model.precision, Precision)
    assert model.precision.recipe("decoder/layers/0/attention/out") == get_recipe("fp8")
