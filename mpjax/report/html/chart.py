"""Charts as SVG that stands in a page: curves with bands, and intervals about zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from mpjax.report.curves import Curve

WIDTH, HEIGHT = 640.0, 280.0  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 10.0, 34.0
Numbers = Sequence[float] | np.ndarray
COLOURS = 8  # classes k0 ... of the style sheet


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Returns round numbers between two, about so many.

    Example:
      >>> ticks(0.0, 100.0, 5)
      [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999), default=10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


class Axes:
    """The frame of a chart: from numbers to places, with a grid and ticks.

    Args:
      x: least and greatest.
      y: least and greatest.
      binary: the y-axis is of powers of two, which its numbers are the exponents of.
      xlabel: what x is.
      ylabel: what y is.
    """

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], xlabel: str, ylabel: str,
        binary: bool = False,
    ) -> None:  # fmt: skip
        self.x, self.y = _open(*x, 0.0), _open(*y, 0.05)
        self.xlabel, self.ylabel, self.binary = xlabel, ylabel, binary

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Returns the place of a point."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        up = (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    def grid(self) -> str:
        """Returns the grid with its numbers."""
        parts = []
        for value in ticks(*self.y):
            if self.binary and value != round(value):
                continue
            _, y = self.at(self.x[0], value)
            parts.append(f'<path class="grid{" zero" * (value == 0 and not self.binary)}"'
                         f' d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>')  # fmt: skip
            text = f'2<tspan class="power" dy="-.35em">{value:g}</tspan>' if self.binary else (
                _short(value)
            )  # fmt: skip
            parts.append(f'<text class="end" x="{LEFT - 5:g}" y="{y:.1f}" dy=".32em">{text}</text>')
        for value in ticks(*self.x):
            x, _ = self.at(value, self.y[0])
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP:g}V{HEIGHT - BOTTOM:g}"/>')
            parts.append(f'<text class="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 5:g}"'
                         f' dy=".8em">{_short(value)}</text>')  # fmt: skip
        return "".join(parts)

    def line(self, xs: Numbers, ys: Numbers) -> str:
        """Returns the data of a path; a number that is not finite is a hole."""
        parts, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                px, py = self.at(x, y)
                parts.append(f"{pen}{px:.1f} {py:.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(parts)

    def band(self, curve: Curve) -> str:
        """Returns the data of the area between the least and the greatest seed."""
        fine = np.isfinite(curve.steps) & np.isfinite(curve.low) & np.isfinite(curve.high)
        areas, edges = [], np.flatnonzero(np.diff(np.r_[0, fine, 0]))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            part = slice(start, stop)
            there = self.line(curve.steps[part], curve.high[part])
            back = self.line(curve.steps[part][::-1], curve.low[part][::-1])
            areas.append(f"{there}L{back[1:]}Z")
        return "".join(areas)

    def frame(self, name: str, body: str) -> str:
        """Returns the whole drawing; `data-chart` names the data that the page's script reads."""
        data = " ".join(f"{v:.10g}" for v in (*self.x, LEFT / WIDTH, 1 - RIGHT / WIDTH))
        return (
            f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(self.ylabel)}'
            f' by {escape(self.xlabel)}" data-chart="{escape(name)}" data-x="{data}">'
            f'{self.grid()}{body}<path class="cursor" d="M0 {TOP:g}V{HEIGHT - BOTTOM:g}"/></svg>'
        )


def _open(low: float, high: float, margin: float) -> tuple[float, float]:
    """An interval of some width."""
    if not high > low:
        low, high = low - (abs(low) * 0.01 or 0.5), high + (abs(high) * 0.01 or 0.5)
    room = (high - low) * margin
    return low - room, high + room


