"""Measuring tensors: magnitudes, a histogram of exponents, and what each format would lose.

All of it is a vector of counts and a vector of reals, so that a program can hand it out of loops:
the statistics of two parts of a tensor give those of the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax.errors import ConfigError
from mpjax.formats import Format, round_to
from mpjax.formats.scaling import to_scale
from mpjax.interpret.core.shard_map import gathered
from mpjax.typing import Array

EXPONENTS = 256  # float32's exponent field: 0 is zero and subnormals, 255 is inf and NaN
# where counts and reals are
ZEROS, NANS, FIRST = EXPONENTS, EXPONENTS + 1, EXPONENTS + 2
MAX, AMAX, MEAN, RMS, NOISE = range(5)
_INF = 0x7F800000
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32"}
_SHORT |= {"f32": "float32"}

Pair: TypeAlias = tuple[Array, Array]  # counts (..., C) uint32, reals (..., R) float32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A format that a tensor might be stored in.

    Args:
      name: as the user wrote it.
      scaled: with one scale for the tensor, which takes its largest magnitude to the format's.
    """

    name: str
    scaled: bool = False

    @property
    def format(self) -> Format:
        """The format."""
        return Format(_SHORT.get(self.name, self.name))


def candidates(formats: Sequence[str]) -> tuple[Candidate, ...]:
    """Returns what to measure: each format as it is, and scaled where a scale can help.

    Args:
      formats: names of Formats; `bf16` and `fp16` are short for two of them.

    Raises:
      ConfigError: an unknown or a repeated name, or a format that holds no values.
    """
    if isinstance(formats, str):
        raise ConfigError(f"monitor: formats={formats!r} is one text; write formats=[{formats!r}]")
    found: list[Candidate] = []
    for name in formats:
        plain = Candidate(name)
        if plain in found:
            raise ConfigError(f"monitor: format {name!r} is named twice; name it once")
        if plain.format.kind == "power":
            raise ConfigError(f"monitor: format {name!r} holds scales, not values; leave it out")
        found.append(plain)
        # Eight bits of exponent reach as far as float32 does; fixed point takes no scale.
        narrow = plain.format.kind == "float" and plain.format.exponent_bits < 8
        if narrow or plain.format.is_integer:
            found.append(Candidate(name, scaled=True))
    return tuple(found)


_CHUNKS = (4096, 64)  # numbers a chunk; tensors that are smaller than the first take the second


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _in_chunk(reduce: Callable[..., Array], x: Array) -> Array:
    """Reduces each chunk; its last axis at the end, so that the work before is done in vectors."""
    return reduce(reduce(x, axis=1), axis=1)


def _count(mask: Array) -> Array:
    return _in_chunk(jnp.sum, mask.astype(jnp.float32)).astype(jnp.uint32)


def as_stored(x: Array) -> Array:
    """The value with its bits fixed: XLA drops a cast down that is cast up again at once."""
    if x.dtype.itemsize >= 4:
        return x
    whole = {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]
    bits = lax.optimization_barrier(lax.bitcast_convert_type(x, whole))
    return lax.bitcast_convert_type(bits, x.dtype)


def _sampled(rows: Array, sample: int) -> Array:
    """`sample` numbers of each row, one drawn from each of as many equal parts, and its extremes.

    They are drawn because an even stride follows patterns such as a causal mask, and always at the
    same indices, so that two measurements compare. The extremes are found on bits, in whose order a
    NaN lies beyond infinity, so that any NaN is an extreme.
    """
    size = rows.shape[1]
    if not sample or size <= sample:
        return rows
    parts = np.arange(sample) + np.random.default_rng(0).random(sample)
    locations = np.minimum(parts * (size / sample), size - 1).astype(np.int64)
    order = _in_order(lax.bitcast_convert_type(rows, jnp.int32))
    ends = [reduce(order, axis=1, keepdims=True) for reduce in (jnp.max, jnp.min)]
    ends = [lax.bitcast_convert_type(_in_order(end), jnp.float32) for end in ends]
    return jnp.concatenate([rows[:, locations], *ends], axis=1)


