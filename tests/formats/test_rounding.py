"""Rounding against ml_dtypes' casts, and against the definition where ml_dtypes has no cast.

The full run, 10^7 float32 patterns a format and 10^6 draws a value, is
benchmarks/numerics/rounding.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.formats import Format, round_to
from mpjax.formats.rounding import _round
from tests.formats.oracle import (
    DTYPES,
    GRIDS,
    KNOWN,
    NO_NAN,
    cast,
    near,
    patterns,
    random_patterns,
    same,
    special,
)

HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
rounded = jax.jit(round_to, static_argnames=("format", "rounding", "saturate", "straight_through"))


def ours(x: np.ndarray, name: str, rounding: str = "nearest", saturate: bool = False) -> np.ndarray:
    return np.asarray(rounded(x, name, rounding, saturate=saturate))


def all_halves(dtype: Any) -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def mismatches(x: np.ndarray, name: str) -> np.ndarray:
    """Inputs where the jitted rounding and ml_dtypes' cast differ in a bit, or in being NaN."""
    got = ours(x, name)
    if name in NO_NAN:
        nan = np.isnan(x.astype(np.float32))
        assert np.isnan(got[nan].astype(np.float32)).all()
        x, got = x[~nan], got[~nan]
    return x[~same(got, cast(x, name))]


def expected(x: np.ndarray, name: str, rounding: str, saturate: bool) -> np.ndarray:
    """The definition, in the dtype of x; NaN stays."""
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
    nan = np.isnan(wide)
    grid = (GRIDS | KNOWN)[name]
    out = grid.round(np.where(nan, 0, wide), rounding, saturate, x.dtype)
    with np.errstate(over="ignore"):
        out = np.where(nan, np.nan, out).astype(x.dtype)
    if grid.least is None:
        return np.where(out == 0, np.zeros((), x.dtype), out)  # there is no -0
    # numpy's rint and floor keep the sign of zero
    return out


# --- against ml_dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_float32_patterns_equal_the_cast(name: str) -> None:
    x = patterns(name, 200_000, seed=1)
    assert len(x) >= 200_000
    assert mismatches(x, name).size == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", DTYPES)
def test_all_patterns_of_16_bits_equal_the_cast(name: str, dtype: str) -> None:
    x = all_halves(HALVES[dtype])
    assert mismatches(x, name).size == 0
    if name == dtype:  # nothing is rounded, and no bit moves
        assert same(ours(x, name), x).all()
    assert ours(x, name).dtype == x.dtype


def test_the_comparison_finds_what_it_looks_for() -> None:
    x = patterns("e4m3", 10_000, seed=2)
    assert mismatches(x, "e4m3").size == 0
    assert (~same(ours(x, "e4m3"), cast(x, "e4m3ieee"))).sum() > 100
    assert (~same(ours(x, "e4m3", saturate=True), cast(x, "e4m3"))).sum() > 100
    assert (~same(ours(x, "e4m3", "floor"), cast(x, "e4m3"))).sum() > 100
    away = np.float32([1.0625, 1.1875, -1.0625])  # ties: half of them go to the even one
    np.testing.assert_array_equal(ours(away, "e4m3"), np.float32([1.0, 1.25, -1.0]))
    assert same(np.float32([0.0]), np.float32([0.0])).all()
    assert not same(np.float32([0.0]), np.float32([-0.0])).any()


def test_a_compiled_cast_or_reduce_precision_is_no_substitute() -> None:
    cast_back = jax.jit(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32))
    assert np.isnan(cast_back(jnp.float32(500.0)))
    assert rounded(jnp.float32(500.0), "e4m3") == 448.0
    small = jnp.float32(3 * 2.0**-24)  # a subnormal of float16
    assert rounded(small, "float16") == small
    assert jax.jit(lambda x: jax.lax.reduce_precision(x, 5, 10))(small) == 0


def test_float32_subnormals_survive_jit() -> None:
    x = np.array([1, 2, 3, 0x3FFFFF, 0x7FFFFF], np.uint32).view(np.float32)
    x = np.concatenate([x, -x])
    assert same(ours(x, "float32"), x).all()
    assert same(ours(x, "bfloat16"), cast(x, "bfloat16")).all()
    flushed = np.asarray(jax.jit(lambda v: v * 1.0000001)(x))
    assert (flushed == 0).all() or not same(flushed, x).all()  # what arithmetic does with them


