"""The manifest of a run: what would be needed to run it again."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jax

from mpjax.files import write_text
from mpjax.ops import how_it_runs
from mpjax.precision import Precision, PrecisionSchedule, Recipe
from mpjax.train.report.environment import environment
from mpjax.typing import Json, Settings

MANIFEST = "manifest.json"
_log = logging.getLogger("mpjax.train")
_PACKAGES = (
    "mpjax", "jax", "jaxlib", "flax", "optax", "jmp", "orbax-checkpoint", "grain", "numpy",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's outcome depends on."""
    return {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES}


def _commit() -> str:
    def git(*words: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installed package may lie inside a repository that is not its own.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def how_products_run(recipes: Iterable[Recipe], tokens: int) -> dict[str, dict[str, str]]:
    """Returns recipe -> product -> what multiplies it on this machine.

    Args:
      recipes: of a model; `model.recipes.values()`.
      tokens: of a step.
    """
    backend = jax.default_backend()
    return {recipe.name: how_it_runs(recipe, backend, tokens) for recipe in dict.fromkeys(recipes)}


def manifest(
    precision: Precision,
    config: Settings,
    paths: Iterable[str],
    products: dict[str, dict[str, str]],
    schedule: PrecisionSchedule | None = None,
) -> dict[str, Json]:
    """Returns what a run's outcome depends on.

    Args:
      precision: resolved; the manifest holds all of it.
      config: every setting.
      paths: of the model; each one's policy is written out.
      products: recipe -> product -> what multiplies it here.
      schedule: of Precision over the run; the number `precision` of a step's record counts in its
        `labels`.

    Returns:
      JSON-able: precision, its line of text, policies by path, recipes in full, schedule, config,
      versions, commit, environment (of JAX and XLA, what changes numbers), XLA flags, devices,
      command.
    """
    device, paths = jax.devices()[0], list(paths)
    chosen = schedule.precisions if schedule else (precision,)
    found = (one.recipe(path) for one in chosen for path in paths)
    recipes = dict.fromkeys(recipe for recipe in found if recipe is not None)
    over_time = schedule and schedule.to_dict() | {
        "text": str(schedule),
        "labels": list(schedule.labels),
        "policies": [p.layout(paths) for p in schedule.precisions],
    }
    return {
        "precision": precision.to_dict(),
        "precision_text": precision.to_text(),
        "policies": precision.layout(paths),
        "recipes": {one.name: dataclasses.asdict(one) for one in recipes},
        "precision_schedule": over_time,
        "products": products,
        "config": config,
        "versions": versions(),
        "commit": _commit(),
        "environment": environment(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_manifest(out: str | Path, content: dict[str, Json]) -> None:
    """Writes `manifest.json` in a run's folder, whole or not at all.

    One that is there and is damaged is moved to `manifest.json.damaged`, with one logged line.
    """
    path = Path(out) / MANIFEST
    if path.exists() and read_manifest(out) is None:
        aside = path.with_name(f"{MANIFEST}.damaged")
        path.replace(aside)
        _log.warning("%s: is damaged; moved to %s", path, aside.name)
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_manifest(out: str | Path) -> dict[str, Json] | None:
    """Returns the manifest of a run's folder; None if it is damaged: cut off, or no JSON object.

    Raises:
      OSError: there is none, or it cannot be read.
    """
    try:
        found = json.loads((Path(out) / MANIFEST).read_bytes().decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("config", {}), dict) else None
