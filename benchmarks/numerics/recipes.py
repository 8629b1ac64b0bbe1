"""What each recipe loses in its three products, and what blocks gain on tensors with outliers.

Run:       python -m benchmarks.numerics.recipes
Expected:  8-bit recipes above 20 dB, at most 2^bits distinct values, the Hadamard identity to 1e-5;
           at 100x an int8 scale for each block gains more than 10 dB in wgrad, and with channels
           at random places 9 to 10 dB in the output, which misses the bar of 10.

The measurements are those of `experiments/formats.py` at its defaults, where the data, and what is
ordinary, are described. Beside them stands what blocks gain when the outlier channels lie at equal
distances or together, for that decides how many ordinary channels share a block with one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import formats  # sets XLA flags before JAX starts

from benchmarks.common.page import write
from common.product_error import Outliers, with_outliers
from mpjax.markdown import table
from mpjax.precision import parse_dtype

PAIRS = ("int8-tensor", "int8-block", "e4m3-tensor", "e4m3-block")
# (pair, factor of the outlier channels, place)
GAINS = (
    ("int8", 100.0, "x in output"),
    ("int8", 100.0, "output"),
    ("int8", 100.0, "x in output, ordinary"),
    ("int8", 100.0, "wgrad"),
    ("e4m3", 1e4, "x in output, ordinary"),
    ("e4m3", 1e4, "wgrad, ordinary"),
    ("e4m3", 100.0, "x in output, ordinary"),
)


def placed(config: formats.Config) -> tuple[list[str], list[list[str]]]:
    """What blocks gain, one row a placement of the outlier channels."""
    compute, rows = parse_dtype(config.compute), []
    for placement in formats.PLACEMENTS:
        outliers = Outliers((100.0, 1e4), config.every, placement, config.tokens, config.channels,
                            config.rows, config.seeds)  # fmt: skip
        found = with_outliers(PAIRS, outliers, compute)
        gains = [formats.gain(found, pair, place, size) for pair, size, place in GAINS]
        rows.append([placement, *(f"{mean:+.2f} ± {half:.2f}" for mean, half in gains)])
    return ["placement", *(f"{pair} {size:g}x: {place}" for pair, size, place in GAINS)], rows


def main() -> bool:
    """Measures and writes the page; whether every bar is met."""
    config = dataclasses.replace(formats.Config(), size=(1.0, 10.0, 100.0, 1e4))
    found: tuple[Any, Any, Any] = formats.measure(config)
    missed = [bar for bar in formats.bars(*found) if bar.met is False]
    verdict = "All bars are met."
    if missed:
        verdict = "Missed: " + "; ".join(
            f"{bar.what}: {bar.measured}, where {bar.wanted} was asked" for bar in missed
        )
    about = (formats.__doc__ or "").split("\n\nRun:")[0]
    about += (
        f"\n\nHere {config.rows} rows, one channel in {config.every} and x and dy in"
        f" {config.compute} before they are quantised; blocks are 1x128 with float32 scales."
    )
    parts = [about, verdict, *(s.markdown() for s in formats.sections(*found, config))]
    parts.append(
        "## Where the outlier channels lie\n\n"
        "What a scale for each block of 128 gains on one for the tensor, in dB, mean and 95 %"
        " interval over seeds. The placement was fixed at `random` before anything was measured;"
        " the two others were tried afterwards and change no verdict above. A block of the output"
        " product holds two outlier channels at `even`, two on average at `random`, and at"
        " `together` one block in 16 holds them all. In the output, blocks cannot gain much more"
        " at `random`: seven in eight of them hold an outlier channel and scale for it, and with"
        " one scale for the tensor the ordinary channels are all but lost already (int8-tensor at"
        " 100x: 'x in output, ordinary'). e4m3 at 100x gains nothing on the ordinary channels, nor"
        " in wgrad; the 6 dB over all of x in the output are those of the outliers: most of the"
        " power lies in the largest number of each block, which its scale maps to 448 exactly."
    )
    parts.append(table(*placed(config)))
    write("recipes", "What recipes lose in their products", "\n\n".join(parts))
    return not missed


if __name__ == "__main__":
    sys.exit(not main())
