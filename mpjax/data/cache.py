"""Cache folder: files that can be rebuilt, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mpjax.errors import ConfigError
from mpjax.files import private_folder, refuse_shared, write_file, write_text

logger = logging.getLogger("mpjax.data")


class Cache:
    """Checksummed files in the cache folder; one that is not what was stored is set aside.

    A name holds a hash of all that the file was made of. Each file is written beside its place,
    then renamed, and after it the SHA-256 of its name and content: a process killed at any moment
    leaves no file that passes for a whole one, and a file under another's name is none either.
    Writers of the same name write the same bytes, so they need no lock. A folder that cannot be
    written is logged once and the caller goes on without; one that others may write is refused.

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
        """The path of a whole file, or None; a broken one is set aside with one logged line.

        Raises:
            ConfigError: the folder belongs to somebody else, or others may write there.
        """
        path, sum_path = self.folder / name, self._sum_path(name)
        refuse_shared(self.folder)
        try:
            if not path.exists():
                return None
            if sum_path.exists() and sum_path.read_bytes() == _sum(path):
                return path
            reason = "torn or corrupted"
        except OSError as error:
            reason = f"not readable ({error})"
        with contextlib.suppress(OSError):
            path.replace(aside := self.folder / f"{name}.broken")
            reason += f", now {aside.name}"
        logger.warning("cache file %s is %s; rebuilding it", path, reason)
        return None

    def store(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Writes a file and its checksum; a failure is logged once and turns writing off.

        Raises:
            ConfigError: as `find`.
        """
        if not self._writable:
            return
        try:
            private_folder(self.folder)
            write_file(self.folder / name, write)
            write_text(self._sum_path(name), _sum(self.folder / name).decode())
        except OSError as error:
            self._writable = False
            logger.warning(
                "cache folder %s cannot be written (%s); going on without", self.folder, error
            )

    def _sum_path(self, name: str) -> Path:
        return self.folder / f"{name}.sha256"


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


def _sum(path: Path) -> bytes:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(path.name.encode() + b"\0"))
    return digest.hexdigest().encode()


def checksum(path: Path) -> str:
    """CRC-32 and size of a file, as text."""
    value, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value, size = zlib.crc32(block, value), size + len(block)
    return f"{value:08x} {size}"
