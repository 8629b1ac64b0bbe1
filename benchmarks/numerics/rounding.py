"""Rounding to every number format of ml_dtypes, and the mean of stochastic rounding.

Run:       python -m benchmarks.numerics.rounding
Expected:  no mismatch in 10^7 float32 patterns a format; |mean - x| < 4 sigma / sqrt(N), N = 10^6.

The patterns hold random bits (every class of number), every size that the format knows, all its
numbers with their ties, and what lies one float32 beside them; `tests/formats/oracle.py` makes
them. For the mean, x lies in every binade of a format, subnormal ones and below the smallest too.
"""

from __future__ import annotations

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.page import write
from mpjax.formats import Format, round_to
from mpjax.markdown import table
from tests.formats.oracle import DTYPES, KNOWN, NO_NAN, cast, patterns, same

PATTERNS, DRAWS, CHUNK = 10_000_000, 1_000_000, 1_000_000
STOCHASTIC = ("e4m3", "e5m2", "e2m1", "bfloat16", "q8.8")
rounded = jax.jit(round_to, static_argnames=("format", "rounding", "saturate"))


def compare(name: str) -> tuple[int, int, int]:
    """Patterns, those that are NaN, and mismatches of a format."""
    count = nan = wrong = 0
    for seed in range(PATTERNS // CHUNK):
        x = patterns(name, CHUNK, seed=1000 * (seed + 1))
        ours, theirs = np.asarray(rounded(x, name, saturate=False)), cast(x, name)
        missing = np.isnan(x)
        match = same(ours, theirs)
        if name in NO_NAN:
            match = np.where(missing, np.isnan(ours), match)
        count, nan = count + len(x), nan + int(missing.sum())
        wrong += int((~match).sum())
    return count, nan, wrong


def points(name: str) -> np.ndarray:
    """A float32 in every binade of a format, between two of its numbers."""
    f, grid = Format(name), KNOWN[name]
    lowest, highest = (int(np.floor(np.log2(x))) for x in (f.min_subnormal, f.max))
    powers = np.arange(lowest - 1, highest + 1)
    rng = np.random.default_rng(8)
    at = np.minimum(np.ldexp(1 + rng.uniform(0.05, 0.95, powers.size), powers), 0.999 * f.max)
    low, high = grid.neighbours(at)
    share = rng.uniform(0.05, 0.95, powers.size)
    return ((low + (high - low) * share) * rng.choice([-1, 1], powers.size)).astype(np.float32)


@jax.jit
def ones(y: jax.Array, value: jax.Array) -> jax.Array:
    """How many of y are a value, bit for bit."""
    whole = [jax.lax.bitcast_convert_type(v, jnp.uint32) for v in (y, value)]
    return jnp.sum(whole[0] == whole[1])


def means(name: str) -> tuple[int, float, float, int]:
    """Values, the worst two deviations of stochastic and nearest, results beside the neighbours."""
    worst, control, stray = 0.0, np.inf, 0
    x = points(name)
    low, high = KNOWN[name].neighbours(x.astype(np.float64))
    for i, value in enumerate(x):
        y = rounded(np.full(DRAWS, value), name, "stochastic", jax.random.key(i))
        ends = np.array([low[i], high[i]], np.float32)
        # -0 below zero: the sign of x stays, but for fixed point
        if ends[1] == 0 and name != "q8.8":
            ends[1] = np.float32(-0.0)
        down, up = (int(ones(y, np.float32(end))) for end in ends)
        p = (float(value) - low[i]) / (high[i] - low[i])
        sigma = np.sqrt(p * (1 - p) / DRAWS)
        stray += DRAWS - up - down
        worst = max(worst, abs(up / DRAWS - p) / sigma)
        nearest = float(rounded(x[i : i + 1], name)[0] == ends[1])
        control = min(control, abs(nearest - p) / sigma)
    return len(x), float(worst), float(control), stray


def main() -> bool:
    """Runs both; whether all is as expected."""
    casts, good = [], True
    for name in DTYPES:
        count, nan, wrong = compare(name)
        good &= wrong == 0 and count >= PATTERNS
        casts.append((name, np.dtype(DTYPES[name]).name, count, nan, wrong))
        print(casts[-1], flush=True)
    drawn = []
    for name in STOCHASTIC:
        count, worst, control, stray = means(name)
        good &= worst < 4 and stray == 0 and control > 4
        drawn.append((name, count, f"{worst:.2f}", f"{control:.0f}", stray))
        print(drawn[-1], flush=True)
    first = table(("format", "cast of", "patterns", "of them NaN", "mismatches"), casts)
    head = ("format", "values", "worst \\|mean - x\\|", "nearest's best", "results beside")
    body = (
        "`round_to(x, format, saturate=False)` under `jit` against the cast of ml_dtypes (float16:"
        " of numpy), float32 patterns: bit-equal with the sign of zero; NaN must be NaN. "
        f"{', '.join(NO_NAN)} have no NaN: ml_dtypes casts NaN to -0 there, ours stays NaN, which"
        f" is what is checked.\n\n{first}\n\n"
        f"`round_to(x, format, 'stochastic', key)`, {DRAWS} draws of each value, one value in"
        " every binade of the format and in the one below its smallest number. Deviations are in"
        " units of sigma / sqrt(N); the bar is 4, which round-to-nearest, the control, must miss"
        " everywhere. The last column counts results that are neither neighbour.\n\n"
        f"{table(head, drawn)}\n\nThe bars are {'met' if good else 'MISSED'}."
    )
    write("rounding", "Rounding, bit for bit, and its mean", body)
    return good


if __name__ == "__main__":
    sys.exit(not main())
