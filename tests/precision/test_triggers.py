"""Triggers: each reason, its limit, the way back, and no flapping."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mpjax.errors import ConfigError
from mpjax.precision.triggers import Evidence, Triggers

CALM = Evidence(False, 5, 0, skips=0.0, loss=2.0, best=2.0, spread=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skips": 0.3}, "30% of the last 20 steps were skipped, limit 30%"),
        ({"loss": 2.41}, "the loss rose to 2.41 over the last 20 steps, limit 2.4"),
        ({"loss": math.nan}, "no loss of the last 20 steps was finite"),
        ({"underflow": 0.5}, "50% of the backward pass underflows, limit 50%"),
    ],
)
def test_each_trigger_promotes_with_its_reason_and_not_below_its_limit(
    changes: dict[str, float], words: str
) -> None:
    triggers = Triggers(underflow=0.5)
    assert triggers.judge(CALM) == (False, "")
    assert triggers.judge(CALM._replace(**changes)) == (True, words)
    almost = {name: value * 0.99 for name, value in changes.items() if value == value}
    assert triggers.judge(CALM._replace(**almost)) == (False, "")


def test_a_noisy_loss_must_rise_above_its_own_noise() -> None:
    noisy = CALM._replace(loss=0.02, best=0.01, spread=0.01)  # twice as much, and within noise
    assert not Triggers().judge(noisy).switch
    assert Triggers().judge(noisy._replace(loss=0.041)).switch
    negative = CALM._replace(loss=-1.0, best=-2.0)  # a likelihood: rise counts in magnitude
    assert Triggers().judge(negative).switch
    assert not Triggers().judge(negative._replace(loss=-1.7)).switch


def test_in_the_first_window_a_loss_scale_may_find_its_place() -> None:
    first = CALM._replace(best=math.inf, spread=0.0, windows=1)
    assert not Triggers().judge(first._replace(skips=0.9)).switch
    assert Triggers().judge(first._replace(skips=1.0, loss=math.nan)).switch


@pytest.mark.parametrize(
    "unrest",
    [{"skips": 0.2}, {"loss": 2.21}, {"loss": math.nan}, {"underflow": 0.3}, {"windows": 2}],
)
def test_it_returns_when_all_is_below_half_of_the_limits(unrest: dict[str, Any]) -> None:
    triggers = Triggers(underflow=0.5)
    high = CALM._replace(high=True, windows=3, trips=1)
    assert triggers.judge(high).switch and "calm again" in triggers.judge(high).reason
    assert triggers.judge(high._replace(**unrest)) == (False, "")


def test_each_promotion_doubles_the_hold() -> None:
    held = [
        next(
            n
            for n in range(1, 10_000)
            if Triggers().judge(CALM._replace(high=True, windows=n, trips=trips)).switch
        )
        for trips in range(1, 6)
    ]
    assert held == [3, 6, 12, 24, 48]
    assert Triggers().judge(CALM._replace(high=True, windows=3 * 2**10, trips=2**30)).switch


def test_memory_prevents_a_promotion_and_forces_a_return() -> None:
    triggers = Triggers(headroom=2.0)
    storm = CALM._replace(skips=1.0)
    verdict = triggers.judge(storm._replace(free=2.4))
    assert not verdict.switch and "only 2.40 GB are free" in verdict.reason
    assert triggers.judge(storm._replace(free=2.5)).switch
    high = CALM._replace(high=True, windows=1, trips=1)
    assert triggers.judge(high._replace(free=1.9)) == (True, "1.90 GB are free, headroom 2 GB")
    assert not triggers.judge(high._replace(free=2.1)).switch


def test_text_is_read_back() -> None:
    triggers = Triggers(window=7, skips=0.25, rise=1, hold=2, underflow=0.125, headroom=3)
    assert Triggers.parse(str(triggers)) == triggers
    assert Triggers.parse("") == Triggers() and str(Triggers()) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("skps=0.2", ("'skps' is unknown", "did you mean skips?", "window skips rise")),
        ("skips=0.2,skips=0.3", ("stands twice",)),
        ("skips", ("skips=''", "no number", "write skips=0.3")),
        ("skips=half", ("'half'", "write skips=0.3")),
        ("skips=1.5", ("skips=1.5", "0 .. 1", "skips=0.3")),
        ("skips=0", ("skips=0", "not 0")),
        ("rise=-1", ("rise=-1", "0 or above")),
        ("rise=nan", ("rise=nan",)),
        ("window=1", ("window=1", "2 ..", "default is window=20")),
        ("window=2.5", ("window=2.5", "whole number")),
        ("hold=0", ("hold=0", "1 ..")),
        ("underflow=2", ("underflow=2",)),
        ("headroom=inf", ("headroom=inf",)),
    ],
)
def test_what_is_wrong_is_one_line(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        Triggers.parse(text)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
