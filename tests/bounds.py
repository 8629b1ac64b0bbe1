"""Runs a reader of a hostile file so that a missing check fails a test and not the machine."""

from __future__ import annotations

import contextlib
import faulthandler
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpjax.errors import ConfigError

_ADDRESSES = 2**31  # more than the process has, so that an allocation fails instead of the machine
_SECONDS = 20  # a hang is none of a slow machine's


def _bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _hangs(*_: Any) -> None:
    raise TimeoutError("the reader hangs")


@contextlib.contextmanager
def bounded(path: Path) -> Iterator[None]:
    """Fails where reading a file takes more memory than 10 times its bytes and 100 MB, or hangs."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured on Linux")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, _hangs)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _bytes("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_bytes("VmSize") + _ADDRESSES, hard))
    signal.alarm(_SECONDS)
    faulthandler.dump_traceback_later(3 * _SECONDS, exit=True)  # an alarm does not reach C
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = _bytes("VmHWM") - before
    assert grown <= 10 * path.stat().st_size + 100 * 10**6, f"{grown / 1e6:.0f} MB"


@contextlib.contextmanager
def refused(path: Path, match: str) -> Iterator[None]:
    """Fails unless a file is refused within bounds, in one short line that a terminal shows."""
    with bounded(path), pytest.raises(ConfigError, match=match) as error:
        yield
    assert str(error.value).isprintable() and len(str(error.value)) <= 2000
