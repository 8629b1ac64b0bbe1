"""Outcomes of runs, and what paired seeds say about their differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from mpjax.errors import ConfigError, brief
from mpjax.report import runs

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One arm of a comparison: the same settings under several seeds.

    Args:
      label: of the arm.
      reference: label of the arm that it is compared with, its own if it is one.
      validation_loss: final loss on held-out text in nats a token, one per seed; NaN if none.
      tokens_per_s: median over the steps of all seeds, after the first; NaN if not measured.
      bytes_per_parameter: weights and optimizer state; NaN if not known.
      skipped: skipped steps, one per seed.
      loss_scale: final scale, one per seed.
      records: metrics of each seed, one list of step records a seed.
      folders: of the runs, one a seed, or none.
    """

    label: str
    reference: str
    validation_loss: tuple[float, ...]
    tokens_per_s: float
    bytes_per_parameter: float
    skipped: tuple[int, ...]
    loss_scale: tuple[float, ...]
    records: tuple[list[dict[str, Any]], ...] = dataclasses.field(repr=False)
    folders: tuple[Path, ...] = ()

    @classmethod
    def from_records(
        cls,
        label: str,
        records: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        reference: str = "",
        validation_loss: float | Sequence[float] | None = None,
        bytes_per_parameter: float = math.nan,
        folders: Sequence[Path] = (),
    ) -> Outcome:
        """Returns the outcome of any loop's records.

        A record holds `step` and `loss`, and what else there is of `tokens_per_s`, `loss_scale`,
        `skipped` (counted from the first step on); one without a `loss` holds the
        `validation_loss` of its step.

        Args:
          label: of the arm.
          records: of one seed, or a list of them for each seed; numbers may be arrays' scalars.
          reference: label of the arm that it is compared with; without one, its own.
          validation_loss: final one, or one a seed; by default the last of each seed's records.
          bytes_per_parameter: weights and optimizer state.
          folders: of the runs.

        Raises:
          ConfigError: no record with a loss, a record that is none, or steps that do not ascend.

        Example:
          >>> run = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "validation_loss": 2.5}]
          >>> Outcome.from_records("mine", run).validation_loss
          (2.5,)
        """
        if not isinstance(label, str) or not label:
            raise ConfigError(f"outcome: label {brief(label)}; give the arm a name")
        if isinstance(records, Mapping | str) or not isinstance(records, Sequence):
            raise ConfigError(
                f"outcome {label!r}: records {brief(records)}; give a list of dicts, such as"
                " [{'step': 1, 'loss': 3.0}], or one such list a seed"
            )
        one = not records or isinstance(records[0], Mapping)
        each: Sequence[Any] = [records] if one else records
        seeds = [runs.step_records(label, run) for run in each]
        last = [run[-1] for run in seeds]
        speeds = [r["tokens_per_s"] for run in seeds for r in run[2:] or run if "tokens_per_s" in r]
        if validation_loss is None:
            judged = [
                [r["validation_loss"] for r in run if "validation_loss" in r] for run in seeds
            ]
            losses = [found[-1] if found else math.nan for found in judged]
        else:
            losses = np.atleast_1d(np.asarray(validation_loss, np.float64)).tolist()
        if len(losses) != len(seeds):
            raise ConfigError(
                f"outcome {label!r}: {len(losses)} validation losses of {len(seeds)} seeds; give"
                " one a seed"
            )
        return cls(
            label, reference or label, tuple(losses),
            float(np.median(speeds)) if speeds else math.nan, bytes_per_parameter,
            tuple(r["skipped"] for r in last), tuple(r["loss_scale"] for r in last), tuple(seeds),
            tuple(folders),
        )  # fmt: skip

    @classmethod
    def from_run(
        cls, folder: str | Path | Sequence[str | Path], label: str = "", reference: str = ""
    ) -> Outcome:
        """Returns the outcome of a finished run, or of one arm's runs under several seeds.

        Args:
          folder: of a run (`metrics.jsonl`, and `manifest.json` if there is one), or that of an
            arm, whose folders `seed0`, `seed1` ... hold its runs; or several folders of runs,
            one a seed.
          label: of the arm; by default the folder's name.
          reference: as for `from_records`.

        Raises:
          ConfigError: not the folder of a run, no records, damaged files, or runs that differ in
            more than their seed.
        """
        if isinstance(folder, str | Path):
            folders = runs.seeds_of(Path(folder))
        else:
            several = isinstance(folder, Sequence) and all(
                isinstance(x, str | Path) for x in folder
            )
            folders = [Path(each) for each in folder] if several else []
        if not folders:
            raise ConfigError(f"outcome: {brief(folder)} is no folder of a run; give at least one")
        found = [runs.read_run(one) for one in folders]
        runs.check_alike(found)
        ended = {run.bytes_per_parameter for run in found}
        return cls.from_records(
            label or runs.label_of(folders), [run.records for run in found], reference=reference,
            bytes_per_parameter=ended.pop() if len(ended) == 1 else math.nan, folders=folders,
        )  # fmt: skip


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
