"""Precision: first match wins, nothing uncovered, nothing unused, and text that loses nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpjax.errors import ConfigError
from mpjax.precision import (
    UPDATE_RULES,
    LossScaleSettings,
    Moments,
    Precision,
    Rule,
    get_precision,
    matches,
    parse_policy,
    policy_text,
)

PATHS = [
    "decoder/embed/tokens",
    "decoder/layers/0/norm_mlp/scale",
    "decoder/layers/0/mlp/up/kernel",
    "decoder/layers/1/norm_mlp/scale",
    "decoder/layers/1/mlp/up/kernel",
    "decoder/head/kernel",
]
POLICIES = [
    parse_policy(f"p=f32,c={c},o={o}")
    for c, o in itertools.product(("f32", "bf16", "f16"), "f32 bf16 f16".split())
]
PATTERNS = ["**", "decoder", "**/norm*", "**/up", "decoder/*", "decoder/layers/0", "**/kernel", "x"]
RULES = st.builds(Rule, st.sampled_from(PATTERNS), st.sampled_from(POLICIES), st.booleans())
SCALES = st.sampled_from(
    ["none", "static:1024", "static:0.1", "dynamic", "dynamic:init=8,growth=1.7,backoff=0.3"]
).map(LossScaleSettings.parse)
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
PRECISIONS = st.builds(
    Precision,
    st.sampled_from(["fp32", "mine", "p=f32,c=bf16,o=f32", "a:b"]),
    st.lists(RULES, max_size=5).map(tuple),
    SCALES,
    st.sampled_from(UPDATE_RULES),
    st.builds(Moments, DTYPES, DTYPES),
    DTYPES,
)


@given(st.lists(RULES, max_size=6), st.sampled_from(PATHS))
def test_the_first_rule_that_matches_decides(rules: list[Rule], path: str) -> None:
    precision = Precision("p", tuple(rules))
    hits = [rule for rule in rules if matches(rule.pattern, path)]
    if hits:
        assert precision.policy(path) == hits[0].policy
    else:
        with pytest.raises(ConfigError, match="no rule of Precision 'p' covers this path"):
            precision.policy(path)


def test_first_match_is_not_last_match_nor_most_specific() -> None:
    broad, narrow = Rule("**", POLICIES[1]), Rule("decoder/head", POLICIES[2])
    assert Precision("p", (broad, narrow)).policy("decoder/head") == POLICIES[1]
    assert Precision("p", (narrow, broad)).policy("decoder/head") == POLICIES[2]


def test_user_rules_stand_before_the_presets_and_new_ones_before_old_ones() -> None:
    once = get_precision("bf16", rules=["**/norm*=bf16", "**/up=fp32"])
    assert [rule.user for rule in once.rules][:3] == [True, True, False]
    assert policy_text(once.policy(PATHS[1])) == "p=f32,c=bf16,o=bf16"  # the preset says c=f32
    assert policy_text(get_precision("bf16").policy(PATHS[1])) == "p=f32,c=f32,o=bf16"
    twice = get_precision(once, rules=["**/norm*=fp16"])
    assert policy_text(twice.policy(PATHS[1])) == "p=f32,c=f16,o=f16"


@given(PRECISIONS)
def test_text_and_json_lose_nothing(precision: Precision) -> None:
    assert get_precision(precision.to_text()) == precision
    assert get_precision(precision.to_json()) == precision
    assert get_precision(json.loads(precision.to_json())) == precision
    assert "\n" not in precision.to_text() + precision.to_json()
    assert hash(get_precision(precision.to_text())) == hash(precision)


@given(PRECISIONS, PRECISIONS)
def test_different_precisions_have_different_texts(a: Precision, b: Precision) -> None:
    assert (a == b) == (a.to_text() == b.to_text()) == (a.to_json() == b.to_json())


@given(PRECISIONS)
def test_the_table_shows_every_rule_and_setting(precision: Precision) -> None:
    lines = str(precision).splitlines()
    rows = [line.split() for line in lines[3:-1]]
    expected = [
        [
            rule.pattern,
            *(part[2:] for part in policy_text(rule.policy).split(",")),
            "user" if rule.user else "preset",
        ]
        for rule in precision.rules
    ]
    assert rows == expected
    assert precision.name in lines[0]
    for text in (precision.loss_scale, precision.update, precision.moments):
        assert str(text) in lines[-1]


def test_the_table_shows_a_long_pattern_whole() -> None:
    pattern = "/".join(["decoder", *["a_rather_long_component"] * 6])
    lines = str(get_precision("fp32", rules=[f"{pattern}=fp32"])).splitlines()
    assert [pattern, "f32", "f32", "f32", "user"] in [line.split() for line in lines]


def test_a_precision_does_not_change_and_is_a_key() -> None:
    precision = get_precision("bf16")
    for field in dataclasses.fields(Precision):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(precision, field.name, getattr(precision, field.name))
    assert {precision: 1}[get_precision("bf16")] == 1
    assert get_precision("bf16", rules=["**/up=fp32"]) != precision


def test_an_uncovered_path_is_named_with_the_patterns_there_are() -> None:
    precision = Precision("mine", (Rule("decoder/layers", POLICIES[0]), Rule("**/up", POLICIES[0])))
    with pytest.raises(ConfigError) as error:
        precision.check(PATHS)
    assert str(error.value) == (
        "decoder/embed/tokens: no rule of Precision 'mine' covers this path; its patterns are"
        " decoder/layers **/up; add '**=POLICY'"
    )
    with pytest.raises(ConfigError, match=r"its patterns are \(none\)"):
        Precision("mine", ()).policy("a")


@pytest.mark.parametrize(
    ("rule", "near"),
    [("**/nrom*=fp32", "**/norm_mlp"), ("decoder/haed=fp32", "**/head"), ("**/mpl=fp32", "**/mlp")],
)
def test_an_unused_user_rule_lists_near_misses(rule: str, near: str) -> None:
    paths = [*PATHS, "decoder/layers/0/norm_mlp", "decoder/layers/0/mlp", "decoder/head"]
    precision = get_precision("bf16", rules=[rule])
    with pytest.raises(ConfigError, match="matches no path of the model; near misses: ") as error:
        precision.check(paths)
    message = str(error.value)
    assert near in message.split("near misses:")[1].split()
    assert "\n" not in message and rule.split("=")[0] in message
    get_precision("bf16", rules=[f"{near}=fp32"]).check(paths)  # the remedy works


def test_an_unused_preset_rule_is_fine_and_the_same_user_rule_is_not() -> None:
    unused = Rule("**/rotary", POLICIES[0], user=False)
    rest = Rule("**", POLICIES[0], user=False)
    Precision("p", (unused, rest)).check(PATHS)
    with pytest.raises(ConfigError, match="matches no path"):
        Precision("p", (dataclasses.replace(unused, user=True), rest)).check(PATHS)


@pytest.mark.parametrize(
    ("rules", "shadow"),
    [
        (["**/head=bf16", "decoder/head=fp32"], "**/head="),
        (["**/up=bf16", "decoder=bf16", "**/kernel=fp32"], "**/up="),  # by two rules together
        (["**/head=fp32", "**/head=fp32"], "**/head="),  # the same twice
    ],
)
def test_a_shadowed_user_rule_names_the_rule_before_it(rules: list[str], shadow: str) -> None:
    with pytest.raises(ConfigError, match="decides no path.*; move it up or drop it") as error:
        get_precision("bf16", rules=rules).check(PATHS)
    assert str(error.value).startswith(f"rule '{rules[-1].split('=')[0]}=")
    assert f"because '{shadow}" in str(error.value)
    get_precision("bf16", rules=rules[:-1]).check(PATHS)  # dropped


def test_a_rule_shadowed_in_part_still_decides_the_rest() -> None:
    precision = get_precision("bf16", rules=["decoder/head=bf16", "**/kernel=fp32"])
    precision.check(PATHS)
    assert policy_text(precision.policy("decoder/head/kernel")) == "p=f32,c=bf16,o=bf16"
    assert policy_text(precision.policy(PATHS[2])) == "p=f32,c=f32,o=f32"


def test_layout_writes_equal_layers_once() -> None:
    precision = get_precision("bf16", rules=["decoder/layers/1/mlp=fp32"])
    assert precision.layout(PATHS[1:5]) == {
        "decoder/layers/norm_mlp/scale": "p=f32,c=f32,o=bf16",
        "decoder/layers/mlp/up/kernel": "p=f32,c=bf16,o=bf16",
        "decoder/layers/1/mlp/up/kernel": "p=f32,c=f32,o=f32",
    }


@pytest.mark.parametrize("policy", ["p=bf16,c=f32,o=f32", "bfloat16", "float16"])
def test_low_weights_need_an_update_rule(policy: str) -> None:
    with pytest.raises(ConfigError, match=r"set update=master \(float32 copy\) or update=nearest"):
        get_precision("bf16", rules=[f"**/up={policy}"])
    for update in ("master", "nearest"):
        assert get_precision("bf16", rules=[f"**/up={policy}"], update=update).update == update


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "stochastc"}, "update: unknown rule 'stochastc'; known: none master nearest"),
        ({"moments": "int3"}, "moments: unknown format 'int3'"),
        ({"gradient_dtype": "f64"}, "gradient_dtype: float64 needs 64-bit types"),
        ({"loss_scale": "dynamc"}, "loss scale: unknown kind 'dynamc'"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        get_precision("fp32", **options)  # type: ignore[arg-type]
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "two words", "tab\there", "{x"])
def test_a_name_is_one_word(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one word"):
        Precision(name, ())


def test_the_table_is_plain_text_whatever_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(get_precision("bf16"))
