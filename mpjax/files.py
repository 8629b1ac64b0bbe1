"""The one way in which a file is written, whole or not at all; folders that are ours alone."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mpjax.errors import ConfigError

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
# A symbolic link at the name is an error, not followed (Windows has no such flag).
NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)


def write_file(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under a temporary name in its folder, and renames it when it is on the disk.

    A reader finds the old file or the new one and never a part, whatever is killed; on an error
    the old file stays and nothing is left. The temporary name cannot be guessed and must be new,
    so that a link that lies in wait is not followed; a link at `path` itself is replaced. The file
    has the permissions that `open` would give it.

    Args:
      path: of the file; its folder exists.
      write: called with the open file.

    Raises:
      OSError: the folder cannot be written, or the disk is full.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_file(Path(folder, "a.txt"), lambda file: file.write(b"hello"))
      ...     print(os.listdir(folder), Path(folder, "a.txt").read_bytes())
      ['a.txt'] b'hello'
    """
    path = Path(path)
    # Not tempfile.mkstemp: its files are for their owner alone, and the umask can only be read by
    # changing it, which another thread would feel.
    fresh = path.with_name(f".{secrets.token_hex(8)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW
    with open(fresh, "xb", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with no content
            os.replace(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes bytes, as `write_file` does."""
    write_file(path, lambda file: file.write(content))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text as UTF-8, as `write_file` does."""
    write_bytes(path, text.encode())


def is_temporary(path: Path) -> bool:
    """Whether a path is what a killed `write_file` leaves.

    Example:
      >>> is_temporary(Path("run/.0123456789abcdef.tmp")), is_temporary(Path("run/notes.tmp"))
      (True, False)
    """
    return _TEMPORARY.fullmatch(path.name) is not None


def refuse_shared(folder: Path) -> None:
    """Refuses a cache folder that somebody else may have filled; one that is absent passes.

    Its owner is this user or root, and neither its group nor everyone may write there.

    Raises:
      ConfigError: says whose it is, or who may write there, and the remedy.
    """
    if os.name != "posix":
        return
    try:
        link, found = folder.lstat(), folder.stat()
    except OSError:  # absent, or not to be entered: then nothing is read from it
        return
    owners = {link.st_uid, found.st_uid} - {os.geteuid(), 0}
    who = "everyone" if found.st_mode & stat.S_IWOTH else "its group"
    if owners:
        why = f"belongs to user {_user(max(owners))}"
        remedy = "remove it"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why, remedy = f"can be written by {who}", f"chmod 700 {folder}"
    else:
        return
    raise ConfigError(
        f"cache folder {folder}: {why}, so what lies there is not trusted; {remedy}, or set"
        " MPJAX_CACHE to a folder of your own"
    )


def _user(number: int) -> str:
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def private_folder(folder: Path) -> None:
    """Makes a cache folder that its owner alone may enter; one that is there is checked.

    Raises:
      ConfigError: as `refuse_shared`.
      OSError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700)
    except FileNotFoundError:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
    refuse_shared(folder)
