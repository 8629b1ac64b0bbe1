"""What a child of the fuzzer measures and forbids while a reader is at work."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Events of Python's audit by which a file would get something run.
_RUNS = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "pickle.find_class", "socket.connect", "ctypes.dlopen",
)  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
            "os.truncate", "shutil.rmtree")  # fmt: skip


class Watch:
    """Runs readers, one file at a time, and says what each took and tried.

    Args:
      most: bytes of addresses that the process may have beyond what it has now.
    """

    def __init__(self, most: int) -> None:
        limit = _status("VmSize") + most
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._run: list[str] = []
        self._written: list[str] = []
        self._folder = ""
        # Now: it is found by writing there, which the audit would wait for for ever.
        self._temporary = os.path.realpath(tempfile.gettempdir())
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._folder:
            return
        if event == "subprocess.Popen" and _is_ours(arguments[1]):
            return
        if event in _RUNS:
            self._run.append(f"{event} {arguments}"[:200])
        elif event in _CHANGES:
            self._note(arguments[0])
        elif event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._note(arguments[0])

    def _note(self, path: Any) -> None:
        if isinstance(path, int):  # open already, as a pipe is
            return
        path = os.path.realpath(path) if isinstance(path, str | bytes | Path) else str(path)
        allowed = (self._folder, self._temporary, os.devnull)
        if not os.fsdecode(path).startswith(allowed):
            self._written.append(str(path))

    def outcome(self, read: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
        """Returns what became of a reader: read, refused, or raw with its traceback."""
        from mpjax.errors import ConfigError

        self._run, self._written = [], []
        found: dict[str, Any] = {"outcome": "read"}
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before, begun = _status("VmRSS"), time.process_time()
        self._folder = os.path.realpath(folder)
        try:
            read(folder)
        except ConfigError as error:
            found = {"outcome": "refused", "message": str(error)}
        except BaseException as error:  # a Rust panic is no Exception
            last = "".join(traceback.format_exception(error))[-900:]
            found = {"outcome": "raw", "message": repr(error)[:200], "traceback": last}
        finally:
            self._folder = ""
        seconds = time.process_time() - begun  # other work on the machine is no reader's
        grown = max(0, _status("VmHWM") - before)
        return found | {
            "seconds": seconds, "grown": grown, "run": self._run, "written": self._written,
        }  # fmt: skip


def _is_ours(command: Any) -> bool:
    """Whether a process is one of those in which the package tries what it does not trust."""
    programs = ("template_child.py", "tokenizer_child.py")
    return len(command) == 3 and str(command[2]).endswith(programs) and command[1] == "-I"


def _status(name: str) -> int:
    """A figure of this process from /proc, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: the fuzzer needs Linux")
