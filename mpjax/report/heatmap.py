"""What a monitor saw, as one picture: tensors by layers, a panel for each format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpjax.errors import ConfigError
from mpjax.report.canvas import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "weights": "weights",
    "activations": "activations",
    "gradients": "weight gradients",
    "activation_gradients": "activation gradients",
    "updates": "updates",
}
_INDEX = re.compile(r"(?:^|(?<=/)|(?<=_))\d+(?=/|:|$)")
_ONLY = "—"  # column of what stands in no layer
_LOST = ("#08519c", "#9ecae1", "#f7f7f7", "#fc9272", "#a50f15")
_STEPS = (1e-4, 1.0)  # a share below the first is white, the second is all


def _row_and_column(record: Mapping[str, Any]) -> tuple[tuple[str, str], int | None]:
    """The row of a record, and its layer: its own, or the number in its path."""
    name, layer = record["name"], record["layer"]
    if layer is None and (found := _INDEX.search(name)):
        layer = int(found[0])
        name = name[: found.start()] + "*" + name[found.end() :]
    elif layer is not None:
        name = re.sub(r"(^|/)layers/", r"\1layers/*/", name)
    return (record["kind"], name), layer


def lost_shares(
    records: Iterable[Mapping[str, Any]], formats: Sequence[str]
) -> tuple[list[tuple[str, str]], list[int | None], np.ndarray]:
    """Rows, columns and the signed share lost, (formats, rows, columns), NaN where nothing is."""
    found: dict[tuple[str, str], dict[int | None, list[float]]] = {}
    for record in records:
        if record["kind"] not in KINDS:
            continue
        missing = [f for f in formats if f"underflow/{f}" not in record]
        if missing:
            raise ConfigError(
                f"heatmap: {record['kind']} {record['name']} was not measured in"
                f" {' '.join(missing)}; name the format in monitor(..., formats=[...])"
            )
        row, layer = _row_and_column(record)
        lost = []
        for f in formats:
            under, over = record[f"underflow/{f}"], record[f"overflow/{f}"]
            lost.append(over if over >= under else -under)
        found.setdefault(row, {})[layer] = lost
    rows = [row for kind in KINDS for row in found if row[0] == kind]
    layers = {layer for by_layer in found.values() for layer in by_layer}
    columns: list[int | None] = [None] if None in layers else []
    columns += sorted(layer for layer in layers if layer is not None)
    values = np.full((len(formats), len(rows), len(columns)), np.nan)
    for i, row in enumerate(rows):
        for layer, lost in found[row].items():
            values[:, i, columns.index(layer)] = lost
    return rows, columns, values


def signed_log(share: np.ndarray) -> np.ndarray:
    """Shares between the steps to 0 .. 1 by their logarithm, with their sign."""
    low, high = np.log10(_STEPS)
    size = np.clip(np.abs(share), _STEPS[0], _STEPS[1])
    return np.sign(share) * (np.log10(size) - low) / (high - low)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.0095 else f"{100 * share:.1g}".lstrip("0")


def plot_heatmap(
    records: Iterable[Mapping[str, Any]],
    formats: Sequence[str] = ("e4m3", "e5m2", "fp16", "bf16"),
    title: str = "",
) -> Figure:
    """Returns how much of each tensor a format would lose, in every layer.

    Rows are tensors grouped by kind, columns layers, panels formats. Blue is the share of numbers
    that would become zero, red the share beyond the largest number; where a tensor has both, the
    larger is shown. The scale is logarithmic from 0.01 % (white) to all; cells of 1 % or more say
    how many percent.

    Args:
      records: `Monitored.rows()` of one step, or the lines of a `monitor.jsonl` for it.
      formats: as they were named to `monitor`; with ` scaled` behind a name for one scale a
        tensor.
      title: above all.

    Raises:
      ConfigError: nothing to draw, or a format that was not measured.
    """
    rows, columns, values = lost_shares(records, formats)
    if not rows:
        raise ConfigError("heatmap: no record of a tensor; pass Monitored.rows()")
    if len(columns) > 64:
        raise ConfigError(f"heatmap: {len(columns)} layers do not fit; select with where=")
    cell = 0.34
    width = cell * len(columns) * len(formats)
    longest = max(len(name) for _, name in rows)
    kinds = [kind for kind, _ in rows]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    # a group's heading takes a row of its own
    place = np.array([i + 1 + sum(start <= i for start in starts) - 1 for i in range(len(rows))])
    height = len(rows) + len(starts)
    from matplotlib.colors import LinearSegmentedColormap

    lost = LinearSegmentedColormap.from_list("lost", _LOST)
    figure = canvas(max(7.0, width + 0.085 * longest + 1.2), 0.2 * height + 1.9, dpi=130)
    axes = figure.subplots(1, len(formats), sharey=True, squeeze=False)[0]
    for panel, (ax, format) in enumerate(zip(axes, formats, strict=True)):
        grid = np.full((height, len(columns)), np.nan)
        grid[place] = signed_log(values[panel])
        ax.imshow(grid, cmap=lost, vmin=-1, vmax=1, aspect="auto", interpolation="none")
        ax.set_title(format, fontsize=10, fontweight="bold")
        ax.set_xticks(
            range(len(columns)),
            [_ONLY if c is None else str(c) for c in columns],
            fontsize=7 if len(columns) <= 24 else 5,
        )
        ax.set_xlabel("layer", fontsize=8)
        ax.set_yticks(place, [name for _, name in rows], fontsize=7)
        ax.tick_params(length=0)
        ax.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(height + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", lw=0.8)
        ax.tick_params(which="minor", length=0)
        ax.set_facecolor("#e4e4e4")
        ax.spines[:].set_visible(False)
        for start in starts:
            y = place[start] - 1
            ax.axhspan(y - 0.5, y + 0.5, color="white", zorder=2)
            if panel == 0:
                ax.text(
                    -0.5, y, KINDS[kinds[start]], fontsize=8, fontweight="bold", va="center",
                    ha="left", zorder=3,
                )  # fmt: skip
        if len(columns) <= 16:
            _write_shares(ax, place, values[panel])
    ticks = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    labels = ["100", "10", "1", "0.1", "≤ 0.01", "0.1", "1", "10", "100"]
    bar = figure.colorbar(
        axes[0].images[0], ax=list(axes), location="bottom", fraction=0.03, pad=0.01, aspect=50
    )
    bar.set_ticks(ticks, labels=labels, fontsize=8)
    bar.set_label(
        "← would become zero      share of the tensor's numbers (%)      beyond the largest →",
        fontsize=9,
    )
    bar.outline.set_visible(False)
    figure.suptitle(title or "What each format would lose (grey: no such tensor)", fontsize=11)
    return figure


def _write_shares(ax: Any, place: np.ndarray, shares: np.ndarray) -> None:
    """Percentages into the cells where they are at least 1."""
    for (i, j), share in np.ndenumerate(shares):
        if abs(share) >= 0.0095:
            colour = "white" if abs(share) >= 0.03 else "black"
            ax.text(j, place[i], _percent(abs(share)), fontsize=5.5, ha="center", va="center",
                    color=colour)  # fmt: skip
