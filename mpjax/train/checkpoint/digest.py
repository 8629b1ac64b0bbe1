"""The digest of a checkpoint folder: size and CRC-32 of every file, to detect damage."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from mpjax.files import write_text

NAME = "digest.json"
# Rewritten by the commit itself, after the digest, and needed by no restore.
_NOT_COVERED = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt", NAME})


def write(folder: Path) -> None:
    """Writes the digest of all files below a folder into it, atomically.

    CRC-32 detects every error burst of up to 32 bits, so every flipped byte, and runs at the
    speed of the disk; it is no defence against a forger.

    Args:
      folder: a checkpoint whose files are complete.

    Raises:
      OSError: a file cannot be read, or the digest cannot be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    table = {
        name: [path.stat().st_size, _crc(path)]
        for path in files
        if (name := path.relative_to(folder).as_posix()) not in _NOT_COVERED
    }
    write_text(folder / NAME, json.dumps(table, indent=0))


def damage(folder: Path, below: str = "") -> str | None:
    """Compares the files of a folder with its digest.

    Args:
      folder: a folder that `write` has been called on.
      below: compare only the files whose path starts so.

    Returns:
      None if every file is as it was written, else one phrase that names the first that is not.
    """
    if not (folder / NAME).is_file():
        return f"{NAME} is missing"
    try:
        table = json.loads((folder / NAME).read_text())
        entries = [(str(name), int(size), int(crc)) for name, (size, crc) in table.items()]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"{NAME} is not readable"
    if not any(name.startswith(below) for name, _, _ in entries):
        return f"{NAME} lists no {below or 'files'}"  # cut off, and yet valid
    for name, size, crc in entries:
        path = folder / name
        if not name.startswith(below):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes, {size} were written"
        if _crc(path) != crc:
            return f"{name} holds other bytes than were written"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
