"""The table of formats against ml_dtypes and numpy, and against every value of the small ones."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import Format
from tests.formats.oracle import DTYPES, SMALL, Grid

NAMED = {"float64": np.float64, "float32": np.float32, **DTYPES}
# The same numbers through the IEEE-like `eXmY` reading.
GENERIC = {
    "e11m52": np.float64,
    "e8m23": np.float32,
    "e5m10": np.float16,
    "e8m7": ml_dtypes.bfloat16,
}
CASES = [*NAMED.items(), *GENERIC.items()]
INTEGERS = {"int16": np.int16, "int8": np.int8, "int4": ml_dtypes.int4, "int2": ml_dtypes.int2}
ABSENT = {
    "int1": "one bit holds -1 and 0: no sign symmetry, and no recipe uses it",
    "uint1": "values of a training tensor have a sign",
    "uint2": "values of a training tensor have a sign",
    "uint4": "values of a training tensor have a sign",
    "complex32": "a pair of float16: round its parts",
    "bcomplex32": "a pair of bfloat16: round its parts",
}


def figures(format_: Format) -> dict[str, float]:
    return {
        "max": format_.max,
        "min": format_.min,
        "smallest_normal": format_.min_normal,
        "smallest_subnormal": format_.min_subnormal,
        "eps": format_.epsilon,
        "bits": format_.bits,
        "nmant": format_.mantissa_bits,
    }


def expected(dtype: type) -> dict[str, float]:
    info = ml_dtypes.finfo(dtype)
    names = ("max", "min", "smallest_normal", "smallest_subnormal", "eps", "bits", "nmant")
    return {name: float(getattr(info, name)) for name in names}


def all_values(name: str) -> np.ndarray:
    """All finite numbers of a format of at most 8 bits, from ml_dtypes' bit patterns."""
    dtype = DTYPES[name]
    patterns = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8)
    values = patterns.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[name for name, _ in CASES])
def test_figures_equal_finfo(name: str, dtype: type) -> None:
    assert figures(Format(name)) == expected(dtype)


@pytest.mark.parametrize(("name", "dtype"), INTEGERS.items(), ids=INTEGERS)
def test_integers_equal_iinfo(name: str, dtype: type) -> None:
    info, format_ = ml_dtypes.iinfo(dtype), Format(name)
    assert (format_.min, format_.max, format_.bits) == (info.min, info.max, info.bits)
    assert format_.epsilon == format_.min_subnormal == format_.min_normal == 1
    assert format_.is_integer and format_.dtype == jnp.dtype(dtype)


def test_every_format_of_ml_dtypes_is_compared_or_named_as_absent() -> None:
    theirs = {x for x in ml_dtypes.__all__ if isinstance(getattr(ml_dtypes, x), type)}
    compared = {dtype.__name__ for dtype in (*NAMED.values(), *INTEGERS.values())}
    assert theirs - compared - {"finfo", "iinfo"} == set(ABSENT)


@pytest.mark.parametrize("name", SMALL)
def test_figures_equal_those_of_all_bit_patterns(name: str) -> None:
    format_, values = Format(name), all_values(name)
    assert (values[0], values[-1]) == (format_.min, format_.max)
    positive = values[values > 0]
    assert positive[0] == format_.min_subnormal
    assert positive[positive > 1][0] - 1 == format_.epsilon
    if name == "e8m0":
        np.testing.assert_array_equal(positive[1:] / positive[:-1], np.full(254, 2.0))
        return
    # Below the smallest normal number the spacing stops shrinking.
    below = positive[positive <= format_.min_normal]
    np.testing.assert_array_equal(np.diff(below), np.full(len(below) - 1, format_.min_subnormal))
    assert len(below) == 2**format_.mantissa_bits
    # What is left of 2^bits patterns: the two zeros are one number here, fnuz has no -0.
    lost = {"ieee": 2 * 2**format_.mantissa_bits + 1, "nan": 3, "fnuz": 1, "none": 1}
    assert len(values) == 2**format_.bits - lost[format_.specials]


