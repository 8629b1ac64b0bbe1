"""One writer a folder: a lock that ends with its process, and says who holds it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import logging
import os
import shlex
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from mpjax.errors import ConfigError, printable
from mpjax.files import NO_FOLLOW

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_log = logging.getLogger("mpjax.train")
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_TRIES = 1000  # to make a folder that others remove
_LONGEST = 300  # characters of an owner's line that are shown


@contextlib.contextmanager
def hold_folder(folder: str | Path) -> Iterator[None]:
    """Holds a run's folder for this process as long as the block lasts.

    The lock is `flock` on the file `.lock` in the folder, which names its owner: the kernel ends
    it with the process, however that ends, and a file that a killed process left blocks no one.
    The file is removed at the end, and so are folders that were made for it and are still empty.
    A file system without `flock` is said so in one logged line, and the block runs without.

    Args:
      folder: it is made if it is not there.

    Raises:
      ConfigError: another process (or this one) holds the folder, or it cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, hold_folder(folder):
      ...     with hold_folder(folder):
      ...         pass
      Traceback (most recent call last):
      mpjax.errors.ConfigError: out: ... is in use by pid ... on ...; wait until it has ended, ...
    """
    folder, made = Path(folder), list[Path]()
    name = os.fsencode(folder.absolute())
    if name.decode(errors="replace") != str(folder.absolute()):  # JSON, TensorBoard, Orbax need it
        raise ConfigError(f"out: the name {name!r} is not UTF-8; choose another --out")
    try:
        try:
            fd = _opened(folder, made)
        except OSError as error:
            raise ConfigError(
                f"out: {folder} cannot be written ({error.strerror}); choose another --out"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may have vanished
                (folder / LOCK).unlink()  # held until the close: who has it open looks again
            os.close(fd)
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # it holds something by now
                path.rmdir()


def lock_directory(folder: Path, owner: object) -> Callable[[], object]:
    """Locks a folder of checkpoints, without a file in it, for the first of several processes.

    Args:
      folder: is there.
      owner: the lock ends with it at the latest.

    Returns:
      A function that ends the lock.

    Raises:
      ConfigError: another holds it.
      OSError: the folder cannot be opened.
    """
    if jax.process_index():
        return lambda: None
    fd = os.open(folder, os.O_RDONLY)
    if not _flock(fd):
        os.close(fd)
        raise ConfigError(
            f"{folder}: another run writes its checkpoints here; wait until it has ended (or close"
            " its Checkpointer), or give another folder"
        )
    return weakref.finalize(owner, os.close, fd)


def _opened(folder: Path, made: list[Path]) -> int:
    """The descriptor of the folder's lock, which is held; adds the folders that it makes."""
    tries = 0
    while True:
        tries += 1
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made += [path for path in reversed(missing) if path not in made]
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):
            # who had made the folder may have just removed it, even while `mkdir` looked at it
            if tries > _TRIES or (os.path.lexists(folder) and not folder.is_dir()):
                raise
            continue
        if not _flock(fd):
            text = os.pread(fd, 4 * _LONGEST, 0).decode(errors="replace")  # anyone may write it
            owner = printable(text, _LONGEST).strip() or "another process"
            os.close(fd)
            raise ConfigError(
                f"out: {folder} is in use by {owner}; wait until it has ended, or choose another"
                " --out"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(folder / LOCK)):
                os.ftruncate(fd, 0)
                os.write(fd, _line().encode(errors="backslashreplace"))
                return fd
        os.close(fd)  # its owner has removed it in between: it locks nothing any more


def _flock(fd: int) -> bool:
    """Whether the lock is taken, or cannot be had on this file system."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        _no_locks(os.fstat(fd).st_dev, error.strerror)
    return True


@functools.cache  # once a file system
def _no_locks(device: int, reason: str) -> None:
    _log.warning(
        "lock: the file system of the run's folder has no locks (%s); see to it that one run alone"
        " writes there",
        reason,
    )


def _line() -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"pid {os.getpid()} on {socket.gethostname()} since {now}: {command}\n"
