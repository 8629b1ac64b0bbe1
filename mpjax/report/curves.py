"""Curves of runs: plain means over a fixed window of records, with the range of the seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.report.results import Outcome


@dataclasses.dataclass(frozen=True)
class Curve:
    """One curve with its band.

    Args:
      label: of the arm.
      steps: at which it has points, (N,).
      mean: over the seeds, (N,); NaN where a window holds no finite number.
      low: least of the seeds, (N,).
      high: greatest of the seeds, (N,).
      seeds: how many.
    """

    label: str
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int

    def thinned(self, stride: int) -> Curve:
        """Returns every n-th point, counted from the last."""
        chosen = slice((len(self.steps) - 1) % stride, None, stride)
        arrays = {k: getattr(self, k)[chosen] for k in ("steps", "mean", "low", "high")}
        return dataclasses.replace(self, **arrays)


def by_step(outcome: Outcome, name: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which a seed has a number, and the numbers.

    Returns:
      (steps,) ascending and (seeds, steps); NaN where a seed has none.
    """
    # Backwards, so that the first record of a step counts: a run that stopped is filled up with
    # copies of its last one.
    found = [{r["step"]: r[name] for r in reversed(run) if name in r} for run in outcome.records]
    steps = sorted(set().union(*found))
    values = [[one.get(step, np.nan) for step in steps] for one in found]
    return np.array(steps, np.float64), np.array(values, np.float64).reshape(len(found), -1)


def fitting(outcomes: Sequence[Outcome], window: int) -> int:
    """Returns a window that is at most half of the shortest run's records.

    Raises:
      ConfigError: a window below 1.
    """
    if not is_whole(window, 1):
        raise ConfigError(f"window: {brief(window)} records make no mean; give at least 1")
    lengths = (sum("loss" in r for r in run) for o in outcomes for run in o.records)
    return max(1, min([window, *(length // 2 for length in lengths)]))


def loss_curve(outcome: Outcome, window: int) -> Curve:
    """Returns the training loss of an arm; steps that a seed lacks are left out."""
    steps, values = by_step(outcome)
    at, means = _running(steps, _shared(values), window)
    return _curve(outcome.label, at, means.mean(0), means)


def gap_curve(outcome: Outcome, reference: Outcome, window: int) -> Curve:
    """Returns how far an arm's loss is above its reference's, in percent.

    Both are means over the same steps and the same seeds, and so are those of each pair of seeds
    that the band spans.
    """
    steps, own = by_step(outcome)
    other_steps, other = by_step(reference)
    steps, first, second = np.intersect1d(steps, other_steps, return_indices=True)
    seeds = min(len(own), len(other))
    pair = _shared(np.stack([own[:seeds, first], other[:seeds, second]]))
    at, means = _running(steps, pair, window)
    own, other = means
    with np.errstate(divide="ignore", invalid="ignore"):  # a loss of exactly zero has no gap
        mean, each = (100 * (a / b - 1) for a, b in ((own.mean(0), other.mean(0)), (own, other)))
    return _curve(outcome.label, at, mean, each)


def _curve(label: str, steps: np.ndarray, mean: np.ndarray, each: np.ndarray) -> Curve:
    return Curve(label, steps, mean, each.min(0), each.max(0), len(each))


def _shared(values: np.ndarray) -> np.ndarray:
    """Values at the steps where all rows are finite, NaN at the others."""
    fine = np.isfinite(values).all(tuple(range(values.ndim - 1)))
    return np.where(fine, values, np.nan)


def _sums(values: np.ndarray, window: int) -> np.ndarray:
    """Sums over each window of consecutive records; only whole windows."""
    total = np.cumsum(np.insert(values, 0, 0.0, axis=-1), axis=-1)
    return total[..., window:] - total[..., :-window]


def _running(steps: np.ndarray, values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Running means, each at the mean of its steps: a straight line stays where it is.

    Args:
      steps: (N,).
      values: (..., N), finite at the same steps in all rows; the others are left out.
      window: records of a mean. A mean over fewer at an end would bend the curve there.

    Returns:
      (steps, means); both NaN where a window holds no finite number.
    """
    window = max(1, min(window, len(steps)))
    fine = np.isfinite(values).reshape(-1, len(steps)).all(0)
    count = _sums(fine.astype(np.float64), window)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing is finite
        at = _sums(np.where(fine, steps, 0.0), window) / count
        return at, _sums(np.where(fine, values, 0.0), window) / count


def scale_path(run: Sequence[dict[str, float]]) -> list[tuple[int, float, bool]]:
    """Returns (step, loss scale, skipped) where a seed's scale changes or a step is skipped.

    The first and the last step are there too.
    """
    found: list[tuple[int, float, bool]] = []
    scale, count = None, 0
    for number, record in enumerate(run):
        skipped = record["skipped"] > count
        if record["loss_scale"] != scale or skipped or number == len(run) - 1:
            found.append((int(record["step"]), record["loss_scale"], skipped))
        scale, count = record["loss_scale"], int(record["skipped"])
    return found
