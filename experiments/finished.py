"""Runs of a comparison that came to their end: an interrupted comparison goes on where it stopped.

A run leaves `outcome.json` in its folder as the last thing. The same command again takes the runs
that have one and trains the others. A run of other settings, code or environment is neither mixed
in nor overwritten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mpjax.errors import ConfigError
from mpjax.files import is_temporary, write_text
from mpjax.train.manifest import write_manifest
from mpjax.train.metrics import read_metrics, to_line
from mpjax.train.restore import differences

_OUTCOME, _MANIFEST = "outcome.json", "manifest.json"
_CODE = ("precision_text", "precision_schedule", "versions", "commit", "environment")


def check(folder: Path, page: Mapping[str, Any], choosing: Collection[str]) -> bool:
    """Returns whether a folder holds the run of a manifest, ended or not.

    Args:
      folder: of the run.
      page: its manifest; with the setting `fresh` the folder counts as empty.
      choosing: settings that choose among runs and change none of them.

    Raises:
      ConfigError: it holds a run of other settings or other code, or files of something else.
    """
    held = (folder / _MANIFEST).is_file()
    if not held and folder.exists() and not all(map(is_temporary, folder.iterdir())):
        raise ConfigError(
            f"out: {folder} holds files and is no run's folder; choose another --out, or move them"
        )
    if page["config"]["fresh"] or not held:
        return False
    saved = json.loads((folder / _MANIFEST).read_text())
    before, now = ({"config": p["config"]} | {k: p.get(k) for k in _CODE} for p in (saved, page))
    found = differences(before, now, [f"config.{name}" for name in (*choosing, "fresh", "out")])
    if found:
        raise ConfigError(
            f"out: {folder} holds a run that differs: {'; '.join(found)}; choose another --out,"
            " or add --fresh to train it again"
        )
    return True


def begin(
    folder: Path, page: Mapping[str, Any], choosing: Collection[str], console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
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
    if check(folder, page, choosing) and (folder / _OUTCOME).is_file():
        console.print(f"{folder}: has ended before and is taken as it is", highlight=False)
        (outcome,) = read_metrics(folder / _OUTCOME)
        return outcome, [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_manifest(folder, dict(page))
    return None


def end(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Writes what a run came to, whole or not at all."""
    write_text(folder / _OUTCOME, to_line(outcome) + "\n")
