"""Settings that would be read and ignored are refused in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import Scaling, fake_quantize, quantize
from mpjax.precision import (
    LossScaleSettings,
    Operand,
    PrecisionSchedule,
    Recipe,
    Triggers,
    get_precision,
    get_recipe,
)
from mpjax.precision.schedule import late

E4M3 = Operand("e4m3")
PAIRS = 3 * [(E4M3, E4M3)]
ONE, TWO = (get_precision("bf16"),), (get_precision("bf16"), get_precision("fp32"))

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "margin": (lambda: Recipe("m", *PAIRS, margin=3), "margin=3 is of delayed scaling.*history="),
    "margin of a preset": (
        lambda: dataclasses.replace(get_recipe("fp8"), margin=-1), "margin=-1 is of delayed",
    ),
    "margin beyond float32": (
        lambda: Recipe("m", *PAIRS, history=4, margin=2000), "margin=2000: 2.margin is no float32",
    ),
    "chunk": (lambda: Recipe("m", *PAIRS, chunk=64), "chunk=64 is of sums that are rounded"),
    "accumulate float64": (
        lambda: Recipe("m", *PAIRS, accumulate="float64"), "accumulate=float64 rounds no running",
    ),
    "accumulate e8m25": (
        lambda: Recipe("m", *PAIRS, accumulate="e8m25"), "accumulate=e8m25 rounds no running",
    ),
    "accumulate e8m0": (
        lambda: Recipe("m", *PAIRS, accumulate="e8m0"), "accumulate=e8m0 rounds no running",
    ),
    "operand": (
        lambda: Operand("e4m3", "none", scale_rounding="up"), "scaling=none has no scale to round",
    ),
    "quantize": (
        lambda: quantize(jnp.ones(2), "e4m3", "none", scale_rounding="down"),
        "quantize: scale_rounding='down': scaling=none has no scale",
    ),
    "fake_quantize": (
        lambda: fake_quantize(jnp.ones(2), "e4m3", "none", scale_rounding="up"), "has no scale",
    ),
    "scaling": (lambda: Scaling("block", True, 32), "rows=True"),
    "loss scale": (lambda: LossScaleSettings("none", init=5.0), "none does not read init=5"),
    "fixed last": (lambda: PrecisionSchedule("fixed", ONE, last=0.3), "fixed does not read last"),
    "fixed steps": (lambda: PrecisionSchedule("fixed", ONE, steps=3), "fixed does not read steps"),
    "mixed triggers": (
        lambda: PrecisionSchedule("mixed", ONE, triggers=Triggers()), "mixed does not read trigg",
    ),
    "late triggers": (
        lambda: PrecisionSchedule("late", TWO, last=0.3, triggers=Triggers()), "choose dynamic",
    ),
    "dynamic last": (
        lambda: PrecisionSchedule("dynamic", TWO, last=0.3, triggers=Triggers()), "choose late",
    ),
    "dynamic steps": (
        lambda: PrecisionSchedule("dynamic", TWO, steps=9, triggers=Triggers()), "choose late",
    ),
    "no triggers": (lambda: PrecisionSchedule("dynamic", TWO), "would never switch"),
    "late share": (lambda: late("bf16", "fp32", last="x"), "late: last='x' is no number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_is_read_is_taken() -> None:
    assert Recipe("m", *PAIRS, history=4, margin=3).margin == 3
    assert Recipe("m", *PAIRS, accumulate="e6m9", chunk=64).chunk == 64
    assert Recipe("m", *PAIRS, accumulate="q8.8").accumulate == "q8.8"
    assert Operand("e4m3", "tensor", scale_rounding="up").scales_rounded == "up"
    assert LossScaleSettings("static", init=5.0).init == 5
    assert dataclasses.replace(LossScaleSettings("dynamic"), kind="none").kind == "none"
