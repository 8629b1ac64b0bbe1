"""SIGTERM, SIGHUP and Ctrl-C as a flag that a loop polls; a second Ctrl-C leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

# Windows has no SIGHUP.
_HANGUP = getattr(signal, "SIGHUP", None)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *filter(None, [_HANGUP]))


class Interrupt:
    """Turns SIGTERM, SIGINT and SIGHUP into a request to stop, for as long as the block lasts.

    The first signal sets `requested` and says so on stderr; the loop saves and leaves. A second
    SIGINT ends the process at once with status 130, without waiting for any thread. The others
    never count as a second one: `make` and job schedulers send SIGTERM along with Ctrl-C, and a
    terminal that is closed sends SIGHUP. SIGHUP is left alone where it is ignored, as under
    `nohup`. Signals are also read from a wake-up socket by a thread, so that the second Ctrl-C
    works while the main thread is inside a compilation or a device computation.

    Off the main thread Python allows no signal handlers: there the block does nothing and
    `requested` stays None.

    Example:
      >>> with Interrupt() as interrupt:
      ...     for step in range(3):
      ...         if interrupt.requested:
      ...             break
      >>> step
      2
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> str | None:
        """The name of the first signal that came ("SIGTERM", "SIGINT", "SIGHUP"), or None."""
        return self._requested

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # set_wakeup_fd demands it
        self._watcher = threading.Thread(target=self._watch, name="interrupt", daemon=True)
        self._watcher.start()
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in _SIGNALS
            if number != _HANGUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._previous = {}
        self._writer.close()  # the watcher reads the end of the stream and returns
        self._watcher.join()
        self._reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested = signal.Signals(number).name

    def _watch(self) -> None:
        presses, announced = 0, False
        while block := self._reader.recv(16):
            for number in filter(_SIGNALS.__contains__, block):
                presses += number == signal.SIGINT
                if presses > 1:
                    os._exit(130)
                if not announced:
                    announced = True
                    name = signal.Signals(number).name
                    # not sys.stderr: its lock may be held by the thread that was interrupted
                    line = f"\n{name}: stopping; Ctrl-C again leaves at once\n"
                    with contextlib.suppress(OSError):  # the terminal may be gone
                        os.write(2, line.encode())
