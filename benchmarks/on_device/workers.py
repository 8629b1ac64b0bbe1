"""Processes that hold the device, one at a time, and a next one that has imported already."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.common.page import ROOT
from benchmarks.on_device.cells import Cell


def carried(wheels: Path, scratch: Path) -> list[str]:
    """Unpacks the wheels of a folder that this Python has no package for; returns what to import.

    A wheel of pure Python is a zip archive of what goes on the path; nothing is installed.
    """
    places = []
    for wheel in sorted(wheels.glob("*.whl")):
        name = wheel.name.split("-")[0]
        if importlib.util.find_spec(name) is None:
            place = scratch / "packages" / name
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
            places.append(str(place))
    return places


class Worker:
    """One process; see `benchmarks.on_device.worker`.

    Args:
      env: its environment.
    """

    def __init__(self, env: dict[str, str]) -> None:
        self.used = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.on_device.worker"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=env, cwd=ROOT,
        )  # fmt: skip

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Returns the answer; None, and the process is at its end, if none came in time."""
        self.used = True
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(f"{json.dumps(request)}\n".encode())
            stdin.flush()
        except BrokenPipeError:
            pass  # it is gone: the line below is empty
        if not select.select([stdout], [], [], max(seconds, 0))[0]:
            self.stop()
            return None
        line = stdout.readline()
        if not line:
            return {"state": "failed", "why": f"the process ended with code {self.stop()}"}
        return dict(json.loads(line))

    @property
    def alive(self) -> bool:
        """Whether it can take a cell."""
        return self._process.poll() is None

    def stop(self) -> int:
        """Ends it, so that it holds no memory of the device; returns its exit code."""
        code = self._process.poll()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        return self._process.returncode if code is None else code


class Workers:
    """Gives cells to a process that holds the device, or to a new one.

    Args:
      packages: folders to import from, behind the ones that this Python has.
      scratch: a folder for compiled programs, so that one that a cell compiles again is read.
      size: of what they measure; at tiny size, which is about this script, LLVM optimizes little.
    """

    def __init__(self, packages: list[str], scratch: Path, size: str) -> None:
        here = [str(ROOT), os.environ.get("PYTHONPATH", ""), *packages]
        env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY_")}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, here))
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs room, and peaks are read
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str(scratch / "compiled"))
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        if size == "tiny":
            env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        platforms = env.get("JAX_PLATFORMS", "")
        if platforms and "cpu" not in platforms.split(","):
            env["JAX_PLATFORMS"] = f"{platforms},cpu"  # part a compares with the CPU
        self._env = env
        self.current = Worker(env)
        self._next: Worker | None = None

    def run(self, cell: Cell, size: str, end: float, *, fresh: bool = False) -> dict[str, Any]:
        """Returns what became of a cell: its state, and its result or why there is none.

        Args:
          cell: what to run.
          size: its size.
          end: time of `time.monotonic` at which it is stopped.
          fresh: whether it needs a process that has run nothing.
        """
        if not self.current.alive or (fresh and self.current.used):
            self.current.stop()  # before the next one touches the device
            self.current, self._next = self._next or Worker(self._env), None
        if fresh and self._next is None:
            self._next = Worker(self._env)
        limit = min(cell.limit(size), end - time.monotonic())
        request = {"call": cell.call, "arguments": cell.arguments, "size": size}
        found = self.current.ask(request, limit)
        if found is None:
            return {"state": "stopped", "why": f"stopped after {max(limit, 0):.0f} s"}
        return found

    def stop(self) -> None:
        """Ends all processes."""
        for worker in filter(None, (self.current, self._next)):
            worker.stop()
