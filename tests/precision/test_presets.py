"""Presets by name, and the ways of writing a Precision."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import pytest

from mpjax.errors import ConfigError
from mpjax.optim import DynamicLossScale
from mpjax.precision import (
    LossScaleSettings,
    Moments,
    Precision,
    Rule,
    get_precision,
    parse_policy,
    policy_text,
    preset_names,
    recipe_names,
    register_preset,
)
from mpjax.precision import presets as module

# What the literature fixes: weights, products, norms, logits, loss scale, update.
TABLE = {
    "fp32": ("f32", "f32", "f32", "f32", "none", "none"),
    "bf16": ("f32", "bf16", "f32", "f32", "none", "none"),
    "fp16": ("f32", "f16", "f32", "f32", "dynamic", "none"),
    "low-bf16": ("f32", "bf16", "bf16", "bf16", "none", "none"),
    "low-fp16": ("f32", "f16", "f16", "f16", "dynamic", "none"),
    "pure-bf16": ("bf16", "bf16", "bf16", "bf16", "none", "nearest"),
    "pure-fp16": ("f16", "f16", "f16", "f16", "dynamic", "nearest"),
    # Apex, "Opt levels": O0 float32; O2 float16 weights with float32 norms and master weights,
    # dynamic scale; O3 float16 throughout, no scale.
    "O0": ("f32", "f32", "f32", "f32", "none", "none"),
    "O2": ("f16", "f16", "f32", "f32", "dynamic", "master"),
    "O3": ("f16", "f16", "f16", "f16", "none", "nearest"),
    "pure-bf16-sr": ("bf16", "bf16", "bf16", "bf16", "none", "stochastic"),
    "pure-bf16-kahan": ("bf16", "bf16", "bf16", "bf16", "none", "kahan"),
    "adam8bit": ("f32", "bf16", "f32", "f32", "none", "none"),
    **{name: ("f32", "bf16", "f32", "f32", "none", "none") for name in recipe_names()},
}


def text(precision: Precision, path: str) -> str:
    return policy_text(precision.policy(path))


@pytest.mark.parametrize("name", TABLE)
def test_preset_says_what_its_name_promises(name: str) -> None:
    weight, product, norm, logits, scale, update = TABLE[name]
    precision = get_precision(name)
    assert text(precision, "decoder/layers/0/mlp/up").split(",")[:2] == [
        f"p={weight}",
        f"c={product}",
    ]
    assert text(precision, "decoder/layers/0/norm_mlp").split(",")[1] == f"c={norm}"
    assert text(precision, "decoder/layers/0/attention/softmax").split(",")[1] == f"c={norm}"
    assert text(precision, "decoder/head").endswith(f"o={logits}")
    assert text(precision, "decoder/loss").endswith("o=f32")
    assert (precision.loss_scale.kind, precision.update) == (scale, update)


def test_every_preset_is_in_the_table() -> None:
    assert set(TABLE) == set(preset_names())


@pytest.mark.parametrize("name", TABLE)
def test_preset_round_trips(name: str) -> None:
    precision = get_precision(name)
    assert precision.name == name
    assert get_precision(precision.to_text()) == precision
    assert get_precision(precision.to_json()) == precision
    assert get_precision(precision) == precision


def test_mixed_and_low_precision_are_two_procedures() -> None:
    for low in ("bf16", "fp16"):
        mixed, lowest = get_precision(low), get_precision(f"low-{low}")
        assert text(mixed, "decoder/norm") != text(lowest, "decoder/norm")
        assert text(mixed, "decoder/mlp") == text(lowest, "decoder/mlp")


def test_presets_cover_every_path_without_help() -> None:
    for name in preset_names():
        get_precision(name).check(["x", "a/b/c", "decoder/layers/0/mlp/up/kernel"])


def test_o1_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(ConfigError) as error:
        get_precision("O1")
    assert "mpjax.autocast(fn, 'fp16')" in str(error.value)
    for remedy in ("O2", "fp16"):
        assert remedy in str(error.value)
        get_precision(remedy)


@pytest.mark.parametrize(
    ("wrong", "right"), [("bf61", "bf16"), ("pure-bf-16", "pure-bf16"), ("fp23", "fp32")]
)
def test_an_unknown_preset_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown preset '{wrong}'; did you mean .*{right}"):
        get_precision(wrong)


def test_an_unknown_preset_far_from_all_lists_them() -> None:
    with pytest.raises(ConfigError) as error:
        get_precision("zzz")
    assert all(name in str(error.value) for name in preset_names())
    assert "did you mean" not in str(error.value)


def test_a_policy_keeps_float32_inside_norms_and_softmax() -> None:
    precision = get_precision("p=f32,c=bf16,o=f32")
    assert text(precision, "decoder/mlp") == "p=f32,c=bf16,o=f32"
    assert text(precision, "decoder/norm") == "p=f32,c=f32,o=f32"
    assert precision.loss_scale.kind == "none"
    assert get_precision(precision.to_text()) == precision


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "precision: empty; presets: fp32"),
        ("p=f32,c=bf17", "precision: c: unknown dtype 'bf17'"),
        ("q=f32", "precision: unknown field 'q'"),
        ("bf16 loss-scale=none", "bad word 'loss-scale=none'"),
        ("bf16 rule:", "bad word 'rule:'"),
        ("bf16 fp16", "bad word 'fp16'"),
        ("{", "malformed JSON"),
        ("{}", "JSON must have exactly"),
        ('{"name": "x", "extra": 1}', "extra"),
        ("p=f64", "float64 needs 64-bit types"),
        ("half-baked", "unknown preset"),
    ],
)
def test_malformed_text_is_one_line_that_says_where(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        get_precision(value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_jmp_half_is_a_precision() -> None:
    assert text(get_precision("c=half"), "a/b") == "p=f32,c=f16,o=f16"


def test_a_line_of_text_written_by_hand() -> None:
    precision = get_precision("fp16 rule:**/up=fp32 loss_scale=static:8 moments=first=bf16")
    assert precision == get_precision(
        "fp16", rules=["**/up=fp32"], loss_scale="static:8", moments="first=bf16"
    )


def test_options_as_objects_mean_what_they_mean_as_text() -> None:
    objects = get_precision(
        "O2",
        loss_scale=DynamicLossScale(init=8.0, hysteresis=2),
        moments=Moments(jnp.bfloat16, jnp.float32),
        gradient_dtype=jnp.bfloat16,
    )
    settings = LossScaleSettings("dynamic", init=8.0, hysteresis=2)
    assert objects.loss_scale == settings
    assert objects == get_precision(
        "O2",
        loss_scale="dynamic:init=8,hysteresis=2",
        moments="first=bf16",
        gradient_dtype="bf16",
    )
    assert objects == get_precision(
        "O2", loss_scale=settings, moments="first=bf16", gradient_dtype="bf16"
    )


def test_a_preset_of_ones_own_takes_one_call() -> None:
    register_preset(
        Precision(
            "mine",
            (
                Rule("**/up", parse_policy("c=bf16"), user=False),
                Rule("**", parse_policy("f32"), user=False),
            ),
        )
    )
    mine = get_precision("mine", rules=["**/head=c=bf16"])
    assert text(mine, "a/up") == "p=f32,c=bf16,o=bf16"
    assert text(mine, "a/head") == "p=f32,c=bf16,o=bf16"
    assert "mine" in preset_names()
    assert text(get_precision("fp32", rules=["**/up=mine"]), "a/up") == "p=f32,c=f32,o=f32"
    assert get_precision(mine.to_text()) == mine
    with pytest.raises(ConfigError, match="'mine' is taken"):
        register_preset(Precision("mine", ()))


def test_a_preset_may_be_derived_from_another() -> None:
    derived = get_precision("bf16", rules=["**/head=fp32"], moments="bf16")
    register_preset(dataclasses.replace(derived, name="bf16-head"))
    assert get_precision("bf16-head").rules == derived.rules


@pytest.mark.parametrize("name", ["fp32", "a:b", "a=b", "a,b"])
def test_a_preset_name_is_a_free_word(name: str) -> None:
    with pytest.raises(ConfigError, match="choose another"):
        register_preset(Precision(name, ()))


def test_text_of_a_registered_preset_survives_a_later_change_of_it() -> None:
    line = get_precision("bf16").to_text()
    before = get_precision("bf16")
    module._PRESETS["bf16"] = get_precision("fp32")
    assert get_precision(line) == before != get_precision("bf16")


def test_json_names_its_fields() -> None:
    data = json.loads(get_precision("O2").to_json())
    assert data["update"] == "master" and data["loss_scale"] == "dynamic"
    data["update"] = "nearest"
    assert get_precision(data).update == "nearest"
