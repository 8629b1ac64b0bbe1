"""A page of evidence: what was measured, when, with what, on what kind of machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def _git(*command: str) -> str:
    run = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def _started() -> str:
    """How the script that runs was started."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec else " ".join(["python", *sys.argv[:1]])


def commit() -> str:
    """Returns the commit that is checked out, marked where files differ from it."""
    found = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/evidence"):
        found += "-dirty"  # by more than the pages that were written before this one
    return found or "unknown"


def write(script: str, title: str, body: str, command: str = "") -> Path:
    """Writes `docs/evidence/SCRIPT.md` and prints it.

    Args:
      script: its name, and that of its page.
      title: the claim in a few words.
      body: Markdown.
      command: that writes it, where that is not the module that runs.
    """
    written = f"`{command}`" if command else f"`{_started()}` (`make evidence` runs all of them)"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    now = datetime.datetime.now(datetime.UTC)
    text = f"""# {title}

Written by {written}; do not edit.

- date: {now:%Y-%m-%d %H:%M} UTC; commit: {commit()}
- machine: {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, CPU \
only; load average {os.getloadavg()[0]:.1f} at the end
- Python {platform.python_version()}, {versions}

{body}
"""
    path = ROOT / "docs" / "evidence" / f"{script}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)
    return path
