"""Cache folder: files that can be rebuilt, written whole or not at all."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mpjax.errors import ConfigError
from mpjax.files import write_file, write_text

logger = logging.getLogger("mpjax.data")


class Cache:
    """Checksummed files in the cache folder; a torn or corrupted one counts as absent.

    Each file is written beside its place, then renamed, and its checksum (CRC-32) after it: a
    process killed at any moment leaves no file that passes for a whole one. Writers of the same
    name write the same bytes, so they need no lock. A folder that cannot be written is logged
    once and the caller goes on without.

    Args:
        folder: the folder; default ``$MPJAX_CACHE``, else ``$XDG_CACHE_HOME/mpjax``, else
            ``~/.cache/mpjax``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = Cache(folder)
        ...     before = cache.find("a.txt")
        ...     cache.store("a.txt", lambda file: file.write(b"hello"))
        ...     print(before, cache.find("a.txt").read_bytes())
        None b'hello'
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        self.folder = Path(folder) if folder is not None else _default_folder()
        self._writable = True

    def find(self, name: str) -> Path | None:
        """The path of a whole file, or None; says in one logged line when a broken one is there."""
        path, sum_path = self.folder / name, self._sum_path(name)
        try:
            if not path.exists():
                return None
            if sum_path.exists() and sum_path.read_text() == checksum(path):
                return path
            reason = "torn or corrupted"
        except (OSError, UnicodeDecodeError) as error:
            reason = f"not readable ({error})"
        logger.warning("cache file %s is %s; rebuilding it", path, reason)
        return None

    def store(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Writes a file and its checksum; a failure is logged once and turns writing off."""
        if not self._writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / name, write)
            write_text(self._sum_path(name), checksum(self.folder / name))
        except OSError as error:
            self._writable = False
            logger.warning(
                "cache folder %s cannot be written (%s); going on without", self.folder, error
            )

    def _sum_path(self, name: str) -> Path:
        return self.folder / f"{name}.crc32"


def _default_folder() -> Path:
    if named := os.environ.get("MPJAX_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mpjax"
    try:
        return Path.home() / ".cache" / "mpjax"
    except RuntimeError:
        raise ConfigError(
            "cache folder: this user has no home directory; set MPJAX_CACHE to a folder"
        ) from None


def checksum(path: Path) -> str:
    """CRC-32 and size of a file, as text."""
    value, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value, size = zlib.crc32(block, value), size + len(block)
    return f"{value:08x} {size}"
