"""The table of formats against ml_dtypes and numpy, and against every value of the small ones."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import Format

# Our name -> the dtype that holds it. `e4m3` is the OCP one, ml_dtypes' `float8_e4m3fn`.
NAMED = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
# The same numbers through the IEEE-like `eXmY` reading.
GENERIC = {
    "e11m52": np.float64,
    "e8m23": np.float32,
    "e5m10": np.float16,
    "e8m7": ml_dtypes.bfloat16,
    "e3m4": ml_dtypes.float8_e3m4,
}
CASES = [*NAMED.items(), *GENERIC.items()]
# Formats of ml_dtypes that have no sign-exponent-mantissa shape of ours: without -0 (fnuz, b11) or
# without mantissa (e8m0); and the IEEE-like e4m3, whose name means the OCP one here.
ELSEWHERE = {
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float8_e4m3",
}


def figures(format_: Format) -> dict[str, float]:
    return {
        "max": format_.max,
        "min": -format_.max,
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


def positive_values(dtype: type) -> np.ndarray:
    """All finite positive numbers of a dtype of at most 8 bits, from its bit patterns."""
    patterns = np.arange(2 ** ml_dtypes.finfo(dtype).bits, dtype=np.uint8)
    values = patterns.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values) & (values > 0)])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[name for name, _ in CASES])
def test_figures_equal_finfo(name: str, dtype: type) -> None:
    assert figures(Format(name)) == expected(dtype)


def test_every_float_of_ml_dtypes_is_compared_or_named_as_absent() -> None:
    floats = {name for name in dir(ml_dtypes) if name.startswith(("float", "bfloat"))}
    compared = {dtype.__name__ for _, dtype in CASES if dtype.__module__ == "ml_dtypes"}
    assert floats == compared | ELSEWHERE


@pytest.mark.parametrize("name", ["e5m2", "e4m3", "e3m2", "e2m3", "e2m1", "e3m4"])
def test_figures_equal_those_of_all_bit_patterns(name: str) -> None:
    format_, dtype = Format(name), (NAMED | GENERIC)[name]
    values = positive_values(dtype)
    assert values[-1] == format_.max
    assert values[0] == format_.min_subnormal
    assert values[values > 1][0] - 1 == format_.epsilon
    # Below the smallest normal number the spacing stops shrinking.
    below = values[values <= format_.min_normal]
    np.testing.assert_array_equal(np.diff(below), np.full(len(below) - 1, format_.min_subnormal))
    assert len(below) == 2**format_.mantissa_bits


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
    "name", ["", "fp8", "e4", "e1m2", "e12m3", "e4m0", "e4m53", "E4M3", "e4m3 ", "float8_e4m3fn"]
)
def test_unknown_name_is_one_line_that_lists_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match="known: float64 float32 tf32") as error:
        Format(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean bfloat16"):
        Format("bfloat")
