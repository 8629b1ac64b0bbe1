"""Processes that train together: each notices when another is lost, names it, and ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax._src import distributed  # the client that JAX's own multihost_utils use

from mpjax.errors import printable
from mpjax.train.processes import coordinator
from mpjax.typing import Json

Page: TypeAlias = Mapping[str, Json]  # what a process says of itself

ABSENT = 20  # seconds that the first process may come later than another
LATE = 300  # seconds that any process may come later than the first
SILENCE = 30.0  # seconds without a beat, after which a process is lost
_BEAT, _GRACE, _STALL, _SAID = 1.0, 3.0, 10.0, 15.0
_log = logging.getLogger("mpjax.train")
_PREFIX = "mpjax/peers/"


def initialize(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    wait: int | None = None,
) -> None:
    """Calls `jax.distributed.initialize`; the coordination service outlives the first process.

    Args:
      address: of the coordinator, as JAX's; JAX finds out what is left out.
      count: of processes.
      index: of this process.
      wait: seconds for which the first process may be absent, `ABSENT` by default, and the others,
        `LATE` by default.

    Raises:
      RuntimeError: the service cannot start, such as on a port that is in use, or nothing answers
        at its address.
      ValueError: as JAX's.
    """
    if address is not None and index:
        _wait_for(address, ABSENT if wait is None else wait)
    # It would take SIGTERM for itself, which is to end a process that does not train yet.
    jax.config.update("jax_enable_preemption_service", False)
    module = distributed._jax
    service = module.get_distributed_runtime_service
    module.get_distributed_runtime_service = _Coordinator
    try:
        with _awaited(address, count, index, LATE if wait is None else wait) as seconds:
            jax.distributed.initialize(address, count, index, initialization_timeout=seconds)
    finally:
        module.get_distributed_runtime_service = service


@contextlib.contextmanager
def _awaited(
    address: str | None, count: int | None, index: int | None, seconds: int
) -> Iterator[int]:
    """Says that others are awaited inside the block, and ends this process if they do not come.

    JAX's client would say nothing, and abort at the end. The block gets the seconds that it may
    take, a few more than the others have.
    """
    come, port = threading.Event(), address.rpartition(":")[2] if address else ""

    def state() -> str:
        if index == 0 and count is not None and port.isdigit():
            if (found := coordinator.connections(int(port))) is not None:
                return f"{found} of {count} processes have come"
        return "not all processes have come"

    def look() -> None:
        end_at = time.monotonic() + seconds
        while not come.wait(min(_SAID, max(0.0, end_at - time.monotonic()))):
            if time.monotonic() >= end_at:
                where = f" to {address}" if address else ""
                end(
                    2,
                    f"error: distributed: {state()}{where} in {seconds} s; see why the others did"
                    " not start, or give them longer with ,wait=SECONDS\n",
                )
            _log.warning("distributed: %s; waiting for up to %d s", state(), seconds)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield seconds + 10
    finally:
        come.set()


def _wait_for(address: str, seconds: float) -> None:
    """Waits until something listens at an address; JAX's client would wait without a word."""
    host, _, port = address.rpartition(":")
    end, why = time.monotonic() + seconds, "no answer"
    while time.monotonic() < end:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
                return
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(0.5)
    raise RuntimeError(f"nothing answers at {address} for {seconds:g} s: {why}")


class _Coordinator:
    """Stands in for jaxlib's service, which runs in a child."""

    def __init__(self, address: str, count: int, **settings: object) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("coordinator.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,  # what ends the first process does not end it too
        )  # fmt: skip
        path = [os.path.abspath(p) for p in sys.path]
        start = {"path": path, "address": address, "count": count, "settings": settings}
        self._tell(json.dumps(start))
        answer = json.loads(self._child.stdout.readline() or "{}")  # type: ignore[union-attr]
        if "up" not in answer:
            self._child.communicate()
            raise RuntimeError(answer.get("error", "the coordination service does not start"))

    def shutdown(self) -> None:
        """Ends the service."""
        with contextlib.suppress(BrokenPipeError):
            self._tell("shutdown")
        self._child.communicate()

    def _tell(self, line: str) -> None:
        self._child.stdin.write(f"{line}\n")  # type: ignore[union-attr]
        self._child.stdin.flush()  # type: ignore[union-attr]


