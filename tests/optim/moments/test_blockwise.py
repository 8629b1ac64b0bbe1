"""Code books against the papers' definitions, the nearest code, blocks and their errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from mpjax.optim import Blockwise, quantize_blocks
from mpjax.optim.moments.blockwise import code_book, encode, tile_of
from mpjax.precision.moments import MomentFormat

BOOKS = list(itertools.product(("int8", "int4", "int8-linear"), (True, False)))
FORMATS = ("int8@256", "int4@128", "e4m3@256", "e5m2@256", "int8-linear", "int8@7", "int4@3")


pytestmark = pytest.mark.usefixtures("fast_compile")


def by_pattern(bits: int, signed: bool) -> list[float]:
    """Dettmers' dynamic tree, bit by bit: sign, zeros, an indicator bit, a linear fraction."""
    width = bits - 1 if signed else bits
    shortest = 0 if signed else 1  # without a sign, every fraction keeps one bit
    found = [0.0, 1.0]
    for k in range(1, 2**width):
        zeros, _, fraction = f"{k:0{width}b}".partition("1")
        if len(fraction) < shortest:
            continue  # the pattern that means 1
        place = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
        value = 10.0 ** -len(zeros) * (0.1 + 0.9 * place)
        found += [value, -value] if signed else [value]
    return sorted(found)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("signed", [True, False])
def test_the_tree_is_the_papers(name: str, bits: int, signed: bool) -> None:
    if name == "int4" and not signed:
        expected = [k / 16 for k in range(1, 17)]  # Li et al.: linear, zero excluded
    else:
        expected = by_pattern(bits, signed)
    assert len(expected) == 2**bits == len(set(expected))
    np.testing.assert_allclose(np.sort(code_book(name, signed)), expected, rtol=1e-7)


def test_what_is_known_of_the_books() -> None:
    signed, unsigned = code_book("int8", True), code_book("int8", False)
    for book in (signed, unsigned):
        assert len(set(book.tolist())) == 256 and book.max() == 1 and book[0] == 0
    assert np.abs(signed[1:]).min() == pytest.approx(5.5e-7)  # 10^-6 times 0.55
    assert unsigned[1:].min() == pytest.approx(3.25e-7)  # 10^-6 times 0.1 + 0.9 / 4
    assert signed.min() == pytest.approx(-(1 - 0.45 / 64)) and unsigned.min() == 0
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    assert code_book("int4", True)[1:9] == pytest.approx([*positive, 1.0])
    assert np.all(np.diff(signed[:129]) > 0) and np.all(np.diff(signed[129:]) > 0)
    assert np.all(np.diff(unsigned) > 0)


UNIT = st.one_of(
    st.floats(-1, 1, width=32),
    st.tuples(st.floats(-8, 0), st.sampled_from([1, -1])).map(
        lambda p: float(np.float32(p[1] * 10 ** p[0]))
    ),
)


@pytest.mark.parametrize(("name", "signed"), BOOKS)
@given(x=arrays(np.float32, 16, elements=UNIT))
def test_the_nearest_code_is_taken(name: str, signed: bool, x: Any) -> None:
    x = x if signed else np.abs(x)
    book = code_book(name, signed).astype(np.float64)
    codes = np.asarray(encode(jnp.asarray(x), name, signed))
    distance = np.abs(x.astype(np.float64)[:, None] - book[None])
    chosen = distance[np.arange(16), codes]
    # A float32 rounding next to a tie may go either way.
    assert (chosen <= distance.min(1) + 2.0**-23 * np.abs(x)).all()


@pytest.mark.parametrize(("name", "signed"), BOOKS)
def test_the_books_own_numbers_keep_their_codes_and_ties_go_towards_zero(
    name: str, signed: bool
) -> None:
    book = code_book(name, signed)
    codes = np.arange(book.size)
    if name == "int8-linear" and signed:
        codes = np.delete(codes, 128)  # means nothing
    assert np.array_equal(encode(jnp.asarray(book[codes]), name, signed), codes)
    if name == "int4" and not signed:  # exact in float32
        ties = jnp.asarray((book[1:] + book[:-1]) / 2)
        assert np.array_equal(encode(ties, name, signed), codes[:-1])


@pytest.mark.parametrize("signed", [True, False])
def test_the_error_of_each_decade(signed: bool) -> None:
    """At 10^-e a fraction of F - e bits is left: half a part of 0.9 10^-e."""
    rng, book = np.random.default_rng(0), code_book("int8", signed)
    for e in range(7):
        x = (10.0**-e * rng.uniform(0.1, 1, 4096)).astype(np.float32)
        error = np.abs(book[np.asarray(encode(jnp.asarray(x), "int8", signed))] - x)
        bound = 10.0**-e * 0.45 / 2 ** (6 + (not signed) - e)
        assert 0.5 * bound < error.max() <= 1.0001 * bound
        linear = code_book("int8-linear", signed)
        worse = np.abs(linear[np.asarray(encode(jnp.asarray(x), "int8-linear", signed))] - x)
        assert (worse.max() > bound) == (e > 0)  # the control: equal steps suit the top alone


