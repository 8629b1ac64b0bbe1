"""Finished runs of a comparison, so that an interrupted comparison goes on where it stopped.

A run leaves `outcome.json` in its folder as the last thing. The same command again takes the runs
that have one and trains the others. A run of other settings, code or environment is neither mixed
in nor overwritten.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from common import launch  # sets XLA flags before JAX starts  # noqa: F401
from mpjax.errors import ConfigError
from mpjax.files import is_temporary, write_text
from mpjax.report import Outcome
from mpjax.train import MetricsWriter, ProgressBar, read_manifest, read_metrics, write_manifest
from mpjax.train.checkpoint import differences
from mpjax.train.report import MANIFEST, METRICS, to_line
from mpjax.typing import Json, Settings

_OUTCOME = "outcome.json"
log = logging.getLogger("mpjax.experiments")
_CODE = ("precision_text", "precision_schedule", "versions", "commit", "environment")


def check(folder: Path, page: Mapping[str, Json], choosing: Collection[str]) -> bool:
    """Returns whether a folder holds the run of a manifest, ended or not.

    Args:
      folder: of the run.
      page: its manifest; with the setting `fresh` the folder counts as empty.
      choosing: settings that choose among runs and change none of them.

    Raises:
      ConfigError: it holds a run of other settings or other code, or files of something else.
    """
    held = (folder / MANIFEST).is_file()
    if not held and folder.exists() and not all(map(is_temporary, folder.iterdir())):
        raise ConfigError(
            f"out: {folder} holds files and is no run's folder; choose another --out, or move them"
        )
    if page["config"]["fresh"] or not held:
        return False
    if (saved := read_manifest(folder)) is None:
        return False  # `begin` sets it aside
    before, now = (
        {"config": p.get("config", {})} | {k: p.get(k) for k in _CODE} for p in (saved, page)
    )
    found = differences(before, now, [f"config.{name}" for name in (*choosing, "fresh", "out")])
    if found:
        raise ConfigError(
            f"out: {folder} holds a run that differs: {'; '.join(found)}; choose another --out,"
            " or add --fresh to train it again"
        )
    return True


def begin(
    folder: Path, page: Mapping[str, Json], choosing: Collection[str], console: Console
) -> tuple[Settings, list[Settings]] | None:
    """Returns what the run in a folder came to, or prepares the folder for it.

    Args:
      folder: as for `check`, as are page and choosing.
      console: where a run that is taken is named.

    Returns:
      (outcome, records of the steps) of a run that has ended. None if it is to be trained: the
      folder then holds the manifest alone.

    Raises:
      ConfigError: as `check`.
    """
    held = (folder / MANIFEST).is_file()
    if check(folder, page, choosing) and (ended := _ended(folder)):
        console.print(f"{folder}: has ended before and is taken as it is", highlight=False)
        return ended
    if held and read_manifest(folder) is None:
        _set_aside(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_manifest(folder, dict(page))
    return None


def _ended(folder: Path) -> tuple[Settings, list[Settings]] | None:
    """What a run came to, if it has and its files are whole."""
    if not (folder / _OUTCOME).is_file():
        return None
    outcomes = read_metrics(folder / _OUTCOME)
    records = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    *history, last = records or [{}]
    # One record for each step from 1 on, then that of the validation.
    whole = [record.get("step") for record in history] == list(range(1, len(history) + 1))
    if len(outcomes) != 1 or not history or not whole or "validation_loss" not in last:
        log.warning("%s: %s or %s is damaged; it is trained again", folder, _OUTCOME, METRICS)
        return None
    return outcomes[0], history


def stopped(folder: Path) -> str:
    """Returns why the run of a folder stopped before its end; empty if it did not."""
    outcomes = read_metrics(folder / _OUTCOME) if (folder / _OUTCOME).is_file() else []
    return str(outcomes[0].get("stopped", "")) if outcomes else ""


def _set_aside(folder: Path) -> None:
    """Moves a run away whose manifest cannot be read: it may be one of other settings."""
    names = (folder.with_name(f"damaged-{folder.name}-{n}") for n in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    log.warning("%s: its manifest is damaged; moved to %s, trained again", folder, aside.name)


@contextlib.contextmanager
def recording(
    folder: Path,
    page: Settings,
    precision: str,
    label: str,
    steps: int,
    console: Console,
    change: Callable[[Settings], Settings] = lambda record: record,
) -> Iterator[tuple[MetricsWriter, Callable[[Settings], None], list[Settings]]]:
    """Shows a progress bar while a run is trained.

    Args:
      folder: of the run.
      page: its manifest.
      precision: that the metrics name.
      label: of the bar.
      steps: of the run.
      console: of the bar.
      change: of each record before it is written.

    Yields:
      The writer of the metrics, which the caller closes; what takes a record a step; and the list
      in which the records are kept.
    """
    writer = MetricsWriter(folder, page["config"] | {"precision": precision})
    history: list[Settings] = []
    with ProgressBar(steps, console=console, label=label, lines=1) as bar:

        def report(record: Settings) -> None:
            record = change(record)
            history.append(record)
            writer.write(record)
            bar.update(record)

        yield writer, report, history


def outcome_of(
    label: str,
    reference: str,
    losses: Sequence[float],
    histories: Sequence[list[Settings]],
    bytes_per_parameter: float,
    speed: str = "tokens_per_s",
) -> Outcome:
    """Returns what the runs of an arm came to.

    Args:
      label: of the arm.
      reference: label of the arm that it is compared with.
      losses: of validation, a number a seed.
      histories: a record a step, of each seed.
      bytes_per_parameter: of its state.
      speed: the record's field that counts what is trained on; the first two steps do not count.
    """
    speeds = [record[speed] for history in histories for record in history[2:] or history]
    last = [history[-1] for history in histories]
    return Outcome(
        label, reference, tuple(losses), float(np.median(speeds)), bytes_per_parameter,
        tuple(record["skipped"] for record in last), tuple(record["loss_scale"] for record in last),
        tuple(histories),
    )  # fmt: skip


def end(folder: Path, outcome: Mapping[str, Json]) -> None:
    """Writes what a run came to, whole or not at all."""
    write_text(folder / _OUTCOME, to_line(outcome) + "\n")
