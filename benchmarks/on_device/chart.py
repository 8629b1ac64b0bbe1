"""The bar chart of a run, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(cells: dict[str, Any], path: Path) -> bool:
    """Draws tokens/s of all train steps, ours and others'; returns whether there is a chart."""
    rates = {
        name.removeprefix("train "): found["tokens_per_s"]
        for name, found in cells.items()
        if name.startswith("train ")
    }
    for name in ("torch, compiled and eager", "torch alone", "hand-written JAX"):
        for step, rate in cells.get(name, {}).get("tokens_per_s", {}).items():
            if step != "ours":
                rates.setdefault(step, rate)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rates:
        return False
    figure = Figure(figsize=(8, 0.4 * len(rates) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(rates)[::-1]
    middle = [rates[name]["median"] for name in names]
    ends = [
        [rates[name]["median"] - rates[name]["q1"] for name in names],
        [rates[name]["q3"] - rates[name]["median"] for name in names],
    ]
    others = [name.startswith(("torch", "careful")) for name in names]
    colours = ["#999999" if other else "#3566a5" for other in others]
    axes.barh(names, middle, xerr=ends, color=colours)
    axes.set_xlabel("tokens/s (median, quartiles)")
    figure.savefig(path, dpi=120)
    return True