# Blocks.

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 300))
def test_blocks_are_tiles_of_at_most_so_many_numbers(shape: tuple[int, ...], block: int) -> None:
    tile = tile_of(shape, block)
    assert 1 <= math.prod(tile) <= block and all(t <= n for t, n in zip(tile, shape, strict=True))
    if math.prod(shape) <= block:
        assert tile == shape
    assert tile_of(shape, 0) == shape


@pytest.mark.parametrize("last", [128, 130, 200, 256, 257, 352, 384, 512, 1024])
@pytest.mark.parametrize("rows", [(2, 128), (2, 384), (255,), (3, 5)])
def test_both_moments_take_less_than_two_and_a_tenth_bytes(
    rows: tuple[int, ...], last: int
) -> None:
    x = jax.ShapeDtypeStruct((*rows, last), jnp.float32)
    format = MomentFormat.parse("int8@256")
    stored = jax.eval_shape(lambda x: quantize_blocks(x, format, True), x)
    count = math.prod(x.shape)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    assert stored.codes.shape == x.shape and stored.absmax.ndim == x.ndim
    assert 2 * total / count <= 2.1


def oracle_absmax(x: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    counts = [-(-n // t) for n, t in zip(x.shape, tile, strict=True)]
    out = np.zeros(counts, np.float32)
    for index in np.ndindex(*counts):
        part = tuple(slice(i * t, (i + 1) * t) for i, t in zip(index, tile, strict=True))
        out[index] = np.abs(x[part]).max()
    return out


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 300), (2, 5, 7), (130, 3)])
def test_each_block_is_scaled_by_its_own_absmax(
    text: str, signed: bool, shape: tuple[int, ...]
) -> None:
    rng, format = np.random.default_rng(1), MomentFormat.parse(text)
    x = (rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 3, shape)).astype(np.float32)
    x = np.asarray(x if signed else np.abs(x))
    stored = jax.jit(lambda x: quantize_blocks(x, format, signed))(jnp.asarray(x))
    wide = x.reshape(shape or (1,))
    tile = tile_of(wide.shape, format.block or 0)
    absmax = oracle_absmax(wide, tile)
    assert np.array_equal(stored.absmax, absmax)
    wide_absmax = np.kron(absmax, np.ones(tile, np.float32))[tuple(map(slice, wide.shape))]
    unit = wide / wide_absmax
    if format.name in ("e4m3", "e5m2"):
        kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[format.name]
        top = np.float32(ml_dtypes.finfo(kind).max)
        assert np.array_equal(np.asarray(stored.codes), (unit * top).astype(kind))
        expected = (unit * top).astype(kind).astype(np.float32) / top * wide_absmax
    else:
        book = code_book(format.name, signed)
        expected = book[np.abs(unit[..., None] - book).argmin(-1)] * wide_absmax
    got = np.asarray(jax.jit(lambda q: q.dequantize())(stored))
    assert got.dtype == np.float32 and got.shape == shape
    np.testing.assert_allclose(got.reshape(wide.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_zero_and_tiny_numbers_finite(text: str, signed: bool) -> None:
    format = MomentFormat.parse(text)
    store = lambda x: quantize_blocks(x, format, signed)  # noqa: E731
    for run in (store, jax.jit(store)):
        zero = run(jnp.zeros((2, 9)))
        assert not np.asarray(zero.absmax).any()
        assert not np.asarray(zero.codes).view(np.uint8).any()
        assert np.array_equal(zero.dequantize(), np.zeros((2, 9)))
        tiny = run(jnp.full((2, 9), 1e-40)).dequantize()
        assert np.isfinite(np.asarray(tiny)).all() and (np.abs(tiny) <= 1.1e-40).all()


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_not_hidden(text: str, bad: float) -> None:
    format = MomentFormat.parse(text)
    x = np.ones((4, 256), np.float32)
    x[1, 7] = bad
    out = np.asarray(quantize_blocks(jnp.asarray(x), format, True).dequantize())
    assert not np.isfinite(out[1, 7])
    rest = np.isfinite(out).sum()
    assert rest == 0 if format.block == 0 else rest >= 2 * 256  # its block tells, others do not


def test_a_stored_moment_is_a_pytree_that_keeps_its_settings() -> None:
    stored = quantize_blocks(jnp.arange(6.0).reshape(2, 3), MomentFormat.parse("int4@4"), False)
    leaves, tree = jax.tree.flatten(stored)
    assert [leaf.dtype.name for leaf in leaves] == ["uint8", "float32"]
    again = jax.jit(lambda q: q)(jax.tree.unflatten(tree, leaves))
    assert isinstance(again, Blockwise) and again.format == stored.format
    assert again.shape == (2, 3) and not again.signed
    assert np.array_equal(again.dequantize(), stored.dequantize())
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), stored)
    assert jax.tree.structure(specs) == tree
