"""Plots of number formats: what numbers there are, how rounding and scales treat them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float

from mpjax.errors import ConfigError
from mpjax.formats import Format, Quantized
from mpjax.report.canvas import COLOURS, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^v*Px<>hp"
_STYLES = ("-", "--", ":", "-.")


def positive_numbers(format: Format) -> np.ndarray:
    """Returns all numbers of a format above zero, ascending, float64.

    Args:
      format: of at most 12 bits, and not of powers of two.

    Raises:
      ConfigError: it is wider, or holds scales.

    Example:
      >>> positive_numbers(Format("e2m1")).tolist()
      [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if format.kind == "power":
        raise ConfigError(f"number line: {format.name} holds scales, not values; leave it out")
    if format.bits > 12:
        raise ConfigError(
            f"number line: {format.name} has {format.bits} bits, too many to draw; take formats of"
            " at most 12 bits"
        )
    if format.kind == "fixed":
        return np.arange(1, round(format.max / format.epsilon) + 1) * format.epsilon
    numbers = [format.min_subnormal]
    while numbers[-1] < format.max:
        exponent = math.floor(math.log2(max(numbers[-1], format.min_normal)))
        numbers.append(numbers[-1] + 2.0 ** (exponent - format.mantissa_bits))
    return np.array(numbers)


def plot_number_lines(formats: Sequence[str]) -> Figure:
    """Returns the positive numbers of formats: all on a log axis, those up to 8 on a linear one.

    Args:
      formats: names of formats of at most 12 bits.

    Raises:
      ConfigError: a format that is unknown, wider, or holds powers of two only.
    """
    found = [Format(name) for name in formats]
    lines = [positive_numbers(format) for format in found]
    figure = canvas(10, 1.6 + 0.75 * len(found))
    left, right = figure.subplots(1, 2, sharey=True)
    for row, (format, numbers) in enumerate(zip(found, lines, strict=True)):
        colour = COLOURS[row % 10]
        for ax, shown in ((left, numbers), (right, numbers[numbers <= 8])):
            ax.vlines(shown, row - 0.32, row + 0.32, color=colour, lw=0.9)
            low = shown[shown < format.min_normal] if format.kind == "float" else shown[:0]
            ax.vlines(low, row - 0.32, row + 0.32, color="black", lw=1.3)
    left.set_xscale("log", base=2)
    left.set_xlabel("positive numbers, log axis (black: subnormal)")
    right.set_xlim(-0.1, 8.2)
    right.set_xlabel("those up to 8, linear axis")
    names = [f"{f.name}\n{f.bits} bits, max {f.max:g}" for f in found]
    left.set_yticks(range(len(found)), names)
    left.invert_yaxis()
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, axis="x", alpha=0.25)
    return figure


def plot_rounding(
    x: Float[Array, " N"], rounded: Mapping[str, Any], grid: Sequence[float] = ()
) -> Figure:
    """Returns the staircase of each rounding over the numbers that were rounded.

    Args:
      x: numbers, ascending.
      rounded: label -> what they became: an array like x, or one with a leading axis of draws,
        of which all are dotted and the mean is drawn.
      grid: numbers of the format, drawn as lines.
    """
    figure = canvas(3.6 * len(rounded), 3.9)
    axes = figure.subplots(1, len(rounded), sharex=True, sharey=True, squeeze=False)[0]
    for number, (ax, (label, values)) in enumerate(zip(axes, rounded.items(), strict=True)):
        draws = np.atleast_2d(np.asarray(values, np.float64))
        colour = COLOURS[number]
        for value in grid:
            ax.axhline(value, color="grey", lw=0.6, alpha=0.4)
        ax.plot(x, x, color="black", lw=0.8, linestyle="--", label="x")
        if len(draws) > 1:
            for draw in draws:
                ax.plot(x, draw, ".", color=colour, ms=2, alpha=0.25)
            ax.plot(x, draws.mean(0), color=colour, lw=1.6, label=f"mean of {len(draws)} draws")
        else:
            ax.plot(x, draws[0], ".", color=colour, ms=3, label="rounded x")
        ax.set_title(label, fontsize=11)
        ax.set_xlabel("x")
        ax.legend(fontsize=8, loc="lower right")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("x rounded")
    return figure


