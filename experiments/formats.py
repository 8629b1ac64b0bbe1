"""What does each recipe lose in a product? Against dot length, and with outlier channels.

Normal data: x ~ N(0, 1), W ~ N(0, 2^-12), dy ~ N(0, 2^-24); the unscaled recipes notice the small
gradients, the others do not. Output, dgrad and wgrad each against float64 numpy, each at its own
dot length; the free axes have `rows` entries. A shorter dot product is the longest with the rest
of its operands set to zero, which changes no scale and no sum, and one compilation serves all.

Outlier channels: one in `every` channels of x is multiplied. Channels are what the output sums
over, so a block of 128 holds ordinary channels and outliers together; wgrad sums over tokens, and
there each block lies in one channel. "Ordinary" means: only the channels that were not multiplied,
of x as it enters the product, and of dW, which has a row for each channel.

Run:       python experiments/formats.py
Expected:  8-bit recipes above 20 dB in all three products at every length, operands of at most
           2^bits distinct values; with outliers of 100x an int8 scale for each block gains 17 to 20
           dB on one for the tensor in wgrad and 9 to 10 dB, just under the bar of 10, in the
           output; e4m3 gains next to nothing on the ordinary channels at 100x and at least 3 dB
           at 10^4x.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import launch  # sets XLA flags before JAX starts
from common.product_error import (
    PRODUCTS,
    Outliers,
    against_length,
    distinct,
    find,
    hadamard_error,
    with_outliers,
)
from common.tables import terminal
from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.formats import Format
from mpjax.markdown import table
from mpjax.precision import parse_dtype, recipe_names
from mpjax.report import interval, plot_distinct, plot_sqnr, save_plot
from mpjax.typing import Settings

Records = Sequence[Settings]  # what `common.product_error` measures
PLACEMENTS = ("random", "even", "together")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what each recipe loses in its three products."""

    recipe: tuple[str, ...] = (*recipe_names(), "emulate(e4m3)", "fixed-q8.8", "not-quantised")
    """Recipes that are measured against dot length."""
    shortest: int = 4
    """log2 of the shortest dot product."""
    longest: int = 14
    """log2 of the longest."""
    rows: int = 64
    """Entries of each free axis of a product."""
    pair: tuple[str, ...] = (
        "int8-tensor", "int8-block", "e4m3-tensor", "e4m3-block", "fp8-row", "fp8-block", "mxfp8",
        "mxfp4", "nvfp4", "int8",
    )  # fmt: skip
    """Recipes that are measured with outlier channels."""
    size: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4)
    """What the outlier channels are multiplied by."""
    every: int = 64
    """One in so many channels is an outlier channel."""
    placement: str = "random"
    """Which ones: `random`, `even` (equal distances) or `together` (one run of channels)."""
    channels: int = 2048
    """Channels of x with outliers."""
    tokens: int = 512
    """Tokens of x with outliers."""
    seeds: int = 5
    """Draws of data and outlier channels."""
    compute: str = "bf16"
    """Dtype of x and dy before they are quantised, and of operands that are not."""
    out: Path = Path("runs/formats")
    """Folder of the report."""


def gain(records: Records, pair: str, place: str, size: float) -> tuple[float, float]:
    """Mean and half-width of what `PAIR-block` gains on `PAIR-tensor`, in dB, seeds paired."""
    by_seed = {(r["recipe"], r["seed"]): r["sqnr"] for r in records
               if r["place"] == place and r["size"] == size}  # fmt: skip
    seeds = sorted({seed for _, seed in by_seed})
    return interval([by_seed[f"{pair}-block", s] - by_seed[f"{pair}-tensor", s] for s in seeds])


def eight_bit(name: str) -> bool:
    """Whether a recipe quantises, with scales, to 8 bits and nothing less or more."""
    found = find(name).operands
    scaled = all(o.scaling != "none" for o in found)
    return bool(found) and scaled and {Format(o.format).bits for o in found} == {8}


@dataclasses.dataclass(frozen=True)
class Bar:
    """What was asked for and what was measured; `met` is None where nothing is asked."""

    what: str
    wanted: str
    measured: str
    met: bool | None

    def cells(self) -> tuple[str, ...]:
        """Its row of a table."""
        verdict = {True: "met", False: "MISSED", None: "–"}[self.met]
        return self.what, self.wanted, self.measured, verdict


