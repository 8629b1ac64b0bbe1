"""Schedules: builders, text and JSON, when late turns, and what cannot follow each other."""

from __future__ import annotations

import dataclasses
import json

import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.precision import PrecisionSchedule, Triggers, get_precision, get_schedule, schedule
from mpjax.precision.schedule import dynamic, fixed, late, mixed

ALL = {
    "fixed:bf16": fixed("bf16"),
    "fixed:fp16:bf16": fixed("fp16", "bf16"),
    "mixed:fp8:norm=fp32:layers/0-1=bf16": mixed("fp8", {"norm": "fp32", "layers/0-1": "bf16"}),
    "late:fp8:bf16": late("fp8", "bf16", last=0.1),
    "late:fp8:bf16:0.25": late("fp8", "bf16", last=0.25),
    "dynamic:fp16:fp32": dynamic("fp16", "fp32"),
    "dynamic:p=f32,c=f16,o=f16:bf16:window=7,hold=2": dynamic(
        "p=f32,c=f16,o=f16", "bf16", Triggers(window=7, hold=2)
    ),
}


@pytest.mark.parametrize("text", ALL)
def test_text_and_json_mean_what_the_builders_make(text: str) -> None:
    expected = ALL[text]
    assert get_schedule(text) == expected == get_schedule(expected)
    assert get_schedule(json.loads(json.dumps(expected.to_dict()))) == expected
    assert str(expected).startswith(text.split(":")[0] + ": ") and "\n" not in str(expected)
    assert [other for other in ALL if ALL[other] == expected] == [text]


def test_it_is_reached_as_a_user_writes_it() -> None:
    assert mpjax.precision.schedule is schedule
    assert mpjax.precision.schedule.late("fp8", "bf16", last=0.1) == ALL["late:fp8:bf16"]


@pytest.mark.parametrize(
    ("last", "steps", "turn"),
    [(0.1, 1000, 900), (0.1, 30, 27), (0.5, 9, 4), (0.05, 10, 9), (0.25, 4, 3), (0.99, 100, 1)],
)
def test_late_turns_after_its_share_rounded_to_whole_steps(
    last: float, steps: int, turn: int
) -> None:
    found = late("fp8", "bf16", last=last).over(steps)
    assert found.turn == turn and found == late("fp8", "bf16", last=last, steps=steps)
    assert f"(steps {turn + 1} to {steps})" in str(found)


def test_other_schedules_do_not_ask_for_the_length() -> None:
    assert dynamic("fp16", "fp32").over(9) == dynamic("fp16", "fp32")


def test_mixed_rules_keep_their_order_and_a_word_is_a_part_of_a_path() -> None:
    precision = mixed("fp8", ["norm=fp32", "layers/2=bf16", "**/mlp/up=fp32", "head=fp32"]).first
    layout = precision.layout(
        [
            "decoder/layers/2/norm_mlp",
            "decoder/layers/2/mlp/down",
            "decoder/layers/1/mlp/up",
            "decoder/layers/1/mlp/down",
            "decoder/layers/12/mlp/down",
            "decoder/head",
        ]  # fmt: skip
    )
    assert layout["decoder/layers/norm_mlp"] == "p=f32,c=f32,o=f32"
    assert layout["decoder/layers/mlp/up"] == "p=f32,c=f32,o=f32"
    assert precision.recipe("decoder/layers/2/mlp/down") is None
    assert precision.recipe("decoder/layers/1/mlp/down") is not None
    assert precision.recipe("decoder/layers/12/mlp/down") is not None  # 2 is not 12
    assert all(rule.user for rule in precision.rules[:4])  # a group that matches nothing is told


def test_options_reach_each_precision() -> None:
    found = late("fp8", "bf16").with_options(rules=["**/norm*=fp32"], moments="int8@256")
    assert [str(p.rules[0]) for p in found.precisions] == ["**/norm*=p=f32,c=f32,o=f32"] * 2
    assert [str(p.moments) for p in found.precisions] == ["int8@256"] * 2
    assert late("fp8", "bf16").with_options() == late("fp8", "bf16")


def test_labels_tell_two_of_one_name_apart() -> None:
    other = get_precision("bf16", rules=["**/mlp=fp32"])
    assert late("bf16", other).labels == ("bf16#0", "bf16#1")
    assert late("fp8", "bf16").labels == ("fp8", "bf16")


@pytest.mark.parametrize(
    ("low", "format"),
    [("fp16", "f16"), ("bf16", "bf16"), ("fp8", "e5m2"), ("p=f32,c=f16,o=f16", "f16")],
)
def test_underflow_is_asked_for_the_low_precisions_format(low: str, format: str) -> None:
    assert dynamic(low, "fp32", Triggers(underflow=0.5)).measured == format
    assert dynamic(low, "fp32").measured == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lat:fp8:bf16", ("unknown kind 'lat'", "did you mean late?", "late:LOW:HIGH:SHARE")),
        ("bf16", ("unknown kind 'bf16'", "fixed:LOW")),
        ("", ("unknown kind ''",)),
        ("late", ("0 parts behind late", "write late:LOW:HIGH:SHARE")),
        ("late:fp8", ("1 parts behind late",)),
        ("late:fp8::0.1", ("an empty one",)),
        ("late:fp8:bf16:0.1:2", ("4 parts behind late",)),
        ("late:fp88:bf16:0.1", ("late:fp88:bf16:0.1", "'fp88'", "did you mean fp8")),
        ("late:fp8:bf16:tenth", ("'tenth'", "no number", "late:fp8:bf16:0.1")),
        ("late:fp8:bf16:1.5", ("1.5", "between 0 and 1")),
        ("late:fp8:bf16:nan", ("nan", "between 0 and 1")),
        ("late:bf16:bf16", ("are the same", "or fixed")),
        ("late:pure-bf16:bf16", ("update=nearest", "update=none", "the same update")),
        ("dynamic:adam8bit:bf16", ("moments=int8@256", "moments=f32", "the same moments")),
        ("dynamic:fp16:fp32:widow=3", ("'widow'", "did you mean window?")),
        ("mixed:fp8", ("1 parts behind mixed", "GROUP=VALUE")),
        ("mixed:fp8:norm", ("rule '**/norm*='", "PATTERN=VALUE")),
        ("mixed:fp8:norm=fp23", ("'fp23'",)),
        ("mixed:fp8:layers/3-1=bf16", ("layers 3 to 1 are none", "layers/1-3")),
        ("fixed:bf16:fp23", ("'fp23'", "fixed:bf16:fp23")),
    ],
)
def test_what_is_wrong_is_one_line(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        get_schedule(text)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert str(error.value).startswith("precision schedule")


def test_values_of_another_version_are_refused() -> None:
    with pytest.raises(ConfigError, match="see precisions"):
        get_schedule({k: v for k, v in ALL["fixed:bf16"].to_dict().items() if k != "precisions"})
    with pytest.raises(ConfigError, match="late takes 2 precisions, got 1"):
        PrecisionSchedule("late", (get_precision("bf16"),), last=0.1)


def test_names_of_one_dtype_are_the_same_precision() -> None:
    """The name alone makes no other precision."""
    bf16 = get_precision("bf16")
    with pytest.raises(ConfigError, match="are the same"):
        late(bf16, dataclasses.replace(bf16, name="mine"))
