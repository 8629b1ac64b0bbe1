"""What the runs of one arm of an experiment came to."""

from __future__ import annotations

from pathlib import Path

from mpjax.train.report.metrics_writer import read_metrics


def losses(folder: Path) -> dict[int, float]:
    """Seed -> validation loss of an arm, of the runs that came to their end."""
    found = {}
    for seed in folder.glob("seed*"):
        last = read_metrics(seed / "metrics.jsonl")[-1]
        if "validation_loss" in last:
            found[int(seed.name[4:])] = last["validation_loss"]
    return found
