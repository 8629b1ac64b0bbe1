"""Settings of the loss scale: text that loses nothing, and values that would never come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpjax.errors import ConfigError
from mpjax.precision import LossScaleSettings

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
    with pytest.raises(ConfigError, match="^loss scale: ") as error:
        LossScaleSettings.parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)
