"""Settings of the loss scale: text that loses nothing, and values that would never come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpjax.errors import ConfigError
from mpjax.precision import LossScaleSettings, get_precision

SCALE = st.floats(2.0**-20, 2.0**20)


@given(
    st.sampled_from(["static", "dynamic"]),
    SCALE,
    st.floats(1.0, 16.0, exclude_min=True),
    st.floats(2.0**-10, 1.0, exclude_max=True),
    st.integers(1, 10**6),
    st.integers(1, 9),
)
def test_dynamic_text_round_trips(kind, init, growth, backoff, interval, hysteresis) -> None:
    settings = LossScaleSettings(
        "dynamic", init, growth, backoff, interval, hysteresis, init / 4, init * 4
    )
    assert LossScaleSettings.parse(str(settings)) == settings
    static = LossScaleSettings("static", init)
    assert LossScaleSettings.parse(str(static)) == static


WORDS = st.text("abcz/*?_0", min_size=1, max_size=8)


@given(
    st.sampled_from(["float16", "e5m2", "e4m3", "bfloat16", "e3m4"]),
    st.floats(2.0**-6, 2.0**6),
    st.floats(0, 0.999999),
    SCALE,
    st.booleans(),
    st.lists(WORDS, unique=True, max_size=3),
)
def test_logmax_and_leaf_text_round_trips(name, c, decay, init, pow2, groups) -> None:
    fields = dict(init=init, min_scale=init / 2, max_scale=init * 2)
    logmax = LossScaleSettings(
        "logmax", **fields, format=name, deviations=c, decay=decay, power_of_two=pow2
    )
    leaf = LossScaleSettings("leaf", **fields, hysteresis=2, groups=tuple(groups))
    for settings in (logmax, leaf):
        assert LossScaleSettings.parse(str(settings)) == settings
        precision = get_precision("fp16", loss_scale=str(settings))
        assert precision.loss_scale == settings and str(settings) in str(precision)
        assert get_precision(precision.to_text()) == precision == get_precision(precision.to_json())


def test_short_texts_stay_short() -> None:
    for text in ("logmax", "logmax:format=e5m2,c=3", "leaf", "leaf:groups=**/embed|**"):
        assert str(LossScaleSettings.parse(text)) == text
    assert LossScaleSettings.parse("logmax").init == 1 and LossScaleSettings("leaf").init == 2**16


def test_defaults_are_those_of_torch_with_the_bounds_of_apex_and_jmp() -> None:
    assert LossScaleSettings.parse("dynamic") == LossScaleSettings(
        "dynamic", 65536.0, 2.0, 0.5, 2000, 1, 1.0, 16777216.0
    )
    assert str(LossScaleSettings("dynamic")) == "dynamic"
    assert str(LossScaleSettings("static", 1024)) == "static:1024"
    assert str(LossScaleSettings()) == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown kind ''"),
        ("dynamc", "unknown kind 'dynamc'; known: none, static:SCALE"),
        ("static", "static needs its scale, such as static:1024"),
        ("static:interval=3", "unknown field 'interval=3'"),
        ("static:-1", "init=-1.0 is not a positive finite number"),
        ("static:inf", "init=inf is not a positive finite number"),
        ("static:nan", "init=nan is not a positive finite number"),
        ("none:init=3", "unknown field 'init=3'"),
        ("dynamic:64", "unknown field '64'"),
        ("dynamic:int=64", "with KEY in init growth backoff interval hysteresis min max"),
        ("dynamic:init=big", "init='big' is not a number"),
        ("logmax:format=float61", "format: unknown name 'float61'; did you mean"),
        ("logmax:format=int8", "format=int8 is not a floating-point format"),
        ("logmax:c=0", "c=0.0 is not a positive finite number"),
        ("logmax:c=x", "c='x' is not a number; write c=4"),
        ("logmax:decay=1", "decay=1.0 is not in 0 .. 0.999999; write decay=0.99"),
        ("logmax:pow2=2", "pow2=2.0 is neither 0 nor 1"),
        ("logmax:hysteresis=2", "KEY in init growth backoff interval min max format c decay pow2"),
        ("logmax:init=0.5", "init=0.5 lies outside min=1 .."),
        ("leaf:c=4", "init growth backoff interval hysteresis min max groups"),
        ("leaf:groups=a|a", "the group 'a' is empty, stands twice"),
        ("leaf:groups=a||b", "the group '' is empty"),
        ("dynamic:interval=2.5", "interval=2.5 is not a whole number"),
        ("dynamic:hysteresis=0", "hysteresis=0.0 is not a positive finite number"),
        ("dynamic:growth=1", "growth=1.0 must be above 1"),
        ("dynamic:backoff=1", "backoff=1.0 below 1"),
        ("dynamic:init=0.5", "init=0.5 lies outside min=1 .."),
        ("dynamic:max=4", "init=65536 lies outside min=1 .. max=4"),
        # The state is float32 and int32: a bound beyond them would let the scale reach inf or 0.
        ("dynamic:max=1e39", "max=1e+39 is outside what its float32 state holds"),
        ("dynamic:min=1e-39", "min=1e-39 is outside what its float32 state holds"),
        ("static:1e39", "init=1e+39 is outside what its float32 state holds"),
        ("dynamic:interval=3e9", "interval=3e+09 is outside what its int32 state holds"),
    ],
)
def test_what_cannot_be_is_refused_on_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^(loss scale|format): ") as error:
        LossScaleSettings.parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "dynamic",
            {"format": "e5m2"},
            "dynamic does not read format=e5m2; leave it out or choose",
        ),
        ("static", {"growth_interval": 3}, "static does not read interval=3"),
        ("logmax", {"groups": ("a",)}, "does not read groups=.*or choose leaf"),
        ("leaf", {"power_of_two": False}, "does not read pow2=False.*or choose logmax"),
    ],
)
def test_a_setting_that_its_kind_does_not_read_is_refused(kind, fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        LossScaleSettings(kind, **fields)
