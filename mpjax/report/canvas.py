"""An empty figure; matplotlib is imported at the first one, so that command lines start sooner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpjax.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = tuple(f"C{number}" for number in range(10))  # matplotlib's own order


def canvas(width: float, height: float, dpi: int = 120) -> Figure:
    """Returns an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=dpi)


def save_plot(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    write_file(path, lambda file: figure.savefig(file, format="png"))
