"""A sick terminal costs what it cannot show, and nothing else."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

import pytest
from rich.console import Console

from mpjax.train.report.progress import ProgressBar
from mpjax.train.report.terminal import SteadyStream, steady_terminal

RECORD = {"step": 1, "loss": 2.5, "tokens_per_s": 9.0}


class Refusing(io.StringIO):
    """A stream whose writes and flushes raise; `tty` says what isatty answers."""

    def __init__(self, error: BaseException, tty: bool = False) -> None:
        super().__init__()
        self.error, self.tty = error, tty

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return self.tty


def ascii_stream() -> Any:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


def closed() -> Any:
    stream = ascii_stream()
    stream.close()
    return stream


SICK = {
    "broken pipe": lambda: Refusing(BrokenPipeError(errno.EPIPE, "Broken pipe")),
    "terminal is gone": lambda: Refusing(OSError(errno.EIO, "Input/output error")),
    "disk is full": lambda: Refusing(OSError(errno.ENOSPC, "No space left on device")),
    "closed": closed,
    "ASCII": ascii_stream,
}


@pytest.mark.parametrize("sick", SICK.values(), ids=SICK.keys())
def test_what_a_stream_refuses_is_lost_or_escaped(sick):
    stream = sick()
    with pytest.raises((OSError, ValueError)):  # the plain way
        stream.write("0.5 ± 0.1 · 3")
    steady = SteadyStream(stream)
    assert steady.write("0.5 ± 0.1 · 3") == 13
    steady.flush()
    print("more ·", file=steady)
    if sick is ascii_stream:
        assert stream.buffer.getvalue() == b"0.5 \\xb1 0.1 \\xb7 3more \\xb7\n"


def test_a_name_that_is_no_utf8_can_be_shown():
    raw = io.BytesIO()
    steady = SteadyStream(io.TextIOWrapper(raw, encoding="utf-8", write_through=True))
    steady.write("a \udcff ö")
    assert raw.getvalue() == b"a \\udcff \xc3\xb6"


def test_all_else_is_the_streams_own():
    inner = io.StringIO()
    steady = SteadyStream(inner)
    steady.write("ö")
    assert inner.getvalue() == "ö" and not steady.isatty() and steady.getvalue() == "ö"


def test_a_broken_pipe_leaves_nothing_to_fail_at_the_end():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    steady = SteadyStream(stream)
    steady.write("lost")
    steady.flush()
    os.write(writer, b"what a library prints")
    stream.flush()
    stream.close()  # raises where the buffer still waits for the pipe


def test_the_streams_are_put_back(monkeypatch):
    for before in ((io.StringIO(), io.StringIO()), (None, None)):
        monkeypatch.setattr(sys, "stdout", before[0])
        monkeypatch.setattr(sys, "stderr", before[1])
        with pytest.raises(KeyError), steady_terminal():
            print("·")
            print("·", file=sys.stderr)
            Console().print("table ·")
            assert before[0] is None or sys.stdout is not before[0]
            raise KeyError
        assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("sick", SICK.values(), ids=SICK.keys())
def test_a_progress_bar_stops_no_run(sick, live):
    stream = sick()
    stdout = os.dup(1)  # rich sends it nowhere where a pipe broke
    try:
        console = Console(file=stream, force_terminal=live, width=80)
        with ProgressBar(2, console=console, lines=2) as bar:
            for step in (1, 2):
                bar.update(RECORD | {"step": step})
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def test_who_asks_to_leave_while_a_bar_is_drawn_does():
    bar = ProgressBar(1, console=Console(file=Refusing(SystemExit(3))))
    with pytest.raises(SystemExit, match="3"):
        bar.update(RECORD)
