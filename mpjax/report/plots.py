"""Plots of a comparison: loss curves, loss-scale paths, gradient magnitudes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpjax.formats import Format
from mpjax.report.canvas import COLOURS, canvas
from mpjax.report.curves import fitting, gap_curve, loss_curve
from mpjax.report.results import Outcome, check_outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = ("-", "--", ":", "-.")


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Sequence[Any]]:
    figure = canvas(width, height)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        ax.grid(True, alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def plot_loss(outcomes: Sequence[Outcome], window: int = 20, unit: str = "nats/token") -> Figure:
    """Returns the training-loss curves: mean over seeds, and below it the gap to the reference.

    The band of a curve reaches from the least to the greatest seed; a gap's seeds are paired.

    Args:
      outcomes: arms; those that share a reference share a line style. Without one that is compared
        with another there are no gaps and no panel of them.
      window: steps of the running mean, at most half of the shortest run; each mean stands at the
        middle of its steps.
      unit: of the loss.
    """
    by_label = check_outcomes(outcomes)
    compared = [o for o in outcomes if o.reference != o.label]
    window = fitting(outcomes, window)
    figure, axes = _figure(9, 7 if compared else 4, panels=2 if compared else 1)
    references = list(dict.fromkeys(o.reference for o in outcomes))
    for number, o in enumerate(outcomes):
        style = dict(
            color=COLOURS[number % 10],
            linestyle=_STYLES[references.index(o.reference) % 4],
            lw=1.4 + 2.4 * (len(outcomes) - 1 - number) / len(outcomes),  # equal curves all show
        )
        curves = [loss_curve(o, window)]
        if o.reference != o.label:
            curves.append(gap_curve(o, by_label[o.reference], window))
        for ax, curve in zip(axes, curves, strict=False):
            ax.plot(curve.steps, curve.mean, label=o.label, **style)
            if curve.seeds > 1:
                band = dict(color=COLOURS[number % 10], alpha=0.15, lw=0)
                ax.fill_between(curve.steps, curve.low, curve.high, **band)
    axes[0].set_ylabel(f"training loss ({unit},\nmean of {window} steps and of seeds)")
    axes[0].legend(ncols=2, fontsize=9, frameon=False)
    if compared:
        _gap_axis(axes[1])
    axes[-1].set_xlabel("step")
    return figure


def _gap_axis(ax: Any) -> None:
    """An axis of percentages, linear about zero."""
    from matplotlib.ticker import SymmetricalLogLocator

    ax.axhline(0, color="black", lw=0.8)
    ax.set_yscale("symlog", linthresh=0.5)
    low, high = ax.get_ylim()
    ax.set_ylim(min(-0.6, low), max(0.6, high))
    ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=0.5, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("gap to its reference (%)\n(linear within ±0.5)")


def plot_loss_scale(outcomes: Sequence[Outcome]) -> Figure:
    """Returns the path of the dynamic loss scales, with skipped steps marked."""
    scaled = [o for o in outcomes if len({r["loss_scale"] for run in o.records for r in run}) > 1]
    figure, axes = _figure(9, 2.2 + 1.6 * max(1, len(scaled)), panels=max(1, len(scaled)))
    for ax, o in zip(axes, scaled, strict=False):
        for seed, run in enumerate(o.records):
            steps = np.array([r["step"] for r in run])
            scale = np.array([r["loss_scale"] for r in run])
            skips = np.diff([0, *(r["skipped"] for r in run)]) > 0
            colour = COLOURS[seed % 10]
            ax.step(
                steps, scale, where="post", color=colour, lw=1.3, alpha=0.8, label=f"seed {seed}"
            )
            ax.plot(steps[skips], scale[skips], "x", color=colour, ms=7, mew=1.8)
        ax.set_yscale("log", base=2)
        ax.set_ylabel("loss scale")
        ax.set_title(f"{o.label} (× skipped step)", fontsize=10, loc="left")
    if scaled:
        axes[0].legend(
            fontsize=9,
            frameon=False,
            ncols=len(scaled[0].records),
            loc="lower right",
            bbox_to_anchor=(1, 1),
        )
    else:
        axes[0].text(0.5, 0.5, "no arm with a dynamic loss scale", ha="center", va="center")
    axes[-1].set_xlabel("step")
    return figure


def plot_sent(outcomes: Sequence[Outcome], sent: Mapping[str, float]) -> Figure:
    """Returns the validation loss of arms over what a replica sends in a step.

    Args:
      outcomes: arms; a bar reaches from the least to the greatest seed.
      sent: label -> bytes.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    check_outcomes(outcomes)
    figure, (ax,) = _figure(9, 5)
    for number, o in enumerate(outcomes):
        losses = np.array(o.validation_loss)
        losses = losses[np.isfinite(losses)]
        if not losses.size:
            continue
        mean = losses.mean()
        around = [[mean - losses.min()], [losses.max() - mean]]
        ax.errorbar(
            sent[o.label], mean, around, fmt="o", color=COLOURS[number % 10], capsize=3, ms=6,
            label=o.label,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("sent by a replica in a step")
    ax.set_ylabel("validation loss (nats/token)")
    ax.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_gradients(
    gradients: Mapping[str, np.ndarray],
    formats: Sequence[str] = ("float16", "bfloat16", "e5m2", "e4m3"),
) -> Figure:
    """Returns histograms of gradient magnitudes over the range of each format.

    Args:
      gradients: label -> values, any shape.
      formats: names of Formats; a bar shows each one's normal and subnormal range.
    """
    figure = canvas(9, 6.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 0.35 + 0.3 * len(formats)))
    logs, zeros = {}, {}
    for label, values in gradients.items():
        flat = np.abs(np.asarray(values, np.float64)).ravel()
        zeros[label] = float(np.mean(flat == 0))
        logs[label] = np.log2(flat[flat > 0])
    low = math.floor(min([-32.0, *(x.min() for x in logs.values() if x.size)])) - 1
    high = 18
    bins = np.arange(low, high + 1)
    for number, (label, x) in enumerate(logs.items()):
        weights = np.full(x.shape, 100 * (1 - zeros[label]) / max(1, x.size))
        name = f"{label} ({100 * zeros[label]:.1f} % exact zeros)"
        top.hist(
            x, bins, weights=weights, histtype="stepfilled", alpha=0.45,
            color=COLOURS[number], label=name,
        )  # fmt: skip
    top.set_ylabel("share of gradient entries (%)")
    top.legend(fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    for row, name in enumerate(formats):
        f, colour = Format(name), COLOURS[4 + row]
        edges = [math.log2(edge) for edge in (f.min_subnormal, f.min_normal, f.max)]
        a, b, c = (min(max(edge, low), high) for edge in edges)
        bottom.barh(row, c - b, left=b, height=0.55, color=colour, alpha=0.75)
        bottom.barh(row, b - a, left=a, height=0.55, color=colour, alpha=0.3)
        for edge in edges[::2]:
            if low < edge < high:
                top.axvline(edge, color=colour, lw=1.2, linestyle="--")
        text = f"2^{edges[0]:.0f} (subnormal), 2^{edges[1]:.0f} (normal) .. {f.max:.3g}"
        bottom.text(low + 0.3, row + 0.42, text, fontsize=8, va="center")
    bottom.set_yticks(range(len(formats)), formats)
    bottom.set_ylim(-0.5, len(formats) - 0.25)
    bottom.set_xlim(low, high)
    bottom.set_xlabel(
        "log2 |gradient|   (bars: pale = subnormal; dashed: least and greatest number)"
    )
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    top.grid(True, alpha=0.25)
    return figure
