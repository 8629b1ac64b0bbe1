"""The dtype and the bits of 236 functions under autocast, against hand-written casts.

Run:       python -m benchmarks.tools.autocast_table
Expected:  no row whose dtype or bits differ, for bfloat16 and float16, of low values, float32
           values, one of each, and low arguments.

The table is `tests/interpret/autocast/autocast_table.py`, transcribed from PyTorch's Autocast Op
Reference. The suite checks every dtype and a part of the bits.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"

from collections import Counter

import jax
import jax.numpy as jnp

from benchmarks.common.page import write
from mpjax.markdown import table
from tests.interpret.autocast import test_table as test
from tests.interpret.autocast.autocast_table import DEVIATES, FLOAT32_INSIDE, ROWS

PATTERNS = {
    "low": "made low by a product in autocast",
    "float32": "float32",
    "mixed": "the first made low, the others float32",
    "arguments": "low before autocast saw them",
}


def main() -> None:
    """Measures and writes the page."""
    jax.config.update("jax_disable_most_optimizations", True)
    rows, wrong = [], []
    for low in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        for pattern, what in PATTERNS.items():
            mine = test.rows_of(pattern)
            found = test.compare(mine, pattern, low)
            bad = [r.name for r in mine if not test.is_same(r, pattern, low, *found[r.name])]
            wrong += [f"{name}, {pattern}, {low.name}" for name in bad]
            rows.append([low.name, what, len(mine), len(bad)])
    kinds = Counter(row.kind for row in ROWS)
    deviations = [
        [f"`{row.name}`", f"`{row.torch}`", row.kind, DEVIATES[row.name].kind,
         DEVIATES[row.name].why + ("" if DEVIATES[row.name].same_bits else " (dtype only)")]
        for row in ROWS
        if row.name in DEVIATES
    ]  # fmt: skip
    inside = ", ".join(f"`{name}`" for name in FLOAT32_INSIDE)
    every = [[f"`{row.name}`", f"`{row.torch}`", row.kind] for row in ROWS]
    body = f"""{len(ROWS)} functions: {", ".join(f"{n} {kind}" for kind, n in kinds.items())}.
Same dtype as the table's and bit for bit the result of the function with hand-written casts, both \
compiled with `xla_allow_excess_precision=false`, without which XLA on CPUs drops roundings.

{table(["low dtype", "operands", "functions", "wrong"], rows)}

{"Wrong: " + "; ".join(wrong) if wrong else "None is wrong."}

## Where autocast deviates from the reference

{table(["function", "PyTorch's name", "reference", "autocast", "why"], deviations)}

In the dtype of the reference, with the digits of float32 inside: {inside}.

## All functions

{table(["function", "PyTorch's name", "reference"], every)}
"""
    write("autocast_table", "The dtypes and bits of autocast, function by function", body)


if __name__ == "__main__":
    main()
