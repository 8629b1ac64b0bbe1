"""Checkpoints: state, settings, data position and metrics of a step as one unit on disk.

A folder holds one folder a step, written under a temporary name and renamed when whole:

    STEP/state/           the arrays, one entry a leaf, named by its tree path
    STEP/meta/meta.json   {"leaves": path -> dtype[shape], "metrics": ..., "meta": ...,
                           "nodes": path -> format of a moment in codes}
    STEP/digest.json      size and CRC-32 of every file, written before the rename
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mpjax.errors import ConfigError, explains_calls, is_whole
from mpjax.train.checkpoint import digest, leaves, store
from mpjax.train.checkpoint.lock import lock_directory
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.checkpoint.recast import describe_nodes
from mpjax.typing import Json, PyTree, Tree

_log = logging.getLogger("mpjax.train")
_TRIES, _PAUSE = 50, 0.1  # seconds: a failed save is cleared away while its threads end
_MEETING = 5.0  # seconds in which processes that fail alike meet


class Checkpointer(CheckpointReader):
    """Saves and restores the steps of one run; a `CheckpointReader` that also writes.

    A save is atomic: a step that is listed was committed whole. Damage that comes later is found
    by the digest before anything is restored. One writer alone may use a folder at a time: it
    locks the folder until it is closed, and removes at the start what killed saves left behind.

    After a restore of step N the next save drops the steps above N that were there when the folder
    was opened: they belong to the continuation that was left. What another run has written since
    (where there are no locks) stays, and is an error, as is saving into a folder that holds this
    or a later step without having restored from it.

    Args:
      directory: where the steps lie, on a local or a shared file system.
      keep: how many of the newest steps to keep.
      keep_best: how many of the best steps by `best_metric` to keep besides.
      best_metric: the metric that ranks them, lower is better; NaN is never the best.
      asynchronous: write in the background; False makes `save` return after the commit.

    Raises:
      ConfigError: a setting is out of range, the folder cannot be written, or another writer has
        it open.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> state = {"params": {"w": jnp.arange(3.0)}}
      >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder) as checkpointer:
      ...     checkpointer.save(7, state, {"config": {"width": 3}})
      ...     restored, meta, step = checkpointer.restore(jax.eval_shape(lambda: state))
      >>> restored["params"]["w"].tolist(), meta, step
      ([0.0, 1.0, 2.0], {'config': {'width': 3}}, 7)
    """

    @explains_calls
    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_best: int = 0,
        best_metric: str = "validation_loss",
        asynchronous: bool = True,
    ) -> None:
        if not (is_whole(keep, 1) and is_whole(keep_best, 0)):
            raise ConfigError(
                f"checkpoints: expected keep >= 1 and keep_best >= 0, got keep={keep}, "
                f"keep_best={keep_best}; set keep_best=0 to rank none"
            )
        super().__init__(directory)
        self._keep, self._keep_best, self._best_metric = keep, keep_best, best_metric
        self._asynchronous = asynchronous
        self._writer: ocp.CheckpointManager | None = None
        self._errors = store.WriteErrors()
        self._metrics: dict[int, float] = {}
        self._at: int | None = None  # the step that this run has reached on disk
        self._same: int | None = None  # the step on disk whose state is the run's own
        self._megabytes = 0.0
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            if not os.access(self._root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            # before anything is removed: it may be the save of a run that is alive
            self._unlock = lock_directory(self.directory, self)
            self._remove_unfinished()
        except OSError as error:
            raise ConfigError(
                f"{self.directory}: checkpoints cannot be written here ({error.strerror}); "
                "give a folder that you may write"
            ) from None
        self._own = set(self.steps())  # of this run: found under the lock, or written
        self._quiet = store.OrbaxLog()
        logging.getLogger("absl").addFilter(self._quiet)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Json],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a step; returns as soon as the state may be changed or donated.

        The previous save is waited for, and its error raised. Saving again the step that was
        just saved or restored does nothing, so a loop may always save when it ends.

        Args:
          step: the number of updates that made this state.
          state: a pytree of `jax.Array`.
          meta: what a resume needs besides, as JSON: settings, tokenizer, data position.
          metrics: name -> value; must hold `best_metric` if `keep_best` is set.

        Raises:
          ConfigError: the disk is full or cannot be written, meta is no JSON, a leaf is no
            array, or the folder already holds this or a later step.
        """
        self.wait()
        if step == self._same:
            return
        table = leaves.named_leaves(state)
        leaves.require_arrays(table)
        if metrics and self._keep_best and self._best_metric not in metrics:
            raise ConfigError(
                f"metrics: expected {self._best_metric!r}, which ranks the best checkpoints, got "
                f"{sorted(metrics)}; set best_metric to one of them"
            )
        page = store.make_page(table, meta, metrics or {}) | {"nodes": describe_nodes(state)}
        self._drop_later(step)
        if self._writer is None:
            self._errors = store.WriteErrors()
            self._writer = store.open_writer(
                self._root, self._choose, self._before_commit, self._errors
            )
            for s in self.steps():
                with contextlib.suppress(ConfigError):  # a damaged page ranks nowhere
                    self._rank(s, self._read_page(s))
        self._rank(step, page)
        self._at = self._same = step
        self._own.add(step)
        self._megabytes = sum(leaf.nbytes for leaf in table.values()) / 1e6
        try:
            store.write(self._writer, step, table, page)
        except store.ERRORS as error:
            self._fail(error)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the running save is committed; raises its error as a ConfigError."""
        if self._writer is not None:
            try:
                self._wait_for(self._writer)
            except store.ERRORS as error:
                self._fail(error)

    def _wait_for(self, writer: ocp.CheckpointManager) -> None:
        """Waits for the running save, or until this process has failed to write its part."""
        if jax.process_count() == 1:
            writer.wait_until_finished()
            return
        raised: list[BaseException] = []

        def wait() -> None:
            try:
                writer.wait_until_finished()
            except BaseException as error:
                raised.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        while waiting.is_alive():
            waiting.join(_PAUSE)
            if self._errors.first is not None:
                waiting.join(_MEETING)  # where all fail alike, they meet
                raise self._errors.first
        if raised:
            raise raised[0]

    def close(self) -> None:
        """Waits and frees the threads; raises the error of the last save as a ConfigError."""
        try:
            self.wait()
            if self._writer is not None:
                self._writer.close()
        finally:
            self._writer = None
            logging.getLogger("absl").removeFilter(self._quiet)
            self._unlock()

    def resume_from(self, step: int) -> None:
        """Says that the run goes on from a step that a `CheckpointReader` has restored.

        Raises:
          ConfigError: there is no such step.
        """
        self._at = self._same = self._existing(step)

    def newest_good(self) -> int:
        """Waits for the running save, then as `CheckpointReader.newest_good`."""
        self.wait()
        return super().newest_good()

    def restore(
        self, abstract_state: Tree, *, step: int | None = None, good_only: bool = False
    ) -> tuple[Tree, dict[str, Json], int]:
        """As `CheckpointReader.restore`; the next save goes on from the restored step."""
        state, meta, step = super().restore(abstract_state, step=step, good_only=good_only)
        self._same = step
        return state, meta, step

    def read(
        self, wanted: dict[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> dict[str, jax.Array]:
        """As `CheckpointReader.read`; the next save goes on from the step that was read."""
        step = self._existing(step)
        arrays = super().read(wanted, step)
        self._at, self._same = step, None
        return arrays

    def _remove_unfinished(self, every: bool = False) -> None:
        if every or jax.process_index() == 0:
            for path in self._root.glob(f"*{store.TEMPORARY}*"):
                shutil.rmtree(path)

    def _drop_later(self, step: int) -> None:
        """Removes the steps above the one that this run has reached."""
        later = [s for s in self.steps() if self._at is not None and s > self._at]
        if foreign := sorted(set(later) - self._own):
            raise ConfigError(
                f"{self.directory}: steps {foreign} were written by another run, while this one"
                f" went on from step {self._at}; end one of the two, and give another --out"
            )
        earlier = [s for s in self.steps() if s not in later]
        if earlier and step <= earlier[-1]:
            raise ConfigError(
                f"{self.directory}: cannot save step {step}, step {earlier[-1]} is already there; "
                "resume from it (--resume latest), or give another --out"
            )
        if later:
            _log.warning("%s: resumed before steps %s, dropped them", self.directory, later)
        if jax.process_index() == 0:
            for s in reversed(later):
                # renamed first: a kill in between must not leave half a step under its name
                dropped = self._root / f"{s}{store.TEMPORARY}"
                (self._root / str(s)).rename(dropped)
                shutil.rmtree(dropped)
        if later and jax.process_count() > 1:
            multihost_utils.sync_global_devices("mpjax checkpoints dropped")
        if later and self._writer is not None:  # it keeps a list of its own
            self._writer.close()
            self._writer = None
        self._whole.difference_update(later)
        for s in later:
            self._metrics.pop(s, None)

    def _existing(self, step: int | None) -> int:
        self.wait()
        return super()._existing(step)

    def _choose(self, steps: list[int]) -> set[int]:
        ranked = sorted(
            (s for s in steps if not math.isnan(self._metrics.get(s, math.nan))),
            key=lambda s: (self._metrics[s], s),
        )
        return {*steps[-self._keep :], *ranked[: self._keep_best]}

    def _rank(self, step: int, page: Mapping[str, Json]) -> None:
        if self._best_metric in page["metrics"]:
            self._metrics[step] = float(page["metrics"][self._best_metric])

    def _before_commit(self) -> None:
        digest.write(self._root / f"{self._at}{store.TEMPORARY}")

    def _fail(self, error: BaseException) -> NoReturn:
        step, writer, self._same, self._writer = self._same, self._writer, None, None
        alone = jax.process_count() == 1
        with contextlib.suppress(*store.ERRORS):  # its other threads may be writing yet
            if writer is not None and alone:  # else it would wait for the other processes
                writer.close()
        for _ in range(_TRIES):  # what stays is removed at the next start
            with contextlib.suppress(OSError):
                self._remove_unfinished(every=not alone)
            if not list(self._root.glob(f"*{store.TEMPORARY}*")):
                break
            time.sleep(_PAUSE)
        self._at = max(self.steps(), default=None)
        if store.is_full(error):
            free = shutil.disk_usage(self._root).free / 1e6
            raise ConfigError(
                f"{self.directory}: no room for the checkpoint of step {step}, "
                f"{self._megabytes:.1f} MB before compression, {free:.1f} MB free; "
                "free some space or give another --out"
            ) from error
        raise ConfigError(
            f"{self.directory}: the checkpoint of step {step} cannot be written "
            f"({store.first_line(error)}); mend the folder or give another --out"
        ) from error
