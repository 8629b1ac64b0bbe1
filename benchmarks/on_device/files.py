"""How a result is written: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes a file under another name and renames it when it is on the disk.

    Not `mpjax.files`: importing mpjax imports JAX, and the results must be written where that
    fails.
    """
    fresh = path.with_name(f".{path.name}.tmp")  # one writer, and a next run takes it over
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
