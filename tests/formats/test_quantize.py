"""Quantised arrays against a loop over their groups in numpy, and inside every transform."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpjax import formats
from mpjax.errors import ConfigError
from mpjax.formats import Format, Quantized, fake_quantize, saturation_rate, sqnr
from tests.formats.oracle import groups, slow_quantize

SCALINGS = ["tensor", "row", "block(1x128)", "block(128x128)", "mx(32)", "nv(16)", "nv(16x16)"]
FORMATS = ["e4m3", "e5m2", "e2m1", "e3m2", "int8", "int4"]
# each scaling with three formats, each format with one scaling; nv takes no integers
PAIRS = [(f, s) for f in ("e4m3", "e2m1") for s in SCALINGS]
PAIRS += [("int8", s) for s in SCALINGS[:5]] + [("e5m2", "row"), ("e3m2", "row"), ("int4", "row")]
quantized = jax.jit(
    formats.quantize,
    static_argnames=("format", "scaling", "axis", "rounding", "scale_rounding", "offset"),
)


pytestmark = pytest.mark.usefixtures("fast_compile")


def quantize(x: Any, *args: Any, **options: Any) -> Any:
    return quantized(jnp.asarray(x), *args, **options)


def round_to(x: Any, name: str) -> np.ndarray:
    return np.asarray(formats.round_to(jnp.asarray(x), name))


def matrix(rows: int = 20, columns: int = 300, seed: int = 0) -> np.ndarray:
    """Normal numbers whose size differs from row to row and from block to block."""
    rng = np.random.default_rng(seed)
    size = np.exp2(rng.integers(-8, 8, (rows, 1)) + np.arange(columns) // 16 % 5)
    return (rng.standard_normal((rows, columns)) * size).astype(np.float32)


def values_of(q: Any) -> np.ndarray:
    return np.asarray(q.dequantize(jnp.float32))


def by_group(x: np.ndarray, scaling: str) -> list[np.ndarray]:
    return [x[place] for place in groups(x.shape, scaling)]


# --- against the loop over groups ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "scaling"), PAIRS)
def test_equals_the_loop_over_groups(name: str, scaling: str) -> None:
    roundings: list[str | None] = [None] if scaling[:2] in ("mx", "nv") else ["none", "up"]
    roundings += [] if scaling.startswith("nv") else ["down"]
    x = matrix(130, 260) if scaling == "block(128x128)" else matrix()
    for scale_rounding in roundings:
        q = quantized(x, name, scaling, scale_rounding=scale_rounding)
        rule = scale_rounding or ("up" if scaling.startswith("mx") else "none")
        want, scales = slow_quantize(x, name, scaling, rule)
        np.testing.assert_array_equal(np.asarray(q.scales).ravel(), scales)
        np.testing.assert_array_equal(values_of(q), want)
        assert len(scales) == len(groups(x.shape, scaling))


def test_the_loop_tells_scalings_and_formats_apart() -> None:
    x = matrix()
    seen = {(f, s): slow_quantize(x, f, s, "none")[0].tobytes() for f, s in PAIRS}
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_groups_lie_along_the_contracted_axis(scaling: str) -> None:
    x = matrix(70, 300)
    across, along = quantize(x, "e4m3", scaling, axis=0), quantize(x.T, "e4m3", scaling, axis=-1)
    np.testing.assert_array_equal(values_of(across), values_of(along).T)
    np.testing.assert_array_equal(across.scales, along.scales.T)
    other = quantize(x, "e4m3", scaling, axis=-1)
    if scaling not in ("tensor", "block(128x128)", "nv(16x16)"):  # these are symmetric
        assert not np.array_equal(values_of(across), values_of(other))


def test_more_axes_and_several_contracted_ones() -> None:
    x = np.stack([matrix(6, 40, seed) for seed in range(4)])  # 4, 6, 40
    q = quantize(x, "int8", "row", axis=(1, 2))
    for one, scale, got in zip(x, q.scales.ravel(), values_of(q), strict=True):
        want, scales = slow_quantize(one, "int8", "tensor", "none")
        np.testing.assert_array_equal(got, want)
        assert scale == scales[0]
    q = quantize(x, "e4m3", "block(4x16)", axis=2)
    for one, got in zip(x, values_of(q), strict=True):
        np.testing.assert_array_equal(got, slow_quantize(one, "e4m3", "block(4x16)", "none")[0])
    for small in (np.float32(3.3), np.float32([3.3])):
        np.testing.assert_allclose(values_of(quantize(small, "e4m3")), small, rtol=1e-7)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_short_inputs_give_what_their_float32_gives(dtype: Any) -> None:
    x = matrix().astype(dtype)
    for name, scaling in (("e4m3", "tensor"), ("int8", "row"), ("e2m1", "nv(16)")):
        q, wide = quantize(x, name, scaling), quantize(x.astype(np.float32), name, scaling)
        np.testing.assert_array_equal(values_of(q), values_of(wide))
        assert q.dequantize().dtype == dtype and q.shape == x.shape


@pytest.mark.parametrize("name", [*FORMATS, "int2", "e4m3ieee", "e5m2fnuz", "e2m3"])
def test_values_are_at_most_two_to_the_bits_numbers_of_the_format(name: str) -> None:
    f, x = Format(name), matrix(100, 700)
    q = quantized(x, name, "tensor")
    values = np.asarray(q.values.astype(jnp.float32))
    np.testing.assert_array_equal(values, round_to(values, name))
    assert 2 < len(np.unique(values)) <= 2**f.bits
    assert q.values.dtype == (f.dtype or np.float32)
    half = np.unique(quantized(x, name, "block(1x128)").values.astype(jnp.float32))
    assert len(half) <= 2**f.bits
    assert len(np.unique(values_of(q) * 1.0)) == len(np.unique(values))
    assert len(np.unique(x)) > 2**16  # the control: what was not quantised


# --- groups that are zero, tiny, huge or not finite ----------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["e4m3", "e2m1", "int8"])
def test_a_zero_group_has_scale_1_and_stays_zero(name: str, scaling: str) -> None:
    if (name, scaling) not in PAIRS:
        pytest.skip("refused")
    x = matrix()
    x[groups(x.shape, scaling)[0]] = 0
    q = quantized(x, name, scaling)
    assert q.scales.ravel()[0] == (2.0**-9 if scaling.startswith("nv") else 1)
    np.testing.assert_array_equal(by_group(values_of(q), scaling)[0], 0)
    assert np.isfinite(values_of(q)).all()
    zeros = quantized(x * 0, name, scaling)
    np.testing.assert_array_equal(values_of(zeros), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "scaling"), PAIRS)
def test_what_is_not_finite_spoils_its_group_and_no_other(
    name: str, scaling: str, bad: float
) -> None:
    x = matrix()
    clean = by_group(values_of(quantized(x, name, scaling)), scaling)
    x[3, 17] = bad
    got = by_group(values_of(quantized(x, name, scaling)), scaling)
    hit = [i for i, part in enumerate(by_group(x, scaling)) if not np.isfinite(part).all()]
    assert len(hit) == 1
    for i, (part, before) in enumerate(zip(got, clean, strict=True)):
        if i in hit or scaling.startswith("nv"):
            assert np.isnan(part).all()
        else:
            np.testing.assert_array_equal(part, before)


@pytest.mark.parametrize("scale_rounding", ["none", "up", "down"])
@pytest.mark.parametrize("amax", [1e-44, 2.0**-127, 2.0**-126, 1e-37, 1e-30, 1e30, 2.5e38])
def test_sizes_at_the_ends_of_float32(amax: float, scale_rounding: str) -> None:
    x = np.float32([[1, -0.5, 0.25, 0]]) * np.float32(amax)
    for name in ("e4m3", "e5m2", "e2m1", "int8", "int4"):
        q = quantized(x, name, "row", scale_rounding=scale_rounding)
        got = values_of(q)
        assert np.isfinite(got).all() and np.isfinite(np.asarray(q.scales)).all()
        if amax < 2.0**-126:  # scales end at the smallest normal number; the rest is exact
            scale = np.asarray(q.scales, np.float64)
            ratio = np.float32(x.astype(np.float64) / scale)
            want = np.asarray(round_to(ratio, name), np.float64) * scale
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=2.0**-149)
        elif amax > 1e-36:  # half a step of the coarsest, or the clipping of OCP's rule
            worst = 0.21 if scale_rounding != "down" else 0.26
            assert np.abs(got[0, 0] / x[0, 0] - 1) <= worst, (name, got, x)


@pytest.mark.parametrize("size", [2.0**-126, 1e-37, 1e-36, 1e-30, 1.0, 1e30, 1e37])
def test_nv_blocks_far_below_the_tensors_largest(size: float) -> None:
    x = np.float32(np.concatenate([np.ones(16), np.full(16, 1e-9), np.zeros(16)])) * np.float32(
        size
    )
    for name in ("e2m1", "e4m3"):
        got = values_of(quantized(x, name, "nv(16)"))
        assert np.isfinite(got).all() and (got[32:] == 0).all()
        if size >= 1:  # below 448^2 2^-117 the float32 scale of e4m3 is at its least
            np.testing.assert_allclose(got[:16], x[:16], rtol=3e-7)


def test_up_never_saturates_and_ocps_rule_does() -> None:
    x = matrix()
    for name in ("e4m3", "e5m2", "e2m1", "e3m2", "e2m3"):
        up, down = (quantized(x, name, "mx(32)", scale_rounding=r) for r in ("up", "down"))
        none = quantized(x, name, "block(1x32)")
        assert saturation_rate(jnp.asarray(x), up) == saturation_rate(jnp.asarray(x), none) == 0
        assert (np.abs(values_of(up)) <= np.abs(x).max()).all() or name != "e4m3"
        assert saturation_rate(jnp.asarray(x), down) > 0.001
        assert set(np.unique(np.asarray(up.scales / down.scales))) == {1.0, 2.0}
    exact = np.float32([[448.0, 1, 2, 3]])  # amax / max is a power of two: no step up
    assert quantized(exact * 4, "e4m3", "mx(32)").scales.item() == 4
    above = np.nextafter(exact * 4, np.float32(np.inf))
    assert quantized(above, "e4m3", "mx(32)").scales.item() == 8


def test_scales_are_numbers_of_their_formats() -> None:
    x = matrix() * np.float32(1e-3)
    for rule in ("up", "down"):
        scales = quantized(x, "e4m3", "mx(32)", scale_rounding=rule).scales
        np.testing.assert_array_equal(round_to(scales, "e8m0"), scales)
    q = quantized(x, "e2m1", "nv(16)")
    np.testing.assert_array_equal(round_to(q.scales, "e4m3"), q.scales)
    assert q.scales.max() == 448 and q.tensor_scale.shape == ()
    loose = quantized(x, "e4m3", "row").scales  # the control: float32 scales are neither
    assert not np.array_equal(round_to(loose, "e8m0"), loose)


def test_without_scaling_nan_is_never_lost() -> None:
    x = np.float32([[np.nan, 1.0, 300.0, -np.inf]])
    np.testing.assert_array_equal(values_of(quantized(x, "e4m3", "none")), [[np.nan, 1, 288, -448]])
    np.testing.assert_array_equal(values_of(quantized(x, "q8.8", "none"))[0, 1:3], [1, 128 - 2**-8])
    assert np.isnan(values_of(quantized(x, "q8.8", "none"))[0, 0])
    for name in ("int8", "e2m1"):  # no NaN in what holds them
        assert np.isnan(values_of(quantized(x, name, "none"))).all()
        assert np.isfinite(values_of(quantized(x[:, 1:], name, "none"))).all()


# --- inside transforms ---------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
def test_jit_vmap_and_scan_give_the_same_bits(scaling: str) -> None:
    x = np.stack([matrix(4, 40, seed) for seed in range(3)])
    plain = [formats.quantize(jnp.asarray(one), "e4m3", scaling) for one in x]
    want = np.stack([values_of(q) for q in plain])
    scan = jax.jit(
        lambda v: jax.lax.scan(lambda c, one: (c, quantize(one, "e4m3", scaling)), 0, v)[1]
    )(x)
    stacked = jax.vmap(functools.partial(quantize, format="e4m3", scaling=scaling))(x)
    for q in (scan, stacked):
        assert isinstance(q, Quantized) and q.values.dtype == jnp.float8_e4m3fn
        np.testing.assert_array_equal(jax.vmap(values := Quantized.dequantize)(q), want)
        second = jax.tree.map(lambda leaf: leaf[1], q)
        np.testing.assert_array_equal(values(second), want[1])
        assert jax.tree.structure(second) == jax.tree.structure(plain[1])
    carried = jax.lax.scan(lambda q, _: (q, q.dequantize()), plain[0], None, length=2)[1]
    np.testing.assert_array_equal(carried[1], want[0])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_sharded_over_8_devices_equals_unsharded(scaling: str, rounding: str) -> None:
    x, key = matrix(32, 320), jax.random.key(1)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y")))
    assert len(spread.addressable_shards) == 8
    one, many = (quantized(v, "e4m3", scaling, rounding=rounding, key=key) for v in (x, spread))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    if rounding == "stochastic":
        other = quantized(x, "e4m3", scaling, rounding=rounding, key=jax.random.key(2))
        assert not np.array_equal(values_of(one), values_of(other))


@pytest.mark.parametrize("name", ["e4m3", "int8", "e2m1", "e3m2"])
def test_gradients(name: str) -> None:
    x = jnp.asarray(matrix(4, 40))
    hard = jax.jit(jax.grad(lambda v: (quantize(v, name, "row").dequantize() * 3).sum()))(x)
    np.testing.assert_array_equal(hard, np.zeros_like(x))
    soft = jax.jit(jax.grad(lambda v: (fake_quantize(v, name, "row") * 3).sum()))(x)
    np.testing.assert_array_equal(soft, np.full_like(x, 3))
    np.testing.assert_array_equal(
        fake_quantize(x, name, "row"), values_of(quantize(x, name, "row"))
    )


def test_fake_quantize_with_a_traced_key() -> None:
    x, keys = jnp.asarray(matrix(4, 40)), jax.random.split(jax.random.key(0), 3)

    def f(v: Any, key: Any) -> Any:
        return fake_quantize(v, "e2m1", "row", rounding="stochastic", key=key).sum()

    want = np.ones((3, 4, 40))
    many = jax.jit(jax.vmap(jax.grad(f), in_axes=(None, 0)))(x, keys)
    np.testing.assert_array_equal(many, want)
    looped = jax.lax.scan(lambda c, key: (c, jax.value_and_grad(f)(x, key)), 0, keys)[1]
    np.testing.assert_array_equal(looped[1], want)
    assert len(np.unique(looped[0])) == 3
    for outer in (jax.jit(f), jax.checkpoint(f), lambda v, k: jax.lax.scan(
        lambda c, key: (c + f(v, key), None), 0.0, k[None])[0]):  # fmt: skip
        np.testing.assert_array_equal(jax.grad(outer)(x, keys[0]), want[0])


@pytest.mark.parametrize(
    ("name", "scaling", "bits"),
    [
        ("e4m3", "none", 8 * 6000),
        ("e4m3", "tensor", 8 * 6000 + 32),
        ("int4", "block(1x128)", 4 * 6000 + 32 * 20 * 3),
        ("e2m1", "mx(32)", 4 * 6000 + 8 * 20 * 10),
        ("e2m1", "nv(16)", 4 * 6000 + 8 * 20 * 19 + 32),
        ("e3m2", "row", 6 * 6000 + 32 * 20),
    ],
)
def test_bytes_are_those_of_the_formats(name: str, scaling: str, bits: int) -> None:
    assert quantize(matrix(), name, scaling).nbytes == bits / 8


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "fp8"}, ["unknown name 'fp8'", "known:"]),
        ({"scaling": "block(128)"}, ["unknown 'block(128)'", "block(1x128)"]),
        ({"scaling": "mx(0)"}, ["unknown 'mx(0)'", "write none, tensor"]),
        ({"rounding": "up"}, ["quantize:", "unknown rounding 'up'", "nearest stochastic floor"]),
        ({"rounding": "stochastic"}, ["quantize:", "random bits", "key="]),
        ({"scale_rounding": "nearest"}, ["quantize:", "unknown 'nearest'", "none down up"]),
        ({"format": "e8m0"}, ["quantize:", "holds scales", "e4m3"]),
        ({"format": "q8.8"}, ["fixed point q8.8", "scaling=tensor", "scaling=none"]),
        ({"format": "int8", "scaling": "nv(16)"}, ["nv(16)", "int8", "row or block"]),
        ({"scaling": "mx(32)", "scale_rounding": "none"}, ["mx(32)", "e8m0", "up or down"]),
        ({"scaling": "nv(16)", "scale_rounding": "up"}, ["nv(16)", "leave scale_rounding out"]),
        ({"axis": 2, "scaling": "row"}, ["axis 2", "2 axes", "-2 .. 1"]),
        ({"axis": (0, -3), "scaling": "mx(32)"}, ["axis -3", "2 axes"]),
        ({"x": np.zeros((0, 3), np.float32)}, ["(0, 3)", "no elements"]),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], words: list[str]) -> None:
    given = {"x": matrix(2, 3), "format": "e4m3", **options}
    with pytest.raises(ConfigError) as error:
        quantize(given.pop("x"), **given)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_scalar_has_no_rows() -> None:
    with pytest.raises(ConfigError, match="axis -1 of an array of 0 axes"):
        quantize(jnp.float32(1), "e4m3", "row")
    assert math.isclose(quantize(jnp.float32(1), "e4m3").dequantize(), 1, rel_tol=1e-6)


def affine(x: np.ndarray, name: str, block: int) -> np.ndarray:
    """Scale and offset for each block of a row, in float64."""
    out, low, steps = np.empty(x.shape), *((-8, 15) if name == "int4" else (-128, 255))
    for row, into in zip(x.astype(np.float64), out, strict=True):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            s = np.ptp(part) / steps or 1.0
            m = part.min() - low * s if np.ptp(part) else part.min()
            into[start : start + block] = np.rint((part - m) / s) * s + m
    return out


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("block", [32, 24])  # the second leaves a short last block
def test_an_offset_takes_each_block_to_the_whole_range(name: str, block: int) -> None:
    x = matrix(6, 160) + 3 * matrix(6, 1, 1)
    same = (2, slice(block, 2 * block))
    x[same] = 0.7  # equal numbers are exact
    q = jax.jit(lambda x: quantize(x, name, f"block(1x{block})", offset=True))(x)
    got, want = np.asarray(q.dequantize()), affine(x, name, block)
    step = np.asarray(q.scales).max()
    # a quotient just beside a tie may round to the other side in float32
    assert (np.abs(got - want) > 1e-4 * step).mean() < 0.01
    assert np.abs(got - x).max() < 0.51 * step
    np.testing.assert_array_equal(got[same], x[same])
    codes = np.asarray(q.values.astype(np.int32))
    assert (codes.min(), codes.max()) == ((-8, 7) if name == "int4" else (-128, 127))
    positive = jnp.abs(x)  # here symmetric codes lose the sign's bit, 6 dB
    scaling = f"block(1x{block})"
    with_offset, symmetric = (quantize(positive, name, scaling, offset=o) for o in (True, False))
    assert float(sqnr(positive, with_offset)) > float(sqnr(positive, symmetric)) + 5
    assert with_offset.nbytes == symmetric.nbytes + 4 * symmetric.scales.size


def test_an_offset_loses_no_nan_and_no_large_range() -> None:
    x = np.zeros((3, 32), np.float32)
    x[0, 3], x[1, 4], x[2, 5], x[2, 6] = np.nan, np.inf, 3e38, -3e38
    got = np.asarray(quantize(x, "int8", "row", offset=True).dequantize())
    assert np.isnan(got[:2]).all()
    np.testing.assert_allclose(got[2], x[2], atol=3e36)


@pytest.mark.parametrize(
    ("format", "scaling", "options", "message"),
    [
        ("e4m3", "row", {}, "e4m3 with scaling=row takes no offset; take int8, int4"),
        ("int8", "none", {}, "int8 with scaling=none takes no offset"),
        ("int8", "mx(32)", {}, "mx.32. takes no offset"),
        ("int8", "row", {"scale_rounding": "up"}, "scale_rounding='up' beside an offset"),
    ],
)
def test_what_takes_no_offset(format: str, scaling: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(jnp.ones((2, 32)), format, scaling, offset=True, **options)


def test_python_types_name_dtypes() -> None:
    q = formats.quantize(jnp.asarray(matrix(), jnp.bfloat16), "int8", "row")
    assert q.dequantize().dtype == jnp.bfloat16
    assert q.dequantize(float).dtype == q.dequantize("float32").dtype == jnp.float32