@pytest.mark.parametrize("name", [*DTYPES, "e4m4", "e3m3none", "q8.8", "int8", "tf32"])
def test_saturation(name: str) -> None:
    f = Format(name)
    top = np.float32(f.max)
    with np.errstate(over="ignore"):
        above = np.float32([np.nextafter(top, np.float32(np.inf)), 1.01 * f.max, 3 * f.max, np.inf])
    x = np.concatenate([[top], above]).astype(np.float32)
    np.testing.assert_array_equal(ours(x, name, saturate=True), np.full(5, top))
    if f.kind != "power":
        want = np.full(2, f.min, np.float32)
        np.testing.assert_array_equal(ours(-x, name, saturate=True)[3:], want)
    lost = {"ieee": np.inf, "nan": np.nan, "fnuz": np.nan, "none": top}[f.specials]
    np.testing.assert_array_equal(ours(x, name)[3:], np.full(2, lost, np.float32))
    if f.kind != "power":
        lost = f.min if f.kind == "fixed" else -lost
        np.testing.assert_array_equal(ours(-x, name)[3:], np.full(2, lost, np.float32))
    assert np.isnan(ours(np.float32([np.nan, -np.nan]), name, saturate=True)).all()


def test_e8m0_has_no_sign_and_no_zero() -> None:
    x = np.float32([-1.0, -np.inf, -1e-40, 0.0, -0.0])
    assert np.isnan(ours(x, "e8m0", saturate=True)).all()
    tiny = np.float32([1e-40, 2.0**-127, 0.7 * 2.0**-126, 0.8 * 2.0**-126])
    want = np.float32([2.0**-127, 2.0**-127, 2.0**-126, 2.0**-126])
    assert same(ours(tiny, "e8m0"), want).all()
    want = np.float32([2.0**-127] * 4)
    assert same(ours(tiny, "e8m0", "floor"), want).all()


# --- against the definition ----------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_the_definition_is_that_of_ml_dtypes(name: str) -> None:
    if name not in DTYPES:
        pytest.skip("ml_dtypes has no fixed point")
    x = patterns(name, 20_000, seed=3)
    x = x[np.isfinite(x) & (np.abs(x) <= Format(name).max)]
    assert len(x) > 5000
    assert same(expected(x, name, "nearest", True), cast(x, name)).all()


def inputs(name: str, dtype: Any) -> np.ndarray:
    """Random patterns, every size of number, and numbers of the format with their ties."""
    if dtype != np.float32:
        return all_halves(dtype)
    grid = (GRIDS | KNOWN)[name]
    rng = np.random.default_rng(5)
    size = np.exp2(rng.uniform(-149, 128, 40_000)) * rng.choice([-1, 1], 40_000)
    small = np.exp2(rng.uniform(-20, 20, 40_000)) * rng.choice([-1, 1], 40_000)
    wide = np.concatenate([size, small, rng.uniform(-200, 200, 20_000)])
    wide = np.clip(wide, -3.4e38, 3.4e38)
    low, high = grid.neighbours(wide[::8])
    points = np.clip(np.concatenate([low, high, (low + high) / 2]), -3.4e38, 3.4e38)
    edge = np.clip([grid.max, -grid.max, grid.min], -3.4e38, 3.4e38)
    parts = [wide.astype(np.float32), near(points), near(edge), special()]
    return np.concatenate([*parts, random_patterns(50_000, 6)])


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("name", GRIDS)
def test_generic_and_fixed_formats_follow_the_definition(name: str, dtype: str) -> None:
    x = inputs(name, HALVES.get(dtype, np.float32))
    for rounding in ("nearest", "floor"):
        for saturate in (True, False):
            got, want = ours(x, name, rounding, saturate), expected(x, name, rounding, saturate)
            wrong = ~same(got, want)
            assert not wrong.any(), (rounding, saturate, x[wrong][:5], got[wrong][:5])


@pytest.mark.parametrize("name", KNOWN)
def test_floor_follows_the_definition(name: str) -> None:
    x = inputs(name, np.float32)
    assert same(ours(x, name, "floor", True), expected(x, name, "floor", True)).all()
    assert not same(ours(x, name, "floor", True), ours(x, name, "nearest", True)).all()


