"""The process that holds the device: reads cells from its input, answers each with a line.

It ends when its input ends or the process that started it does, so that a killed run leaves
nothing behind that holds the device's memory.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import time
import traceback
from typing import Any

from benchmarks.on_device.cells import SIZES


def first_line(error: BaseException) -> str:
    """Returns what an exception says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def place(error: BaseException) -> str:
    """Returns where an exception was raised, file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""


def watch_parent(parent: int) -> None:
    """Ends this process once its parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one cell; returns what it found, or one line about why it did not."""
    module, function = request["call"].split(":")
    try:
        found = importlib.import_module(f"{__package__}.measures.{module}")
        result = getattr(found, function)(SIZES[request["size"]], **request["arguments"])
        return {"state": "done", "result": result}
    except Exception as error:
        return {"state": "failed", "why": f"{first_line(error)} ({place(error)})"}


def free() -> None:
    """Drops compiled programs and what they hold, where memory is the device's own."""
    import jax  # after a cell: a process in reserve has not touched the device

    gc.collect()
    if jax.devices()[0].memory_stats() is not None:
        jax.clear_caches()


def serve() -> None:
    """Answers until the input ends."""
    watch_parent(os.getppid())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
        free()


if __name__ == "__main__":
    import mpjax  # noqa: F401  (a process in reserve imports while another one measures)

    serve()
