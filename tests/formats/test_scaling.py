"""Which numbers share a scale, and what the scale is."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import Format, Scaling, check_scaling
from mpjax.formats.scaling import to_scale
from tests.formats.oracle import slow_scale

NAMES = ["none", "tensor", "row", "block(1x128)", "block(128x128)", "mx(32)", "nv(16)", "nv(16x16)"]
TOPS = {"e4m3": 448, "e5m2": 57344, "e2m1": 6, "e3m2": 28, "int8": 127, "int4": 7, "int2": 1}


pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_reads_back(name: str) -> None:
    scaling = Scaling.parse(name)
    assert str(scaling) == name and Scaling.parse(scaling) is scaling
    assert scaling.blocks == ("(" in name)
    assert scaling.scale_bits == {"n": 0, "mx": 8, "nv": 8}.get(name[:2].replace("no", "n"), 32)


@pytest.mark.parametrize(
    "name", ["", "column", "block", "block(128)", "block(0x128)", "block(1x128", "mx", "nv(x16)"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"scaling: unknown .*; write none, tensor, row") as error:
        Scaling.parse(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "axes", "tile"),
    [
        ("none", (3, 4), (1,), (3, 4)),
        ("tensor", (3, 4), (1,), (3, 4)),
        ("row", (3, 4), (1,), (1, 4)),
        ("row", (3, 4), (0,), (3, 1)),
        ("row", (2, 3, 4), (1, 2), (1, 3, 4)),
        ("block(1x128)", (3, 300), (1,), (1, 128)),
        ("block(1x128)", (3, 100), (1,), (1, 100)),
        ("block(128x128)", (300, 300), (0,), (128, 128)),
        ("block(2x8)", (5, 16, 7), (1,), (1, 8, 2)),
        ("block(2x8)", (5, 16, 7), (2,), (1, 2, 7)),
        ("mx(32)", (64,), (0,), (32,)),
        ("nv(16)", (4, 64), (0,), (4, 1)),
        ("nv(16x16)", (40, 64), (1,), (16, 16)),
    ],
)
def test_tiles(
    name: str, shape: tuple[int, ...], axes: tuple[int, ...], tile: tuple[int, ...]
) -> None:
    assert Scaling.parse(name).tiles(shape, axes) == tile


@pytest.mark.parametrize("scale_rounding", ["none", "up", "down"])
@pytest.mark.parametrize("name", TOPS)
def test_a_scale_is_that_of_exact_arithmetic(name: str, scale_rounding: str) -> None:
    rng = np.random.default_rng(0)
    top = np.float32(TOPS[name])
    around = np.ldexp(top, np.arange(-110, 110, 10)).astype(np.float32)  # powers of two of the top
    sides = [np.nextafter(around, np.float32(s)) for s in (0, np.inf)]
    amax = np.concatenate([np.exp2(rng.uniform(-125, 126, 300)).astype(np.float32), around, *sides])
    amax = np.append(amax, np.float32([0, 2.0**-126]))
    got = np.asarray(jax.jit(lambda a: to_scale(a, Format(name), scale_rounding))(amax))
    want = [slow_scale(a, float(top), scale_rounding) for a in amax]
    np.testing.assert_array_equal(got, want)
    mantissa = np.frexp(got)[0]
    assert (mantissa == 0.5).all() == (scale_rounding != "none" or name == "int2") or name == "int2"
    if scale_rounding == "up":
        assert (amax.astype(np.float64) <= got.astype(np.float64) * float(top)).all()


def test_a_scale_of_what_is_not_finite_is_nan() -> None:
    for rule in ("none", "up", "down"):
        got = to_scale(jnp.array([np.inf, np.nan, 1.0, 0.0]), Format("e4m3"), rule)
        assert np.isnan(got[:2]).all() and got[3] == 1
        assert math.isclose(got[2], 1 / 448, rel_tol=1)


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64", "e11m5", "e9m4"])
def test_wide_formats_have_scales_that_neither_overflow_nor_vanish(name: str) -> None:
    amax = np.float32([1e-37, 1.0, 1e30, 3e38])
    for rule in ("none", "up", "down"):
        scale = np.asarray(to_scale(jnp.asarray(amax), Format(name), rule))
        assert np.isfinite(amax / scale).all() and (scale >= 2.0**-126).all()


@pytest.mark.parametrize(
    ("name", "scaling", "rounding", "words"),
    [
        ("e4m3", "tensor", "away", ["scale_rounding: unknown 'away'", "none down up"]),
        ("e8m0", "tensor", "none", ["e8m0 holds scales", "take e4m3"]),
        ("q8.8", "row", "none", ["q8.8", "scaling=row", "set scaling=none"]),
        ("int4", "nv(16)", "none", ["nv(16)", "integer format int4", "row or block"]),
        ("e4m3", "mx(32)", "none", ["mx(32)", "powers of two", "block(1x32)"]),
        ("e2m1", "nv(16)", "down", ["nv(16)", "leave scale_rounding out"]),
    ],
)
def test_what_does_not_fit_is_named(
    name: str, scaling: str, rounding: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_scaling(Format(name), Scaling.parse(scaling), rounding, "here")
    assert all(word in str(error.value) for word in ["here: ", *words])
    assert "\n" not in str(error.value)
    check_scaling(Format("e4m3"), Scaling.parse("mx(32)"), "up")