@pytest.mark.parametrize(("name", "bits"), [("int16", 16), ("int8", 8), ("int4", 4), ("int2", 2)])
def test_integers_are_rint_and_clip(name: str, bits: int) -> None:
    x = inputs(name, np.float32)
    x = x[~np.isnan(x)]
    want = np.clip(np.rint(x), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + np.float32(0)
    np.testing.assert_array_equal(ours(x, name), want)


def test_saturation_lands_on_a_number_that_both_dtype_and_format_hold() -> None:
    for name, dtype, top in [
        ("int16", np.float16, 32752.0),
        ("int16", ml_dtypes.bfloat16, 32640.0),
        ("q8.8", ml_dtypes.bfloat16, 127.5),
        ("bfloat16", np.float16, 65280.0),
        ("float16", ml_dtypes.bfloat16, 65280.0),
        ("e9m4", np.float32, 31 / 16 * 2.0**127),
        ("q16.16", np.float32, 32768 - 2.0**-9),
    ]:
        for x in (np.array([np.inf], dtype), np.array([np.finfo(np.float16).max], dtype)):
            got = ours(x, name, saturate=True).astype(np.float64)
            if np.isinf(x.astype(np.float32)).all() or name != "e9m4":
                assert got == top, (name, dtype, got)


# --- properties ----------------------------------------------------------------------------------

ANY = st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64)
PROPERTIES = ["e4m3", "e5m2fnuz", "e2m1", "bfloat16", "e9m4", "e5m2none", "q8.8", "int4"]


def numbers(bits: list[int]) -> np.ndarray:
    """64 float32: half as they come, half brought to -16 .. 16; no NaN."""
    x = np.array(bits, np.uint32).view(np.float32)
    x = np.where(np.isnan(x), np.float32(0), x)
    small = (np.array(bits, np.float64)[32:] / 2**27 - 16).astype(np.float32)
    return np.concatenate([x[:32], small])


@pytest.mark.parametrize("name", PROPERTIES)
@settings(max_examples=40)
@given(bits=ANY)
def test_rounding_is_idempotent_monotone_odd_and_near(name: str, bits: list[int]) -> None:
    f, x = Format(name), np.sort(numbers(bits))
    for rounding in ("nearest", "floor"):
        once = ours(x, name, rounding, saturate=True)
        assert same(ours(once, name, rounding, saturate=True), once).all()
        assert (np.diff(once.astype(np.float64)) >= 0).all()
    nearest = ours(x, name, saturate=True).astype(np.float64)
    inside = np.abs(x) <= min(f.max, float(np.finfo(np.float32).max))
    mirrored = ours(-x, name, saturate=True).astype(np.float64)
    np.testing.assert_array_equal(mirrored[inside], -nearest[inside])
    wide = x[inside].astype(np.float64)
    exponent = np.maximum(np.frexp(wide)[1] - 1, np.round(np.log2(f.min_normal)))
    spacing = np.full(wide.shape, f.epsilon) if f.kind == "fixed" else np.exp2(exponent) * f.epsilon
    # half the spacing; a whole one where the larger neighbour lies beyond what float32 holds
    allowed = np.where(np.abs(wide) > 2.0**127 * 1.9, spacing, spacing / 2)
    assert (np.abs(nearest[inside] - wide) <= allowed).all()
    down = ours(x, name, "floor", saturate=True).astype(np.float64)[inside]
    assert ((down <= wide) | (down == -f.max)).all()
    assert (np.abs(down - wide) <= np.where(np.abs(wide) > 2.0**127 * 1.9, 2, 1) * spacing).all()


# --- gradients and use inside transforms ---------------------------------------------------------


def test_gradients_are_zero_or_straight_through() -> None:
    x = jnp.array([0.3, 500.0, -2.0])
    for through, want in ((False, 0.0), (True, 3.0)):
        loss = jax.jit(
            jax.grad(lambda v, t=through: 3 * round_to(v, "e4m3", straight_through=t).sum())
        )
        np.testing.assert_array_equal(loss(x), np.full(3, want, np.float32))


def test_bad_input_is_named() -> None:
    x = jnp.ones(2)
    for call, words in [
        (lambda: round_to(x, "e4m33x"), ["unknown name 'e4m33x'", "any eXmY"]),
        (lambda: round_to(x, "e4m3", "up"), ["unknown rounding 'up'", "nearest stochastic floor"]),
        (lambda: round_to(x, "e4m3", "stochastic"), ["needs random bits", "key=jax.random.key"]),
    ]:
        with pytest.raises(ConfigError) as error:
            call()
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# --- stochastic ----------------------------------------------------------------------------------


