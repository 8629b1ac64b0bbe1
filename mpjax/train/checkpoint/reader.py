"""Reads checkpoints: what steps there are, whether they are whole, their metadata and arrays."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jax

from mpjax.errors import ConfigError
from mpjax.train.checkpoint import digest, leaves, store
from mpjax.train.checkpoint.replica_leaves import as_saved, fits_other_replicas, for_replicas
from mpjax.typing import Json, Tree

_log = logging.getLogger("mpjax.train")


class CheckpointReader:
    """The checkpoints of a run that may be alive: reads them and writes nothing.

    Args:
      directory: the folder that a `Checkpointer` writes, on a local or a shared file system.

    Raises:
      ConfigError: the directory is an address (`gs://...`) and no path.

    Example:
      >>> CheckpointReader("runs/none/checkpoints").steps()
      []
    """

    def __init__(self, directory: str | Path) -> None:
        if "://" in str(directory):
            raise ConfigError(f"{directory}: expected a local path, got an address; mount it")
        self.directory = Path(directory)
        self._root = self.directory.absolute()  # Orbax demands it
        self._whole: set[int] = set()  # steps whose digest was compared

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first."""
        if not self._root.is_dir():
            return []
        return sorted(int(path.name) for path in self._root.iterdir() if path.name.isdecimal())

    def newest_good(self) -> int:
        """Returns the newest step that is whole; logs one line for each that is skipped.

        Raises:
          ConfigError: no step is whole.
        """
        for step in reversed(self.steps()):
            if (found := self._damage(step)) is None:
                return step
            _log.warning("%s: step %d is damaged (%s), skipped", self.directory, step, found)
        raise ConfigError(f"{self.directory}: holds no whole checkpoint; start without --resume")

    def read_meta(self, step: int | None = None) -> dict[str, Json]:
        """Returns the `meta` that was saved with a step, by default the newest.

        Raises:
          ConfigError: there is no such step, or its metadata is damaged.
        """
        return self._read_page(self._existing(step))["meta"]

    def read_leaves(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns path -> shape and dtype of the leaves that were saved with a step.

        Raises:
          ConfigError: there is no such step, or its metadata is damaged.
        """
        described = self._read_page(self._existing(step))["leaves"]
        return {name: leaves.parse(text) for name, text in described.items()}

    def read_nodes(self, step: int | None = None) -> dict[str, str]:
        """Returns path -> description of the low moments that were saved with a step.

        Raises:
          ConfigError: there is no such step, or its metadata is damaged.
        """
        return self._read_page(self._existing(step)).get("nodes", {})

    def restore(
        self, abstract_state: Tree, *, step: int | None = None, good_only: bool = False
    ) -> tuple[Tree, dict[str, Json], int]:
        """Restores a state bit for bit, onto the devices that the target names.

        Args:
          abstract_state: a pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes
            and dtypes that were saved; its shardings are honoured, whatever the mesh at the
            save. A leaf without a sharding goes to the first device. What replicas have not sent
            of compressed gradients is shared out anew among another number of them.
          step: which step; None takes the newest.
          good_only: with `step=None`, take the newest that is whole.

        Returns:
          The state, the `meta` saved with it, and the step.

        Raises:
          ConfigError: nothing is there, the checkpoint is damaged, or the structure, a shape or
            a dtype differs (named by path).
        """
        step = self.newest_good() if good_only and step is None else self._existing(step)
        page = self._read_page(step)
        wanted = leaves.named_leaves(abstract_state)
        leaves.require_same(f"{self.directory} step {step}", page["leaves"], wanted)
        read = self.read({name: leaves.target(leaf) for name, leaf in wanted.items()}, step)
        structure = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(structure, [read[name] for name in wanted]), page["meta"], step

    def read(
        self, wanted: dict[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> dict[str, jax.Array]:
        """Reads single leaves of a step, after comparing its digest.

        Args:
          wanted: path -> the saved shape and dtype, with the sharding to read into; what replicas
            keep may be for another number of them.
          step: which step; None takes the newest.

        Raises:
          ConfigError: there is no such step, or it is damaged.
        """
        step = self._existing(step)
        if (found := self._damage(step)) is not None:
            raise self._damaged(step, found)
        saved = self.read_leaves(step)
        others = {n for n, x in wanted.items() if fits_other_replicas(n, saved[n], x)}
        lying = {n: as_saved(saved[n], x) if n in others else x for n, x in wanted.items()}
        arrays = store.read(self._root / str(step), lying)
        return arrays | {n: for_replicas(n, arrays[n], wanted[n]) for n in others}

    def _read_page(self, step: int) -> dict[str, Json]:
        folder = self._root / str(step)
        if (found := digest.damage(folder, below=store.META_FILE)) is not None:
            raise self._damaged(step, found)
        return json.loads((folder / store.META_FILE).read_text())

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self.directory}: holds no checkpoint; start without --resume")
        if step is not None and step not in steps:
            raise ConfigError(
                f"{self.directory}: expected one of the steps {steps}, got {step}; give one of them"
            )
        return steps[-1] if step is None else step

    def _damage(self, step: int) -> str | None:
        if step in self._whole:
            return None
        found = digest.damage(self._root / str(step))
        if found is None:
            self._whole.add(step)
        return found

    def _damaged(self, step: int, found: str) -> ConfigError:
        earlier = [s for s in self.steps() if s < step and self._damage(s) is None]
        remedy = (
            f"--resume latest-good takes step {earlier[-1]} before it"
            if earlier
            else "no whole one is before it, start without --resume"
        )
        return ConfigError(f"{self.directory}: step {step} is damaged ({found}); {remedy}")
