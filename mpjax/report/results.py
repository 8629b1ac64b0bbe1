"""Outcomes of runs, and what paired seeds say about their differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from mpjax.errors import ConfigError

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One arm of a comparison: the same settings under several seeds.

    Args:
      label: of the arm.
      reference: label of the arm that it is compared with, its own if it is one.
      validation_loss: final loss on held-out text in nats a token, one per seed.
      tokens_per_s: median over the steps of all seeds, after the first.
      bytes_per_parameter: weights and optimizer state.
      skipped: skipped steps, one per seed.
      loss_scale: final scale, one per seed.
      records: metrics of each seed, one list of step records a seed.
    """

    label: str
    reference: str
    validation_loss: tuple[float, ...]
    tokens_per_s: float
    bytes_per_parameter: float
    skipped: tuple[int, ...]
    loss_scale: tuple[float, ...]
    records: tuple[list[dict[str, Any]], ...] = dataclasses.field(repr=False)


def check_outcomes(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """Returns outcomes by label.

    Raises:
      ConfigError: there is none, two share a label, or the reference of one is missing.
    """
    by_label = {o.label: o for o in outcomes}
    if not outcomes:
        raise ConfigError("report: no outcomes; give at least one arm")
    if len(by_label) < len(outcomes):
        twice = [o.label for o in outcomes if by_label[o.label] is not o]
        raise ConfigError(f"report: two arms are labelled {twice[0]!r}; name each once")
    for o in outcomes:
        if o.reference not in by_label:
            raise ConfigError(
                f"report: {o.label} is compared with {o.reference!r}, which is not among"
                f" {' '.join(by_label)}; add it, or name the arm itself"
            )
    return by_label


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    r"""Returns mean and half-width of the confidence interval of the mean, 95 % by default.

    $$\bar x \pm t_{(1+c)/2,\,n-1}\, s / \sqrt n$$ with Student's t; the half-width of one value is
    NaN.

    Example:
      >>> mean, half = interval([1.0, 2.0, 3.0])
      >>> round(mean, 3), round(half, 3)
      (2.0, 2.484)
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), math.nan
    if not np.isfinite(x).all():  # a run that diverged
        return float(x.mean()), math.nan
    t = float(special.stdtrit(len(x) - 1, (1 + confidence) / 2))
    return float(x.mean()), float(t * x.std(ddof=1) / math.sqrt(len(x)))


def gaps(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Returns the gap of each seed in percent, paired with the same seed of the reference.

    The reference may have seeds beyond those of the arm; they are left out.

    Example:
      >>> [round(gap, 6) for gap in gaps([1.1, 2.2], [1.0, 2.0, 3.0])]
      [10.0, 10.0]
    """
    return [100 * (a / b - 1) for a, b in zip(losses, reference, strict=False)]


def gap(outcome: Outcome, reference: Outcome) -> tuple[float, float]:
    """Returns mean and half-width of the gap in percent, seed paired with seed; see `gaps`.

    Raises:
      ConfigError: the reference has fewer seeds than the arm.

    Example:
      >>> a = Outcome("a", "b", (1.1, 2.2), 1.0, 1.0, (0, 0), (1.0, 1.0), ([], []))
      >>> b = dataclasses.replace(a, validation_loss=(1.0, 2.0))
      >>> round(gap(a, b)[0], 6)
      10.0
    """
    if len(outcome.validation_loss) > len(reference.validation_loss):
        raise ConfigError(
            f"report: {outcome.label} has {len(outcome.validation_loss)} seeds,"
            f" {reference.label} {len(reference.validation_loss)}; seeds must pair"
        )
    return interval(gaps(outcome.validation_loss, reference.validation_loss))
