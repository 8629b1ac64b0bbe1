"""Output streams that never raise: what cannot be written is dropped, and training goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO

# The reader is gone for good; a full disk behind a log file may have room again.
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)


class SteadyStream:
    """A text stream whose writes never raise.

    A character that its encoding lacks is written as an escape; what a closed stream, a broken
    pipe or a terminal that is gone refuses is dropped. All else is the stream's own.

    Args:
      stream: such as `sys.stdout`.

    Example:
      >>> import io
      >>> raw = io.BytesIO()
      >>> stream = SteadyStream(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
      >>> _ = stream.write("1 ± 2"), stream.close(), stream.write("lost")
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, or as much of it as can be shown; returns its length."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            name = self._stream.encoding
            self.write(text.encode(name, "backslashreplace").decode(name))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _lose(self, error: OSError | ValueError) -> None:
        if getattr(error, "errno", None) in _GONE:
            # What waits in its buffer would fail again at the end of the process, and so would
            # whatever a library prints.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def steady_terminal() -> Iterator[None]:
    """Makes `sys.stdout` and `sys.stderr` steady inside the block."""
    before = sys.stdout, sys.stderr
    steady = [None if stream is None else SteadyStream(stream) for stream in before]
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        for stream in steady:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
