"""On what was it measured: the device, its driver and clocks, and the versions of the software."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

from benchmarks.common.page import ROOT

PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "numpy",
    "ml_dtypes", "torch", "triton", "nvidia-cudnn-cu13", "nvidia-cublas",
)  # fmt: skip
ASKED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def output(*command: str) -> str:
    """Returns what a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks() -> dict[str, str]:
    """Returns driver, clocks and power of the first GPU, as nvidia-smi reads them just now."""
    line = output("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader").splitlines()[:1]
    values = line[0].split(", ") if line else []
    return dict(zip(ASKED.split(","), values, strict=True)) if len(values) == 7 else {}


def versions() -> dict[str, str]:
    """Returns the versions of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def host(command: str) -> dict[str, Any]:
    """Returns what is known without touching the device."""
    commit = output("git", "rev-parse", "--short", "HEAD")
    if commit and output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "command": command,
        "commit": commit or "unknown",
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": sys.version.split()[0],
        "versions": versions(),
        "clocks": clocks(),
    }


def device(size: Any) -> dict[str, Any]:
    """Returns what JAX says about the device; run where the device is held."""
    del size  # every cell is called with one
    import jax
    import jaxlib

    one = jax.devices()[0]
    stats = one.memory_stats() or {}
    client = getattr(one, "client", None)
    return {
        "platform": one.platform,
        "device": one.device_kind,
        "devices": jax.device_count(),
        "runtime": " ".join(str(getattr(client, "platform_version", "")).split()),
        "memory": stats.get("bytes_limit"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
