"""Rounding at both ends of a format, against the definition in exact fractions."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import Format, quantize, round_to
from mpjax.formats.format_table import _FLOATS, _INTEGERS

FORMATS = [name for name in _FLOATS if name != "float64"] + [*_INTEGERS]
FORMATS += ["e3m3", "e4m4", "e8m1", "e9m4", "e11m5", "e3m3none", "e5m2none", "e8m2none"]
FORMATS += ["q1.0", "q1.1", "q2.0", "q1.15", "q4.4", "q8.8", "q16.16", "q32.0"]
CARRIERS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CASES = [(rounding, saturate) for rounding in ("nearest", "floor") for saturate in (True, False)]


def exact(x: float, f: Format, rounding: str) -> Fraction:
    """x rounded as if the exponent had no upper end."""
    value = Fraction(x)
    least = -f.mantissa_bits if f.kind == "fixed" else 1 - f.bias - f.mantissa_bits
    power = least
    if f.kind == "float" and value:
        exponent = math.floor(math.log2(abs(value)))
        exponent += (abs(value) >= Fraction(2) ** (exponent + 1)) - (
            abs(value) < Fraction(2) ** exponent
        )
        power = max(least, exponent - f.mantissa_bits)
    steps = value / Fraction(2) ** power
    whole = round(steps) if rounding == "nearest" else math.floor(steps)  # round: ties to even
    return whole * Fraction(2) ** power


def rounded(x: float, f: Format, rounding: str, saturate: bool, carrier: Any) -> float:
    """What a number becomes, in a dtype that may hold less than the format."""
    own = float(ml_dtypes.finfo(carrier).max)
    # the largest number that format and carrier both hold, and the most negative
    top, bottom = (
        math.copysign(float(held(min(abs(end), own), f, carrier)), end) for end in (f.max, f.min)
    )
    saturates = saturate or f.specials == "none"
    lost = math.inf if f.specials == "ieee" else math.nan
    if math.isinf(x):
        return (top if x > 0 else bottom) if saturates else math.copysign(lost, x)
    y = exact(x, f, rounding)
    if saturates:
        return float(min(max(y, Fraction(bottom)), Fraction(top)))
    if y > Fraction(f.max):
        return top if rounding == "floor" else lost
    if y < Fraction(f.min):
        return -lost
    with np.errstate(over="ignore"):
        return float(np.float64(y).astype(carrier))


def held(limit: float, f: Format, carrier: Any) -> Fraction:
    """The largest number up to a limit that both hold."""
    if not limit:
        return Fraction(0)
    digits = min(f.mantissa_bits, ml_dtypes.finfo(carrier).nmant)
    if f.kind == "fixed":
        digits = ml_dtypes.finfo(carrier).nmant
    step = Fraction(2) ** (math.floor(math.log2(limit)) - digits)
    if f.kind == "fixed":
        step = max(step, Fraction(f.epsilon))
    return math.floor(Fraction(limit) / step) * step


def ends(f: Format, carrier: Any) -> np.ndarray:
    """Both ends, halves and whole steps beyond, their neighbours in the carrier, and inf."""
    out: list[float] = [math.inf, float(ml_dtypes.finfo(carrier).max), 0.0, 0.3, 0.5, 0.75, 1.0]
    for end in (f.max, -f.min):
        if not end:
            continue
        exponent = math.floor(math.log2(end))
        ulp = f.epsilon if f.kind == "fixed" else 2.0 ** (exponent - f.mantissa_bits)
        out += [end + k * ulp / 4 for k in range(-6, 9)] + [2 * end, 3 * end]
    near = np.array([v for v in out if v <= float(ml_dtypes.finfo(carrier).max)] + [math.inf])
    with np.errstate(over="ignore", under="ignore"):
        points = near.astype(carrier)
        sides = [np.nextafter(points, carrier(s)) for s in (np.inf, -np.inf)]
    points = np.unique(np.concatenate([points, *sides]).astype(np.float64))
    return np.concatenate([points, -points[::-1]]).astype(carrier)


@functools.partial(jax.jit, static_argnums=1)
def _all(x: Any, name: str) -> Any:
    return [round_to(x, name, rounding, saturate=saturate) for rounding, saturate in CASES]


def mismatches(name: str, carrier: Any) -> tuple[int, list[Any]]:
    """How many results were compared, and those that are wrong."""
    f, x = Format(name), ends(Format(name), carrier)
    count, wrong = 0, []
    for (rounding, saturate), got in zip(CASES, _all(x, name), strict=True):
        for value, one in zip(x.astype(float), np.asarray(got).astype(float), strict=True):
            want = rounded(float(value), f, rounding, saturate, carrier)
            count += 1
            if one != want and not (math.isnan(one) and math.isnan(want)):
                wrong.append((name, rounding, saturate, value, one, want))
    return count, wrong


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("name", FORMATS)
def test_both_ends_against_exact_fractions(name: str) -> None:
    # all formats in all dtypes: benchmarks/numerics/numeric_edges.py
    assert mismatches(name, np.float32)[1] == []


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("name", ["e4m3", "float16", "e8m1", "q16.16"])
def test_the_ends_of_what_the_dtype_holds(name: str) -> None:
    for carrier in (ml_dtypes.bfloat16, np.float16):
        assert mismatches(name, carrier)[1] == []


def test_floor_just_above_the_largest_is_the_largest() -> None:
    x = jnp.array([449.0, 470.0, 490.0, 1e30, np.inf, -449.0, -np.inf])
    got = np.asarray(round_to(x, "e4m3", "floor", saturate=False))
    np.testing.assert_array_equal(got, [448.0] * 4 + [np.nan] * 3)
    got = np.asarray(round_to(x * 150, "e5m2", "floor", saturate=False))
    np.testing.assert_array_equal(got, [57344.0] * 4 + [np.inf, -np.inf, -np.inf])
    got = round_to(jnp.array([1.5 * 2.0**127, np.inf]), "e8m0", "floor", saturate=False)
    np.testing.assert_array_equal(np.asarray(got), [2.0**127, np.nan])


@pytest.mark.parametrize(("name", "lost"), [("e4m3", np.nan), ("e4m3ieee", np.inf), ("e2m1", 6.0)])
def test_stochastic_beyond_the_largest(name: str, lost: float) -> None:
    f, draws = Format(name), 4096
    step = 2.0 ** (math.floor(math.log2(f.max)) - f.mantissa_bits)
    for sign in (1, -1):
        x = np.full((3, draws), [[f.max], [f.max + step / 4], [f.max + 2 * step]]) * sign
        key = jax.random.key(3)
        x = jnp.asarray(x, jnp.float32)
        assert (round_to(x, name, "stochastic", key) == sign * f.max).all()
        got = np.asarray(round_to(x, name, "stochastic", key, saturate=False))
        kept = got == sign * f.max
        assert kept[0].all() and (lost == f.max or not kept[2].any())
        assert lost == f.max or abs(kept[1].mean() - 0.75) < 4 * (0.75 * 0.25 / draws) ** 0.5
        rest = got[~kept]
        assert np.isnan(rest).all() if np.isnan(lost) else (rest == sign * lost).all()


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("q1.0", [-1, 0]),
        ("q1.1", [-1, -0.5, 0, 0.5]),
        ("q2.0", [-2, -1, 0, 1]),
        ("int2", [-2, -1, 0, 1]),
    ],
)
def test_the_smallest_fixed_formats_hold_their_two_or_four_numbers(
    name: str, numbers: list[float]
) -> None:
    x = jnp.linspace(-3, 3, 61)
    got = round_to(x, name)
    assert sorted(set(got.tolist())) == numbers
    nearest = np.abs(np.asarray(x)[:, None] - np.array(numbers)).min(-1)
    np.testing.assert_allclose(np.abs(np.asarray(x) - np.asarray(got)), nearest, rtol=1e-6)
    np.testing.assert_array_equal(quantize(x, name, "none").dequantize(), got)


@pytest.mark.parametrize("name", ["q0.0", "q0.1", "q0.8", "int1", "int3", "q1", "q-1.4", "q33.0"])
def test_what_is_no_fixed_format_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"format: unknown name '{name}'; .*any qI.F") as error:
        Format(name)
    assert "\n" not in str(error.value)