@pytest.mark.parametrize("name", [*NAMED, *INTEGERS])
def test_dtype_is_the_one_that_holds_the_format_where_jax_has_it(name: str) -> None:
    dtype = np.dtype((NAMED | INTEGERS)[name])
    if name in ("e3m2", "e2m3"):  # JAX has no arrays of float6
        assert Format(name).dtype is None
        if jax.__version_info__ >= (0, 12):
            return  # which has them; values of ours stay in float32
        with pytest.raises(jax.errors.JaxRuntimeError, match="Invalid XLA PrimitiveType"):
            jnp.zeros(1, dtype)
        return
    assert Format(name).dtype == dtype


@pytest.mark.parametrize(
    ("name", "low", "high", "step", "bits"),
    [
        ("q8.8", -128, 128 - 2**-8, 2**-8, 16),
        ("q16.16", -32768, 32768 - 2**-16, 2**-16, 32),
        ("q4.4", -8, 8 - 2**-4, 2**-4, 8),
        ("q1.15", -1, 1 - 2**-15, 2**-15, 16),
        ("q32.21", -(2**31), 2**31 - 2**-21, 2**-21, 53),
    ],
)
def test_fixed_point(name: str, low: float, high: float, step: float, bits: int) -> None:
    f = Format(name)
    assert (f.min, f.max, f.min_subnormal, f.bits) == (low, high, step, bits)
    assert f.epsilon == f.min_normal == step and f.dtype is None and not f.is_integer


@pytest.mark.parametrize("name", ["e4m4", "e5m3", "e2m1none", "e5m2none", "e9m4", "e10m9none"])
def test_generic_formats_are_ieee_like_or_without_inf_and_nan(name: str) -> None:
    digits = re.fullmatch(r"e(\d+)m(\d+)(none)?", name)
    grid = (Grid.full if digits[3] else Grid.ieee)(int(digits[1]), int(digits[2]))
    f = Format(name)
    assert (f.max, f.min) == (grid.max, grid.min)
    assert (f.min_normal, f.epsilon) == (2.0**grid.least, 2.0**-grid.mantissa)
    assert f.min_subnormal == f.min_normal * f.epsilon
    assert f.bits == 1 + int(digits[1]) + int(digits[2]) and f.dtype is None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("e4m3", ml_dtypes.float8_e4m3),  # IEEE-like: 240, not 448
        ("e4m3", ml_dtypes.float8_e5m2),
        ("bfloat16", np.float16),
        ("e3m2", ml_dtypes.float6_e2m3fn),
    ],
)
def test_comparison_tells_formats_apart(name: str, wrong: type) -> None:
    assert figures(Format(name)) != expected(wrong)


def test_tf32_has_float32_range_and_float16_resolution() -> None:
    tf32 = Format("tf32")
    assert tf32.min_normal == float(np.finfo(np.float32).tiny)
    assert tf32.epsilon == float(np.finfo(np.float16).eps)
    assert tf32.max == (2 - 2.0**-10) * 2.0**127


def test_equal_names_are_equal_and_a_format_does_not_change() -> None:
    assert Format("e4m3") == Format("e4m3") != Format("e5m2")
    assert len({Format("e4m3"), Format("e4m3"), Format("e5m2")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Format("e4m3").mantissa_bits = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "name",
    ["", "fp8", "e4", "e1m2", "e12m3", "e4m0", "e4m53", "E4M3", "e4m3 ", "float8_e4m3fn"]
    + ["e11m5none", "e4m3fn", "int3", "q0.8", "q33.0", "q8.31", "q30.24", "q8"],
)
def test_unknown_name_is_one_line_that_lists_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match="known: float64 float32 tf32") as error:
        Format(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean bfloat16"):
        Format("bfloat")