class Roll:
    """The last pages of the other processes, and which of them is lost.

    Args:
      index: of this process; it is never lost to itself.
      count: of all.
      now: seconds of a clock.
    """

    def __init__(self, index: int, count: int, now: float) -> None:
        self._others = [i for i in range(count) if i != index]
        self._pages: dict[int, Page] = {}
        self._beaten = dict.fromkeys(self._others, now)
        self._left: dict[int, float] = {}
        self._round = self._looked = now

    def hear(self, pages: Mapping[int, Page], now: float) -> None:
        """Takes the pages of all processes, as one round of asking brought them."""
        for i in self._others:
            old, new = self._pages.get(i, {}), pages.get(i, {})
            if new.get("beat") != old.get("beat"):
                self._beaten[i] = now
            if "left" in new:
                self._left.setdefault(i, now)
        self._pages, self._round = dict(pages), now

    def lost(self, now: float) -> str:
        """Returns which process is lost and why; empty if none is."""
        if now - self._looked > _STALL:  # this process itself was suspended
            self._beaten = dict.fromkeys(self._others, now)
            self._round = now
        self._looked = now
        for i in self._others:
            page = self._pages.get(i, {})
            if "lost" in page:  # it has found out who, and left
                return str(page["lost"])
            # What fails in all of them alike, each says itself.
            if i in self._left and now - self._left[i] > _GRACE:
                return f"{self._name(i)} has left ({page['left']})"
        if now - self._round > SILENCE:  # the service is on the first process's machine
            return f"{self._name(0)} has not answered for {SILENCE:g} s"
        for i in self._others:
            ended = i in self._left or "done" in self._pages.get(i, {})
            if not ended and now - self._beaten[i] > SILENCE:
                return f"{self._name(i)} has not answered for {SILENCE:g} s"
        return ""

    def all_broken(self) -> bool:
        """Whether each of the others has failed too, and is still there."""
        pages = [self._pages.get(i, {}) for i in self._others]
        return all("broken" in page and "left" not in page for page in pages)

    def _name(self, i: int) -> str:
        host = self._pages.get(i, {}).get("host")
        return f"process {i} on {printable(str(host), 100)}" if host else f"process {i}"


class Peers:
    """Tells the other processes that this one runs, and ends it when one of them is lost.

    A thread writes and reads a page of each process in JAX's coordination service once a second;
    another looks at what came, so that a service that does not answer is noticed too. The end is
    one line on stderr and an exit code of 2, whatever the main thread waits for.

    Args:
      remedy: of the line.
    """

    def __init__(self, remedy: str) -> None:
        self._client: Any = distributed.global_state.client
        self._index, self._count = jax.process_index(), jax.process_count()
        self._remedy = remedy
        self._page: dict[str, Json] = {"host": socket.gethostname(), "beat": 0}
        self._roll = Roll(self._index, self._count, time.monotonic())
        self._stop, self._round = threading.Event(), threading.Condition()
        for run in (self._talk, self._look):
            threading.Thread(target=run, daemon=True).start()

    def leave(self, reason: str) -> None:
        """Tells the others why this process leaves before the end."""
        self._say(left=printable(reason, 500))

    def broken(self) -> None:
        """Waits for the watch to say who is lost, which would explain an error of this process.

        Returns when no process is, or when all have failed: then the error is its own.
        """
        self._say(broken=True)
        end = time.monotonic() + SILENCE + 3 * _BEAT
        while time.monotonic() < end and not self._roll.all_broken():
            time.sleep(0.1)

    def finish(self) -> None:
        """Waits until the others have ended too; afterwards no process is watched."""
        self._say(done=True)
        jax.distributed.shutdown()
        self._stop.set()

    def _say(self, **words: Json) -> None:
        self._page |= words
        with self._round:
            for _ in range(2):  # the round that is under way may have begun before
                self._round.wait(2 * _BEAT)

    def _talk(self) -> None:
        key = f"{_PREFIX}{self._index}"
        while not self._stop.is_set():
            self._page["beat"] += 1
            # Without a service there is no round, and `_look` sees that.
            with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError, RuntimeError):
                self._client.key_value_set(key, json.dumps(self._page), allow_overwrite=True)
                found = self._client.key_value_dir_get(_PREFIX)
                pages = {int(name.rpartition("/")[2]): json.loads(page) for name, page in found}
                self._roll.hear(pages, time.monotonic())
            with self._round:
                self._round.notify_all()
            self._stop.wait(_BEAT)

    def _look(self) -> None:
        while not self._stop.wait(_BEAT / 2):
            if text := self._roll.lost(time.monotonic()):
                self._say(lost=text)
                line = printable(f"error: distributed: {text}; {self._remedy}")
                end(2, f"{line}\n")


def end(code: int, line: str = "") -> None:
    """Ends the process now: without what waits for other processes at the end of Python."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a terminal that is gone
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))
    os._exit(code)


@contextlib.contextmanager
def watched(remedy: str, own: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Watches the other processes inside the block; call it once they have joined.

    Args:
      remedy: what to do when one is lost, for the line.
      own: errors that explain themselves: the others are told, and they are raised on. Any other
        is taken for the consequence of a lost process unless none is found lost. After an error,
        leave with `end`: Python's own end would wait for the others.
    """
    peers = Peers(remedy)
    try:
        yield
    except own as error:
        peers.leave(str(error) or type(error).__name__)
        raise
    except BaseException as error:
        peers.broken()
        peers.leave(f"{type(error).__name__}: {error}")
        raise
    peers.finish()