def binades(name: str) -> np.ndarray:
    """A float32 in every binade of a format, subnormal ones too, that its numbers miss."""
    f, grid = Format(name), KNOWN[name]
    powers = np.arange(math.floor(math.log2(f.min_subnormal)) - 1, math.floor(math.log2(f.max)) + 1)
    if name == "bfloat16":
        powers = powers[(powers % 16 == 0) | (powers < -123) | (powers > 124)]
    rng = np.random.default_rng(8)
    points = np.ldexp(1 + rng.uniform(0.05, 0.95, powers.size), powers)
    low, high = grid.neighbours(points)
    points = low + (high - low) * rng.uniform(0.1, 0.9, powers.size)
    points = np.where(points > f.max, (f.max + grid.neighbours(f.max * 0.99)[0]) / 2, points)
    return (points * rng.choice([-1, 1], powers.size)).astype(np.float32)


def share_up(x: np.ndarray, name: str, draws: int, mask: int = 0xFFFFFFFF) -> np.ndarray:
    """How often each x went to its upper neighbour; every result is one of the two neighbours."""
    low, high = KNOWN[name].neighbours(x.astype(np.float64))
    y = np.asarray(stochastic(x, name, draws, mask))
    up, down = (y == n.astype(np.float32)[:, None] for n in (high, low))
    assert (up | down).all()
    return up.mean(axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def stochastic(x: Any, name: str, draws: int, mask: int) -> Any:
    """Each x rounded with so many draws of random bits, of which a mask leaves some."""
    bits = jax.random.bits(jax.random.key(3), (x.shape[0], draws), jnp.uint32) & jnp.uint32(mask)
    wide = jnp.broadcast_to(x[:, None], bits.shape)
    return _round(wide, bits, Format(name), "stochastic", True)


def deviation(x: np.ndarray, name: str, share: np.ndarray, draws: int) -> np.ndarray:
    """|mean - x| in units of sigma / sqrt(draws)."""
    wide = x.astype(np.float64)
    low, high = KNOWN[name].neighbours(wide)
    p = (wide - low) / (high - low)
    return np.abs(share - p) / np.sqrt(p * (1 - p) / draws)


STOCHASTIC = ["e4m3", "e5m2", "e2m1", "bfloat16", "q8.8"]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_has_the_right_mean_in_every_binade(name: str) -> None:
    x, draws = binades(name), 20_000
    assert (np.abs(x) < Format(name).min_subnormal).any()
    assert deviation(x, name, share_up(x, name, draws), draws).max() < 4
    # the controls: 3 random bits instead of all that are dropped, and nearest
    few = share_up(x, name, draws, mask=0xE0000000)
    assert deviation(x, name, few, draws).max() > 10
    low, high = KNOWN[name].neighbours(x.astype(np.float64))
    nearest = ours(x, name).astype(np.float64) == high
    assert deviation(x, name, nearest, draws).min() > 10


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_rounding_leaves_the_formats_numbers_alone(name: str) -> None:
    x = expected(inputs(name, np.float32), name, "nearest", True)
    x = x[~np.isnan(x)]
    got = np.asarray(rounded(x, name, "stochastic", jax.random.key(0)))
    assert same(got, x).all()


def test_stochastic_e8m0_has_the_right_mean_below_its_second_number_too() -> None:
    x = np.full(20_000, 1.25 * 2.0**-127, np.float32)
    got = np.asarray(rounded(x, "e8m0", "stochastic", jax.random.key(0)))
    bits = got.view(np.uint32)  # arithmetic would flush 2^-127
    up = (bits == 0x00800000).mean()
    assert set(np.unique(bits)) == {0x00400000, 0x00800000} and abs(up - 0.25) < 4 * 0.0031


def test_stochastic_rounding_is_a_function_of_its_key_alone() -> None:
    x = jnp.linspace(-3, 3, 64 * 8, dtype=jnp.float32).reshape(64, 8)
    key, other = jax.random.split(jax.random.key(5))

    def draw(v: Any, k: Any) -> Any:
        return round_to(v, "e4m3", "stochastic", k)

    want = draw(x, key)
    np.testing.assert_array_equal(jax.jit(draw)(x, key), want)
    assert not np.array_equal(draw(x, other), want)
    keys = jax.random.split(key, 3)
    each = np.stack([draw(x, k) for k in keys])
    np.testing.assert_array_equal(jax.vmap(draw, (None, 0))(x, keys), each)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, k: (c, draw(x, k)), 0, keys)[1], each)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
        spread = jax.device_put(x, NamedSharding(mesh, spec))
        assert len(spread.addressable_shards) == 8
        np.testing.assert_array_equal(jax.jit(draw)(spread, key), want)