def plot_errors(x: Float[Array, "rows columns"], quantized: Mapping[str, Quantized]) -> Figure:
    """Returns heatmaps: the magnitudes of a matrix, and the error of each quantisation of it.

    Args:
      x: the matrix.
      quantized: label -> what it became.
    """
    wide = np.asarray(x, np.float64)
    panels = {"|x|": np.abs(wide)}
    for label, q in quantized.items():
        error = np.abs(np.asarray(q.dequantize(np.float32), np.float64) - wide)
        noise = np.sum(np.square(error))
        ratio = 10 * np.log10(np.sum(np.square(wide)) / noise) if noise else math.inf
        panels[f"{label}\n{ratio:.1f} dB, {q.nbytes / 1024:.3g} KiB"] = error
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = canvas(3.6 * columns + 0.8, 2.9 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    top = max(float(panel.max()) for panel in panels.values())
    from matplotlib.colors import LogNorm

    norm = LogNorm(top * 1e-6, top, clip=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for number, (ax, (label, panel)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        image = ax.imshow(panel, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
        ax.set_title(label if number == 0 else f"|error|: {label}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("column")
    for ax in axes[:, 0]:
        ax.set_ylabel("row")
    figure.colorbar(image, ax=axes, label="magnitude", shrink=0.8)
    return figure


def plot_sqnr(
    panels: Mapping[str, Sequence[tuple[str, float, float]]],
    xlabel: str,
    base: int = 10,
    bar: float | None = None,
) -> Figure:
    """Returns SQNR curves, a panel for each key, a curve for each label.

    Args:
      panels: title -> (label, x, SQNR in dB); points of one label and x are averaged.
      xlabel: what x is.
      base: of the log axis of x.
      bar: a level to draw.
    """
    figure = canvas(3.7 * len(panels) + 1.8, 4.6)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(p[0] for points in panels.values() for p in points))
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        for number, label in enumerate(labels):
            found: dict[float, list[float]] = {}
            for name, x, ratio in points:
                if name == label:
                    found.setdefault(x, []).append(ratio)
            ax.plot(
                list(found), [float(np.mean(v)) for v in found.values()], label=label, ms=4, lw=1.3,
                color=COLOURS[number % 10], marker=_MARKERS[number % len(_MARKERS)],
                linestyle=_STYLES[number // 10 % 4] if number >= 10 else _STYLES[number % 2],
            )  # fmt: skip
        if bar is not None:
            ax.axhline(bar, color="black", lw=0.8)
        ax.set_xscale("log", base=base)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(xlabel)
        ax.grid(True, alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("SQNR (dB)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=9, frameon=False)
    return figure


def plot_distinct(counts: Sequence[tuple[str, str, int, int | None]]) -> Figure:
    """Returns how many scaled values operands hold, against how many their formats have.

    Args:
      counts: (recipe, operand, distinct values, 2^bits or None where it is not quantised).
    """
    recipes = list(dict.fromkeys(recipe for recipe, *_ in counts))
    operands = list(dict.fromkeys(operand for _, operand, *_ in counts))
    figure = canvas(8.5, 1.4 + 0.36 * len(recipes))
    ax = figure.subplots()
    labelled = set()
    for recipe, operand, count, limit in counts:
        place = operands.index(operand)
        y = recipes.index(recipe) + 0.22 * (place - (len(operands) - 1) / 2)
        ax.plot(
            count, y, marker=_MARKERS[place], color=COLOURS[place], ms=5, linestyle="none",
            label=None if operand in labelled else operand,
        )  # fmt: skip
        if limit is not None:
            ax.plot([limit, limit], [y - 0.12, y + 0.12], color="black", lw=1.8)
        labelled.add(operand)
    ax.set_xscale("log", base=2)
    ax.set_yticks(range(len(recipes)), recipes)
    ax.invert_yaxis()
    ax.set_xlabel("distinct values of an operand before its scales (black: 2^bits of its format)")
    ax.grid(True, axis="x", alpha=0.25)
    ax.legend(frameon=False, fontsize=9, ncols=len(operands), loc="lower left",
              bbox_to_anchor=(0, 1))  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    return figure