def bars(lengths: Records, counts: Records, outliers: Records) -> list[Bar]:
    """The bars, from what was measured."""
    found = []
    for product in PRODUCTS:
        mine = [r for r in lengths if eight_bit(r["recipe"]) and r["product"] == product]
        if mine:
            worst = min(mine, key=lambda r: r["sqnr"])
            text = f"{worst['sqnr']:.1f} dB ({worst['recipe']}, length {worst['length']})"
            what = f"8-bit recipes, normal data, {product}: the least"
            found.append(Bar(what, "> 20 dB", text, worst["sqnr"] > 20))
    limited = [r for r in counts if r["limit"]]
    if limited:
        most = max(limited, key=lambda r: r["count"] / r["limit"])
        text = f"{most['count']} of {most['limit']} ({most['recipe']}, {most['operand']})"
        found.append(Bar("distinct scaled values of a quantised operand", "at most 2^bits", text,
                         all(r["count"] <= r["limit"] for r in limited)))  # fmt: skip
    sizes, names = {r["size"] for r in outliers}, {r["recipe"] for r in outliers}
    wide = ("x in output", "output", "x in wgrad", "wgrad")
    narrow = ("x in output, ordinary", "x in wgrad, ordinary", "wgrad, ordinary")
    asked: list[tuple[str, float, tuple[str, ...], float | None]] = [
        ("int8", 100.0, wide, 10.0),
        ("e4m3", 1e4, narrow, 3.0),
        ("e4m3", 100.0, (*wide, *narrow), None),
    ]
    for pair, size, places, least in asked:
        if size not in sizes or not {f"{pair}-block", f"{pair}-tensor"} <= names:
            continue
        for place in places:
            mean, half = gain(outliers, pair, place, size)
            what = f"{pair}, block against tensor at {size:g}x: {place}"
            wanted = "published" if least is None else f">= {least:g} dB"
            met = None if least is None else mean >= least
            found.append(Bar(what, wanted, f"{mean:+.2f} ± {half:.2f} dB", met))
    for tokens in (4096, 1000):
        error = hadamard_error(tokens)
        what = f"Hadamard transform of both operands of wgrad, {tokens} tokens, relative change"
        found.append(Bar(what, "<= 1e-5", f"{error:.1e}", error <= 1e-5))
    control = hadamard_error(4096, same=False)
    found.append(Bar("control: different signs on the two", "far from 0", f"{control:.2f}", None))
    return found


