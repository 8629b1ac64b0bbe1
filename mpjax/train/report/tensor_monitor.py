"""A run's tensors, measured every few steps: `monitor.jsonl` and TensorBoard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.interpret.monitor.monitor import monitor
from mpjax.interpret.monitor.report import KINDS, Monitored
from mpjax.train.report.metrics_writer import open_after, to_line
from mpjax.train.step import StepFn, TrainState, TrainStep
from mpjax.typing import Batch, Metrics, Settings

FILE = "monitor.jsonl"
_LOWEST = -126  # exponent of the first bin of `Statistics.histogram`


def watched(
    step: TrainStep,
    report: Callable[[int, Monitored], None],
    *,
    every: int,
    start: int = 0,
    **options: Any,
) -> TrainStep:
    """Returns a train step that measures its tensors before every n-th step.

    The measurement is a program of its own that reads state and batch before the step takes them;
    the step's own program, and so every bit of the training, is the same with it and without.

    Args:
      step: from `build` or `make_train_step`.
      report: called with the number of the step that was measured and the measurement, on the
        devices; that step is dispatched before, so that they need not wait for the host.
      every: steps between measurements; the run's first step is measured too.
      start: steps that were taken already.
      options: of `mpjax.interpret.monitor`: `where`, `what`, `formats`, `sample`.

    Raises:
      ConfigError: every is below 1.
    """
    if not is_whole(every, 1):
        raise ConfigError(
            f"monitor_every: {brief(every)} must be at least 1; leave it out to not measure"
        )
    monitor(step.function, **options)  # refuses what it cannot measure before the run begins
    programs: dict[
        StepFn, Callable[[TrainState, Batch], Monitored]
    ] = {}  # a program for each precision that the step runs in
    number = start

    def measure(state: TrainState, batch: Batch) -> Monitored:
        taken, plain = step.active(state)
        if taken.function not in programs:
            function = monitor(taken.function, **options)
            programs[taken.function] = jax.jit(lambda state, batch: function(state, batch)[1])
        return programs[taken.function](plain, batch)

    def compiled(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal number
        number += 1
        monitored = None
        if number % every == 0 or number == start + 1:
            monitored = measure(state, batch)
        out = step.compiled(state, batch)
        if monitored is not None:
            report(number, monitored)
        return out

    return dataclasses.replace(step, compiled=compiled)


def _histograms(monitored: Monitored) -> Iterator[tuple[str, str, int | None, int, list[int]]]:
    """Kind, name, layer, exponent of the first count and counts of each tensor and layer."""
    for kind in KINDS:
        for name, found in getattr(monitored, kind).items():
            flat = np.asarray(found.histogram)
            flat = flat.reshape(-1, flat.shape[-1])
            for index, counts in enumerate(flat):
                layer = index if found.layers else None
                if (there := np.flatnonzero(counts)).size:
                    first, last = int(there[0]), int(there[-1])
                    yield kind, name, layer, _LOWEST + first, counts[first : last + 1].tolist()
                else:
                    yield kind, name, layer, 0, []


class TensorWriter:
    r"""Writes what a monitor saw: a line a tensor and layer, and curves and histograms.

    A line of `monitor.jsonl` has the keys of `Monitored.rows`, `step`, and the histogram: how many
    numbers have each exponent from `first_exponent` on. TensorBoard shows `amax` and underflow as
    curves, and histograms of $\log_2 \lvert x \rvert$.

    Args:
      out: folder of the run.
      start: step that the run resumes from; later records of an earlier try are dropped.

    Attributes:
      last: the records of the last measurement, as of `Monitored.rows`.
      last_step: its step.
    """

    def __init__(self, out: str | Path, *, start: int = 0) -> None:
        from tensorboardX import SummaryWriter  # here: 0.3 s that `--help` need not wait for

        self._file = open_after(Path(out) / FILE, start)
        self._board = SummaryWriter(str(Path(out) / "tensorboard" / "tensors"), flush_secs=10)
        self.last: list[Settings] = []
        self.last_step = start

    def write(self, step: int, monitored: Monitored) -> None:
        """Writes what was seen before a step."""
        host = jax.device_get(monitored)
        self.last, self.last_step = list(host.rows()), step
        found = {entry[:3]: entry[3:] for entry in _histograms(host)}
        for row in self.last:
            key = row["kind"], row["name"], row["layer"]
            first, counts = found.get(key, (0, []))
            extra = {"first_exponent": first, "histogram": counts} if key in found else {}
            self._file.write(to_line({"step": step} | row | extra) + "\n")
            tag = "/".join(str(part) for part in key if part is not None).replace(":", ".")
            self._points(tag, row, step)
            if counts:
                self._histogram(tag, first, np.array(counts), step)
        self._file.flush()

    def _points(self, tag: str, row: Settings, step: int) -> None:
        for key, value in row.items():
            if key == "amax" or key.startswith("underflow/") or key == row["kind"]:
                end = "" if key == row["kind"] else f"/{key.replace(' ', '_')}"
                self._board.add_scalar(tag + end, value, step)

    def _histogram(self, tag: str, first: int, counts: np.ndarray, step: int) -> None:
        centres = first + 0.5 + np.arange(len(counts))
        limits = first + 1.0 + np.arange(len(counts))
        self._board.add_histogram_raw(
            f"{tag}/log2", float(first), float(limits[-1]), int(counts.sum()),
            float(counts @ centres), float(counts @ centres**2), limits.tolist(), counts.tolist(),
            step,
        )  # fmt: skip

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()