def _in_order(bits: Array) -> Array:
    """Patterns of float32 as integers in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def measure(
    tensors: Sequence[tuple[Array, bool]],
    formats: tuple[Candidate, ...],
    samples: Sequence[int] = (),
) -> list[Pair]:
    """Returns counts and reals of tensors, all of them measured by the same few operations.

    The tensors are concatenated in chunks of equal size: a program with hundreds of them compiles
    as fast as one with two, and each operation is long.

    Args:
      tensors: floating-point, any shape, each with whether its first axis is that of layers;
        float64 is measured as the float32 that is nearest.
      formats: from `candidates`.
      samples: how many numbers of each tensor, or of one layer of it, are measured; by default
        all are, and 0 is all.
    """
    rows = []
    for (x, layered), sample in zip(tensors, samples or [0] * len(tensors), strict=True):
        x = gathered(as_stored(x)).astype(jnp.float32)  # every narrower format is exact in it
        rows.append(_sampled(x.reshape(x.shape[0] if layered else 1, -1), sample))
    found: dict[int, Pair] = {}
    for big in (True, False):
        chosen = [i for i, row in enumerate(rows) if (row.shape[1] >= _CHUNKS[0]) == big]
        if not chosen:
            continue
        counts, reals = _measure([rows[i] for i in chosen], _CHUNKS[0 if big else 1], formats)
        first = 0
        for i in chosen:
            last = first + rows[i].shape[0]
            part = slice(first, last) if tensors[i][1] else first
            found[i] = counts[part], reals[part]
            first = last
    return [found[i] for i in range(len(rows))]


def _measure(rows: Sequence[Array], chunk: int, formats: tuple[Candidate, ...]) -> Pair:
    """Counts and reals of each row of matrices.

    Means are over the finite numbers. Zeros, subnormals and non-finite numbers are told apart by
    their bits, because compiled float32 arithmetic flushes subnormals. Numbers are divided by a
    power of two about as large as the largest before they are squared, because squares of small
    gradients underflow.
    """
    width = min(chunk, 128)
    filled: list[Array] = []
    owner: list[int] = []
    padding: list[int] = []
    for row in rows:
        pad = -row.shape[1] % chunk
        blank = jnp.full((row.shape[0], pad), jnp.nan, jnp.float32)
        if row.shape[0] == 1:  # one concatenation for all of these compiles fastest
            filled += [row[0], blank[0]]
        else:
            filled.append(jnp.concatenate([row, blank], axis=1).reshape(-1))
        each = (row.shape[1] + pad) // chunk
        owner += [len(padding) + r for r in range(row.shape[0]) for _ in range(each)]
        padding += [pad] * row.shape[0]
    of = np.array(owner, np.int32)
    count, chunks = len(padding), len(owner)
    # Behind a barrier: each of the operations below would gather the tensors again.
    x = lax.optimization_barrier(jnp.concatenate(filled))
    x = x.reshape(chunks, chunk // width, width)

    def sums(values: Array) -> Array:
        return jax.ops.segment_sum(values, of, count, indices_are_sorted=True)

    def largest(values: Array) -> Array:
        return jax.ops.segment_max(_in_chunk(jnp.max, values), of, count, indices_are_sorted=True)

    def spread(values: Array) -> Array:
        return values[of][:, None, None]

    m = _bits(x)
    field = (m >> jnp.uint32(23)).astype(jnp.int32)
    slots = jnp.asarray(of * EXPONENTS)[:, None, None] + field
    histogram = jnp.zeros(count * EXPONENTS, jnp.uint32)
    histogram = histogram.at[slots.reshape(-1)].add(jnp.uint32(1), mode="promise_in_bounds")
    pads = jnp.asarray(padding, jnp.uint32)
    histogram = histogram.reshape(count, EXPONENTS).at[:, -1].add(-pads)
    finite = m < jnp.uint32(_INF)
    finite_bits = jnp.where(finite, m, jnp.uint32(0))
    values = jnp.where(finite, x, jnp.float32(0))
    top = largest(finite_bits)
    # 2^unit is the power of two at the largest magnitude; its inverse must be a normal number.
    unit = jnp.clip((top >> jnp.uint32(23)).astype(jnp.int32), 1, 252)
    size = _float(unit.astype(jnp.uint32) << jnp.uint32(23))
    inverse = _float((254 - unit).astype(jnp.uint32) << jnp.uint32(23))
    numbers = jnp.maximum(_numbers(histogram), jnp.float32(1))
    # A subnormal is its pattern times 2^-149. 2^-149 times the inverse is made of bits: XLA would
    # reassociate a product of the two to one with a number that is flushed.
    step = spread(_float(jnp.maximum(105 - unit, 0).astype(jnp.uint32) << jnp.uint32(23)))
    tiny = finite_bits.astype(jnp.float32) * step
    whole = jnp.where(field == 0, jnp.where(x < 0, -tiny, tiny), values * spread(inverse))

    def mean(y: Array) -> Array:
        return sums(_in_chunk(jnp.sum, y)) / numbers

    nans = sums(_count(m > jnp.uint32(_INF))) - pads
    counts = [sums(_count(m == 0)), nans]
    reals = [
        largest(jnp.where(finite, x, jnp.float32(-jnp.inf))),
        _float(top),
        mean(whole) * size,
        jnp.sqrt(mean(jnp.square(whole))) * size,
    ]
    for candidate in formats:
        format = candidate.format
        if candidate.scaled:
            scale = to_scale(_float(top), format, "none")
            over = whole * spread(size * (1 / scale))  # as values / scale, subnormals too
            error = values - round_to(over, format) * spread(scale)
        else:
            over, error = values, values - round_to(values, format)
        reals.append(jnp.sqrt(mean(jnp.square(error * spread(inverse)))) * size)
        # To nearest, ties to even: half the smallest number is the largest that becomes zero.
        half = np.float32(format.min_subnormal / 2).view(np.uint32)
        below = _bits(over) <= jnp.uint32(int(half))
        counts.append(sums(_count(below & (finite_bits != 0))))
        if candidate.scaled:
            counts.append(histogram[:, -1] - nans)  # the largest finite number fits
        else:
            slack = 1 + 2.0**-21  # as in `mpjax.formats.saturation_rate`
            edge = float(jnp.finfo(jnp.float32).max)
            high, low = min(format.max * slack, edge), max(format.min * slack, -edge)
            counts.append(sums(_count((x > high) | (x < low))))
    return (
        jnp.concatenate([histogram, jnp.stack(counts, axis=1)], axis=1),
        jnp.stack(reals, axis=1),
    )


def _numbers(counts: Array) -> Array:
    """How many finite numbers were measured, float32."""
    return jnp.sum(counts[..., : EXPONENTS - 1], axis=-1, dtype=jnp.uint32).astype(jnp.float32)


def merge(pair: Pair) -> Pair:
    """Returns the statistics of parts that lie along the first axis as those of the whole."""
    counts, reals = pair
    numbers = _numbers(counts)
    share = (numbers / jnp.maximum(jnp.sum(numbers, axis=0), jnp.float32(1))[None])[..., None]
    # A branch that did not run recorded zeros, which are no maximum.
    peaks = jnp.where(numbers[..., None] > 0, reals[..., :MEAN], jnp.float32(-jnp.inf))
    peak = jnp.max(peaks, axis=0)
    peak = peak.at[..., AMAX].max(jnp.float32(0))
    mean = jnp.sum(reals[..., MEAN:RMS] * share, axis=0)
    roots = reals[..., RMS:]
    size = jnp.maximum(jnp.max(roots, axis=0), jnp.float32(2.0**-120))
    root = size * jnp.sqrt(jnp.sum(jnp.square(roots / size[None]) * share, axis=0))
    return jnp.sum(counts, axis=0, dtype=jnp.uint32), jnp.concatenate([peak, mean, root], axis=-1)


def fold(old: Array, new: Array, number: Array) -> Array:
    """Returns the statistics of a loop's iterations so far, with those of one more.

    Args:
      old: counts or reals of `number` iterations.
      new: those of one more; every iteration measures equally many numbers.
      number: int32.
    """
    if old.dtype == jnp.uint32:
        return old + new
    k = number.astype(jnp.float32)
    peak = jnp.maximum(old[..., :MEAN], new[..., :MEAN])
    mean = (old[..., MEAN:RMS] * k + new[..., MEAN:RMS]) / (k + 1)
    a, b = old[..., RMS:], new[..., RMS:]
    size = jnp.maximum(jnp.maximum(a, b), jnp.float32(2.0**-120))
    root = size * jnp.sqrt((jnp.square(a / size) * k + jnp.square(b / size)) / (k + 1))
    return jnp.where(number == 0, new, jnp.concatenate([peak, mean, root], axis=-1))
