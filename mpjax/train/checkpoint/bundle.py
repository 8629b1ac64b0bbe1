"""What a run leaves that stopped on non-finite gradients: enough to run its last step again.

    replay/state/STEP/     the state before the step, as a checkpoint holds it, and what rebuilds it
    replay/batch-0.npz     the batch of each process
    replay/report.txt      what `trace_nonfinite` said of it

The gate keeps a step that broke from changing anything but counters, so the state after it is the
state before it, and donation does no harm. `python -m mpjax.replay RUN` explains it again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpjax.errors import ConfigError
from mpjax.files import write_file, write_text
from mpjax.interpret.nonfinite.nonfinite import trace_nonfinite
from mpjax.train.checkpoint.checkpointer import Checkpointer
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.step import TrainState, TrainStep
from mpjax.typing import ArrayLike, Batch, Json

BUNDLE = "replay"
_STATE, _REPORT = "state", "report.txt"
_BATCH = re.compile(r"batch-(\d+)\.npz")


def save_bundle(
    run: str | Path,
    number: int,
    state: TrainState,
    batch: Mapping[str, ArrayLike],
    meta: Mapping[str, Json],
) -> Path:
    """Writes a bundle into a run's folder, over one that is there already.

    Args:
      run: the run's folder.
      number: of the step that broke.
      state: the state before it; of a gated step also the one after it.
      batch: this process's part of the batch, named arrays.
      meta: JSON-able, what rebuilds model and step.

    Returns:
      The bundle's folder.

    Raises:
      ConfigError: the disk is full or cannot be written.
    """
    folder = Path(run) / BUNDLE
    with Checkpointer(folder / _STATE, keep=1, asynchronous=False) as writer:
        if steps := writer.steps():
            writer.resume_from(steps[-1])
            number = max(number, steps[-1] + 1)  # a folder holds each step once
        writer.save(number, state, meta)
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in batch.items()}
    name = f"batch-{jax.process_index()}.npz"
    write_file(folder / name, lambda file: np.savez(file, **arrays))
    return folder


def read_meta(folder: str | Path) -> dict[str, Json]:
    """Returns the `meta` of a bundle.

    Args:
      folder: the bundle's, or its run's.

    Raises:
      ConfigError: there is no bundle, or it is damaged.
    """
    return CheckpointReader(_found(folder) / _STATE).read_meta()


def load_bundle(
    folder: str | Path, abstract_state: TrainState
) -> tuple[TrainState, dict[str, np.ndarray], int]:
    """Reads a bundle.

    Args:
      folder: the bundle's, or its run's.
      abstract_state: structure, shapes, dtypes and shardings of the state.

    Returns:
      The state, the global batch and the number of the step.

    Raises:
      ConfigError: there is no bundle, it is damaged, or the state has another structure.
    """
    folder = _found(folder)
    state, _, number = CheckpointReader(folder / _STATE).restore(abstract_state)
    numbered = [(int(m[1]), path) for path in folder.iterdir() if (m := _BATCH.match(path.name))]
    if not numbered:
        raise ConfigError(f"{folder}: holds no batch-0.npz; give the folder of a run that stopped")
    parts = []
    for _, path in sorted(numbered):
        with np.load(path) as file:
            parts.append(dict(file))
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return state, batch, number


def explain(
    step: TrainStep, state: TrainState, batch: Batch, folder: str | Path | None = None
) -> str:
    """Returns what broke in a step, in a few lines; also written into a bundle's folder.

    Args:
      step: the train step.
      state: the state before it.
      batch: its host batch.
      folder: of a bundle.
    """
    taken, plain = step.active(state)
    report = trace_nonfinite(taken.function, plain, step.place(batch))
    text = "nothing broke: the step is finite when it runs again" if report is None else str(report)
    if folder is not None:
        write_text(Path(folder) / _REPORT, text + "\n")
    return text


def _found(folder: str | Path) -> Path:
    for path in (Path(folder), Path(folder) / BUNDLE):
        if CheckpointReader(path / _STATE).steps():
            return path
    raise ConfigError(
        f"{folder}: holds no replay bundle; a run leaves one in {BUNDLE}/ when it stops on"
        " gradients that are not finite (--patience 1 stops at the first, without a loss scale)"
    )