@dataclasses.dataclass(frozen=True)
class Section:
    """A table of the report with what it says."""

    title: str
    text: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Returns it in Markdown."""
        parts = [f"## {self.title}", self.text, table(self.head, self.rows)]
        return "\n\n".join(filter(None, parts))


def sections(lengths: Records, counts: Records, outliers: Records, config: Config) -> list[Section]:
    """All tables of the report."""
    names = list(dict.fromkeys(r["recipe"] for r in lengths))
    ends = (2**config.shortest, 2**config.longest)
    by = {(r["recipe"], r["product"], r["length"]): r for r in lengths}
    normal = [
        (name, *(f"{by[name, p, n]['sqnr']:.1f}" for p in PRODUCTS for n in ends),
         *(f"{by[name, p, ends[1]]['max_error']:.1e}" for p in PRODUCTS))
        for name in names
    ]  # fmt: skip
    places = list(dict.fromkeys(r["place"] for r in outliers))
    mean: dict[tuple[str, float, str], list[float]] = {}
    for r in outliers:
        mean.setdefault((r["recipe"], r["size"], r["place"]), []).append(r["sqnr"])
    spread = [
        (name, f"{size:g}", *(f"{np.mean(mean[name, size, place]):.1f}" for place in places))
        for name in config.pair
        for size in config.size
    ]
    held = [
        (name, *(f"{r['count']} / {r['limit'] or '–'}" for r in counts if r["recipe"] == name))
        for name in names
    ]
    head = ("recipe", *(f"{p} at {n}, dB" for p in PRODUCTS for n in ends),
            *(f"{p}: max error" for p in PRODUCTS))  # fmt: skip
    return [
        Section("Bars", "± is the 95 % interval of the mean over seeds (Student's t).",
                ("what", "bar", "measured", ""),
                [bar.cells() for bar in bars(lengths, counts, outliers)]),
        Section("Normal data", "SQNR against float64 at the shortest and the longest dot product;"
                f" the largest error at {ends[1]}, over the root mean square of the product.",
                head, normal),
        Section("Outlier channels", f"One in {config.every} channels of x multiplied, placed"
                f" {config.placement}; SQNR in dB, mean of {config.seeds} seeds, {config.tokens}"
                f" tokens of {config.channels} channels. 'x in output' is x as that product takes"
                " it; 'ordinary' leaves the multiplied channels out.",
                ("recipe", "times", *places), spread),
        Section("Distinct scaled values", "How many different numbers an operand holds before its"
                " scales are applied, and how many its format has; – where it is not quantised.",
                ("recipe", "x", "W", "dy (dgrad)", "W (dgrad)", "x (wgrad)", "dy (wgrad)"), held),
    ]  # fmt: skip


def check(config: Config) -> None:
    """Refuses settings that cannot be measured.

    Raises:
      ConfigError: one is out of range or unknown.
    """
    launch.positive(config, "shortest", "longest", "rows", "size", "every", "channels", "tokens",
                    "seeds")  # fmt: skip
    if not config.recipe or not config.pair or not config.size:
        raise ConfigError("recipe, pair, size: one is empty; give at least one, or leave it out")
    if not config.shortest <= config.longest <= 24:
        raise ConfigError(f"longest: {config.longest} is not in {config.shortest} .. 24")
    if config.rows >= 2**config.longest:
        raise ConfigError(f"rows: {config.rows} is not below 2^longest; give fewer")
    if config.every > config.channels:
        raise ConfigError(f"every: {config.every} of {config.channels} channels; give fewer")
    if config.placement not in PLACEMENTS:
        raise ConfigError(f"placement: unknown {config.placement!r}; known: {' '.join(PLACEMENTS)}")
    for name in (*config.recipe, *config.pair):
        find(name)
    parse_dtype(config.compute, "compute")


def measure(config: Config) -> tuple[Records, Records, Records]:
    """Returns the records against length, the distinct values and the records with outliers."""
    compute = parse_dtype(config.compute)
    lengths = [2**power for power in range(config.shortest, config.longest + 1)]
    outliers = Outliers(config.size, config.every, config.placement, config.tokens,
                        config.channels, config.rows, config.seeds)  # fmt: skip
    return (
        against_length(config.recipe, lengths, config.rows, compute),
        distinct(config.recipe, config.rows * 2**config.longest, compute),
        with_outliers(config.pair, outliers, compute),
    )


def draw(lengths: Records, counts: Records, outliers: Records, out: Path) -> list[str]:
    """Writes the pictures and returns their names."""
    by_length = {product: [(r["recipe"], r["length"], r["sqnr"]) for r in lengths
                           if r["product"] == product] for product in PRODUCTS}  # fmt: skip
    places = ("output", "x in output, ordinary", "wgrad, ordinary")
    by_size = {place: [(r["recipe"], r["size"], r["sqnr"]) for r in outliers
                       if r["place"] == place] for place in places}  # fmt: skip
    pictures = {
        "sqnr_length.png": plot_sqnr(by_length, "dot length", base=2, bar=20.0),
        "sqnr_outliers.png": plot_sqnr(by_size, "factor of the outlier channels", base=10),
        "distinct.png": plot_distinct(
            [(r["recipe"], r["operand"], r["count"], r["limit"]) for r in counts]
        ),
    }
    for name, figure in pictures.items():
        save_plot(figure, out / name)
    return list(pictures)


def main(config: Config) -> None:
    """Measures, prints the tables and writes the report."""
    check(config)
    launch.writable(config.out)
    start = time.perf_counter()
    found = measure(config)
    tables = sections(*found, config)
    console = launch.wide()
    for section in tables:
        console.print(terminal(section.title, section.head, section.rows))
    names = draw(*found, config.out)
    lengths, counts, outliers = found
    results = {"lengths": lengths, "distinct": counts, "outliers": outliers}
    write_text(config.out / "results.json", json.dumps(results))
    note = (f"Compute dtype {config.compute}. Took {time.perf_counter() - start:.0f} s on"
            f" {launch.machine()}.")  # fmt: skip
    parts = ["# What each recipe loses in a product", *(s.markdown() for s in tables), note]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in names]
    path = config.out / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    console.print(f"{note}\nreport: {path}")


if __name__ == "__main__":
    launch.command(main, Config)
