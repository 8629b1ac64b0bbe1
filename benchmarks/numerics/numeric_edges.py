"""Rounding, scales, norms and statistics at the ends of their range, against exact arithmetic.

Run:       python -m benchmarks.numerics.numeric_edges
Expected:  no mismatch.

Both ends of every format in three dtypes (`tests/formats/test_rounding_ends.py`, in fractions);
tiny blocks of every scaling (`tests/formats/test_subnormal.py`, NumPy keeps subnormal numbers);
norms of gradients in every binade of float32; norms of float16 numbers up to its largest.
"""

from __future__ import annotations

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.page import write
from mpjax.errors import ConfigError
from mpjax.markdown import table
from mpjax.ops import norm
from mpjax.optim import global_norm
from mpjax.precision import parse_policy
from tests.formats.oracle import slow_quantize
from tests.formats.test_rounding_ends import CARRIERS, FORMATS, mismatches
from tests.formats.test_subnormal import X, ours

NAMES = (
    *("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e3m3", "e4m4", "e5m3", "float16"),
    *("int8", "int4", "int2"),
)
SCALINGS = [(s, r) for s in ("mx(32)", "row", "block(1x8)") for r in ("up", "down", "none")]
SCALINGS += [("nv(16)", "none"), ("tensor", "none")]


def tiny(scaling: str, rule: str) -> tuple[int, int, int]:
    """Formats and numbers of a scaling, and mismatches."""
    formats = count = wrong = 0
    x = X[:56] if scaling == "tensor" else X
    for name in NAMES:
        try:
            got = np.asarray(ours(x, name, scaling, rule)[0])
        except ConfigError:
            continue
        want = slow_quantize(x, name, scaling, rule)[0]
        # a subnormal product with a float32 scale is rounded twice
        slack = np.where((rule == "none") & (np.abs(want) < 2.0**-126), 2.0**-149, 0)
        formats, count = formats + 1, count + x.size
        wrong += int((np.abs(got.astype(np.float64) - want) > slack).sum())
    return formats, count, wrong


def norms() -> tuple[int, int, int]:
    """Binades, those where the norm is off by 1e-6, and those where its bits have changed."""
    new = jax.jit(global_norm)
    old = jax.jit(lambda g: jnp.sqrt(jnp.sum(jnp.square(g))))
    off = moved = 0
    binades = range(-116, 120)  # below, subnormal numbers are part of the norm, and taken for zero
    for exponent in binades:
        x = np.float32(np.random.default_rng(exponent + 200).normal(size=2000) * 2.0**exponent)
        want = np.sqrt((x.astype(np.float64) ** 2).sum())
        off += abs(float(new([x])) / want - 1) > 1e-6
        moved += abs(exponent) < 50 and float(new([x])) != float(old(x))
    return len(binades), int(off), int(moved)


def statistics() -> tuple[int, float]:
    """Sizes of float16 numbers, and the largest relative error of both norms."""
    worst, sizes = 0.0, [2.0**k for k in range(-8, 14)]
    for size in sizes:
        x = np.random.default_rng(1).normal(0, size, (4, 256)).astype(np.float16)
        for centre in (True, False):
            wide = x.astype(np.float64)
            wide = wide - wide.mean(-1, keepdims=True) if centre else wide
            want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
            got = norm(jnp.asarray(x), jnp.ones(256), None, parse_policy("f16"), centre=centre)
            error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
            worst = max(worst, float(error))
    return len(sizes), worst


def main() -> bool:
    """Runs all; whether all is as expected."""
    ends = []
    for name, carrier in CARRIERS.items():
        found = [mismatches(f, carrier) for f in FORMATS]
        ends.append((name, len(FORMATS), sum(n for n, _ in found), sum(len(w) for _, w in found)))
        print(ends[-1], flush=True)
    scales = []
    for scaling, rule in SCALINGS:
        row = (scaling, rule, *tiny(scaling, rule))
        if row[2]:
            scales.append(row)
            print(row, flush=True)
    binades, off, moved = norms()
    sizes, worst = statistics()
    good = not any(row[-1] for row in (*ends, *scales)) and not off and not moved and worst < 1e-3
    body = (
        "`round_to` to nearest and towards negative, saturating and not, at both ends of"
        f" each format:\n\n{table(('dtype', 'formats', 'results', 'mismatches'), ends)}\n\n"
        "`quantize(...).dequantize()` under `jit` of rows in every binade from 2^-152 to 2^-100,"
        " bit for bit; subnormal products with float32 scales within 2^-149:\n\n"
        f"{table(('scaling', 'scale rounding', 'formats', 'numbers', 'mismatches'), scales)}\n\n"
        f"`global_norm` in {binades} binades: {off} off by more than 1e-6; {moved} of those between"
        " 2^-50 and 2^50 with other bits than the plain sum of squares.\n\n"
        f"LayerNorm and RMSNorm of float16 numbers of {sizes} sizes up to 2^13: largest relative"
        f" error {worst:.1e} (bar 1e-3).\n\nThe bars are {'met' if good else 'MISSED'}."
    )
    write("numeric_edges", "Numbers at the ends of their range", body)
    return good


if __name__ == "__main__":
    sys.exit(not main())
