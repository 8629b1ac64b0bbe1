"""One run: several processes that train together, and the folder that they alone write."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax

import mpjax
from common.command_line import imported
from mpjax.errors import ConfigError, TrainingStopped
from mpjax.train import environment
from mpjax.train.checkpoint import hold_folder
from mpjax.train.processes import code_hash, end, initialize, of_first, require_agreement, watched
from mpjax.train.report import versions
from mpjax.typing import Json, Settings

# Exceptions that an experiment's command line reports in one line.
EXPLAINED = (ConfigError, TrainingStopped, OSError, KeyboardInterrupt, SystemExit)
_LOST = "start all processes again with --resume latest"


def join(processes: str) -> None:
    """Makes this process one of several that train together; empty text does nothing.

    Args:
      processes: `auto`, or `COORDINATOR:PORT,INDEX,COUNT` with this process's index, and
        `,wait=SECONDS` for those that come late.

    Raises:
      ConfigError: malformed, or no cluster was found.
    """
    if not processes:
        return
    given = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)(?:,wait=([1-9]\d{0,5}))?", processes)
    if processes != "auto" and (given is None or int(given[2]) >= int(given[3])):
        raise ConfigError(
            f"distributed: {processes!r} is malformed; write auto, or COORDINATOR:PORT,INDEX,COUNT"
            " such as node0:1234,0,2"
        )
    try:
        if given is None:
            initialize()
        else:
            wait = int(given[4]) if given[4] else None
            initialize(given[1], int(given[3]), int(given[2]), wait)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"distributed: {processes!r} does not start ({reason}); write"
            " COORDINATOR:PORT,INDEX,COUNT such as node0:1234,0,2, and ,wait=300 for a late one"
        ) from None


def started(config: Json) -> Settings:
    """Returns what must be the same in all processes of a run: settings, code, environment."""
    settings = dataclasses.asdict(config)
    del settings["distributed"]  # names each process
    page = {
        "imports": imported(), "settings": settings, "versions": versions(),
        "environment": environment(),
        "code": code_hash(Path(mpjax.__file__).parent, Path(__file__).parents[1]),
    }  # fmt: skip
    return json.loads(json.dumps(page, default=str))


@contextlib.contextmanager
def one_run(config: Json, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Joins the other processes and compares how they were started, and holds the folder `out`.

    A process that is lost from then on ends the others within a minute; one line says who it was.
    Settings that have no `distributed` or no `out` need neither.

    Args:
      config: settings of an experiment.
      check: raises what keeps this process from running; the others hear of it.

    Raises:
      ConfigError: they cannot be joined, or were started differently; another run holds the
        folder, or it cannot be written; or `check` raised it.
    """
    several = bool(getattr(config, "distributed", ""))
    with contextlib.ExitStack() as stack:
        if several:
            join(config.distributed)
            stack.enter_context(watched(_LOST, EXPLAINED))
        check()  # before anything is compiled
        if several:
            require_agreement(started(config))
        wrong = ""
        if hasattr(config, "out") and not (several and jax.process_index()):
            try:
                stack.enter_context(hold_folder(config.out))
            except ConfigError as error:
                wrong = str(error)
        if wrong := of_first(wrong) if several else wrong:
            raise ConfigError(wrong)
        yield


def leave(code: int) -> NoReturn:
    """Ends the process after an error; one of several does not wait for the others."""
    if jax.distributed.is_initialized():
        end(code)
    sys.exit(code)