def _short(value: float) -> str:
    """A tick's number."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit or (unit == 1e6 and abs(value) >= unit):
            return f"{value / unit:g}{name}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def style(number: int) -> str:
    """Returns the classes of a curve: colours first, dashes beyond them."""
    return f"k{number % COLOURS} d{number // COLOURS % 3}"


def limits(arrays: Sequence[np.ndarray], trim: float = 0.0) -> tuple[float, float]:
    """Returns the least and greatest finite number; a share at the upper end may be cut off."""
    flat = np.concatenate([np.ravel(one) for one in arrays])
    flat = flat[np.isfinite(flat)]
    if not flat.size:
        return 0.0, 1.0
    return float(flat.min()), float(np.quantile(flat, 1 - trim))


def curves_chart(
    name: str, curves: Sequence[tuple[int, Curve]], ylabel: str,
    points: Sequence[tuple[int, Numbers, Numbers]] = (), zero: bool = False,
) -> str:  # fmt: skip
    """Returns curves with their bands.

    Args:
      name: of the data.
      curves: (number of the arm, its curve).
      ylabel: what they are.
      points: (number of the arm, steps, values) of dots.
      zero: whether zero is in the picture.
    """
    xs = [curve.steps for _, curve in curves] + [np.asarray(steps) for _, steps, _ in points]
    ys = [a for _, curve in curves for a in (curve.mean, curve.low, curve.high)]
    ys += [np.array(values) for _, _, values in points] + [np.zeros(1)] * zero
    axes = Axes(limits(xs), limits(ys), "step", ylabel)
    # What shoots up by a hundred times the rest would leave a flat line of the rest.
    if (low := axes.y[0]) and axes.y[1] - low > 20 * ((cut := limits(ys, 0.02))[1] - cut[0]) > 0:
        axes.y = _open(*cut, 0.05)
    body: list[str] = []
    for number, curve in curves:
        band = f'<path class="band" d="{axes.band(curve)}"/>' if curve.seeds > 1 else ""
        path = axes.line(curve.steps, curve.mean)
        wide = 1.8 + 2.4 * (len(curves) - 1 - len(body)) / len(curves)  # equal curves all show
        line = f'<path class="line" d="{path}" stroke-width="{wide:.1f}"/>'
        body.append(f'<g class="{style(number)}" data-arm="{number}">{band}{line}</g>')
    for number, steps, values in points:
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
            for x, y in (axes.at(*p) for p in zip(steps, values, strict=True) if np.isfinite(p[1]))
        )
        body.append(f'<g class="{style(number)}" data-arm="{number}">{dots}</g>')
    clip = (
        f'<clipPath id="clip-{escape(name)}"><rect x="{LEFT - 4:g}" y="{TOP - 4:g}"'
        f' width="{WIDTH - LEFT - RIGHT + 8:g}" height="{HEIGHT - TOP - BOTTOM + 4:g}"/></clipPath>'
    )
    return axes.frame(name, f'{clip}<g clip-path="url(#clip-{escape(name)})">{"".join(body)}</g>')


def paths_chart(
    name: str, paths: Sequence[tuple[int, Sequence[tuple[int, float, bool]]]], xlabel: str = "step"
) -> str:
    """Returns the stairs of loss scales, with a cross where a step was skipped.

    Args:
      name: of the data.
      paths: (number of the seed, of `scale_path`).
      xlabel: what x is.
    """
    exponents = [
        [math.log2(scale) if scale > 0 else math.nan for _, scale, _ in p] for _, p in paths
    ]
    xs = [np.array([step for step, *_ in path], np.float64) for _, path in paths]
    axes = Axes(limits(xs), limits([np.array(e) for e in exponents]), xlabel, "loss scale", True)
    body = []
    for (number, path), x, y in zip(paths, xs, exponents, strict=True):
        stairs_x, stairs_y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
        crosses = "".join(
            f"M{px - 3:.1f} {py - 3:.1f}l6 6m0 -6l-6 6"
            for (step, _, skipped), e in zip(path, y, strict=True) if skipped and math.isfinite(e)
            for px, py in [axes.at(step, e)]
        )  # fmt: skip
        body.append(
            f'<g class="{style(number)}"><path class="line" d="{axes.line(stairs_x, stairs_y)}"/>'
            f'<path class="cross" d="{crosses}"/></g>'
        )
    return axes.frame(name, "".join(body))


def intervals_chart(rows: Sequence[tuple[int, str, str, float, float, Sequence[float]]]) -> str:
    """Returns a row an arm: its mean, the interval about it, and each seed as a small ring.

    Args:
      rows: (number of the arm, its label, that of its reference, mean, half-width or NaN, values
        of the seeds).
    """
    ends = [x for *_, m, h, vs in rows for x in (m, m - h, m + h, *vs)]
    x0, x1 = _open(*limits([np.array([*ends, 0.0])]), 0.06)
    width, height = 400.0, 26.0

    def at(x: float) -> float:
        return (x - x0) / (x1 - x0) * width

    grid = "".join(
        f'<path class="grid{" zero" * (value == 0)}" d="M{at(value):.1f} 0V{height:g}"/>'
        for value in ticks(x0, x1)
    )
    numbers = "".join(
        f'<text class="middle" x="{at(value):.1f}" y="4" dy=".8em">{_short(value)}</text>'
        for value in ticks(x0, x1)
        if 10 < at(value) < width - 10
    )
    parts = []
    for number, label, reference, mean, half, values in rows:
        said = f"{mean:+.2f}" + (f" ± {half:.2f} %" if math.isfinite(half) else " %")
        said = said.replace("-", "−")
        marks, y = [], height / 2
        if math.isfinite(half):
            line = f"M{at(mean - half):.1f} {y:g}H{at(mean + half):.1f}"
            marks.append(f'<path class="whisker" d="{line}"/>')
        rings = (value for value in values if math.isfinite(value))
        marks += [f'<circle class="ring" cx="{at(v):.1f}" cy="{y:g}" r="2.5"/>' for v in rings]
        marks.append(f'<circle cx="{at(mean):.1f}" cy="{y:g}" r="4"/>')
        parts.append(
            f"<dt>{escape(label)} <span>against {escape(reference)}</span> <b>{said}</b></dt>"
            f'<dd><svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">{grid}'
            f'<g class="{style(number)}">{"".join(marks)}</g></svg></dd>'
        )
    axis = f'<svg viewBox="0 0 {width:g} 18" aria-hidden="true">{numbers}</svg>'
    return f"<dl class=intervals>{''.join(parts)}<dt class=axis></dt><dd>{axis}</dd></dl>"
