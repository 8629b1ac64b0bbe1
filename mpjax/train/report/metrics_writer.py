"""Where a run's numbers go: JSON lines, TensorBoard, and Weights & Biases when asked."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np

from mpjax.errors import ConfigError, brief, explains_calls, is_whole, need
from mpjax.files import NO_FOLLOW, write_file, write_text
from mpjax.typing import Json, Settings

METRICS = "metrics.jsonl"
WANDB_ID = "wandb-run-id.txt"
_log = logging.getLogger("mpjax.train")
# JSON has no such numbers; as text, as in Protocol Buffers' JSON, float() and pandas read them.
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def to_line(record: Mapping[str, Json]) -> str:
    """Returns a record as one line of valid JSON.

    A number that is not finite is written as "NaN", "Infinity" or "-Infinity", in quotes.

    Example:
      >>> to_line({"step": 3, "loss": math.nan, "grad_norm": math.inf})
      '{"step": 3, "loss": "NaN", "grad_norm": "Infinity"}'
    """
    floats = {k: v for k, v in record.items() if isinstance(v, float)}
    odd = {k: json.dumps(v) for k, v in floats.items() if not math.isfinite(v)}
    return json.dumps({**record, **odd})


def read_metrics(path: str | Path) -> list[Settings]:
    """Returns the records of a `metrics.jsonl`; lines that are none are left out.

    What `to_line` wrote as text because it is not finite is a float again.

    Raises:
      ConfigError: the file is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no metrics here; give the folder of a run")
    return [record for _, record in _lines(path) if record is not None]


def _lines(path: Path) -> Iterator[tuple[bytes, Settings | None]]:
    """Each line that is not blank, and its record; None if it is no JSON object."""
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                found = json.loads(line.decode())
            except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested deeply
                found = None
            if isinstance(found, dict):
                yield line, {k: float(v) if v in _NOT_FINITE else v for k, v in found.items()}
            else:
                yield line, None


def plain(record: Mapping[str, object]) -> Settings:
    """Returns a record as Python's own numbers and texts; scalars of JAX and NumPy are read.

    Raises:
      ConfigError: no `step`, or a value that is neither a number nor a text.

    Example:
      >>> import numpy as np
      >>> plain({"step": np.int32(3), "loss": np.float32(0.5)})
      {'step': 3, 'loss': 0.5}
    """
    if not isinstance(record, Mapping) or "step" not in record:
        raise ConfigError(f"metrics: {brief(record)} has no step; write {{'step': n, ...}}")
    found = {}
    for name, value in record.items():
        if getattr(value, "shape", None) == () and hasattr(value, "dtype"):
            value = np.asarray(value).item()
        if not isinstance(value, bool | int | float | str | None):
            raise ConfigError(
                f"metrics: {name!r} is {brief(value)}; write one number or text a name, such as"
                " its mean"
            )
        found[name] = value
    if not is_whole(found["step"]):
        raise ConfigError(f"metrics: step {brief(found['step'])} is no whole number; give one")
    return found


def keep_until(path: Path, step: int) -> None:
    """Drops the records after a step, which a resumed run writes again, and keeps the others.

    Lines that hold no record with a step go to `NAME.damaged` beside it, with one logged line. A
    last line that was cut off is what every kill leaves, and is dropped.
    """
    lines, damaged, first = list[bytes](), list[bytes](), 0
    for number, (line, record) in enumerate(_lines(path), 1):
        if record is not None and type(record.get("step")) is int:
            if record["step"] <= step:
                lines.append(line.rstrip(b"\r\n") + b"\n")
        elif not (line.startswith(b"{") and line.isascii() and line.decode().isprintable()):
            first = first or number
            damaged.append(line)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with open(aside, "ab", opener=lambda name, flags: os.open(name, flags | NO_FOLLOW)) as file:
            file.writelines(damaged)
        _log.warning(
            "%s: %d lines are no records, the first is line %d; moved to %s, the others are kept",
            path, len(damaged), first, aside.name,
        )  # fmt: skip
    write_file(path, lambda file: file.writelines(lines))


def open_after(path: Path, step: int) -> TextIO:
    """Returns a log to append to, without its records after a step; see `keep_until`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        keep_until(path, step)
    return path.open("a")


def import_wandb() -> ModuleType:
    """Returns the module wandb.

    Raises:
      ConfigError: it is not installed.
    """
    return need("wandb", "wandb", "wandb", " or leave --wandb out")


def begin_wandb(
    project: str, settings: Mapping[str, object], out: Path, *, goes_on: bool
) -> Any:  # fmt: skip
    """Returns a run in Weights & Biases, whose files are below `out`.

    A run that goes on is the same one there, by the id in `out`.

    Args:
      project: its name; empty for None in place of a run.
      settings: flat settings.
      out: folder of the run.
      goes_on: whether the run resumes.

    Raises:
      ConfigError: wandb is not installed, or cannot be reached.
    """
    if not project:
        return None
    module: Any = import_wandb()
    out.mkdir(parents=True, exist_ok=True)  # wandb would take another folder
    path, known = out / WANDB_ID, dict[str, str]()
    if goes_on and path.is_file():
        known = {"id": path.read_text(encoding="utf-8").strip(), "resume": "allow"}
    try:
        run = module.init(project=project, config=dict(settings), dir=str(out), **known)
        write_text(path, f"{run.id}\n")
        return run
    except module.Error as error:
        why = str(error).rstrip(".")
        raise ConfigError(
            f"wandb: {why}; run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
        ) from None


class MetricsWriter:
    """Writes one record a step to `metrics.jsonl` and every few steps to TensorBoard.

    Args:
      out: folder of the run; it is made if it is not there.
      settings: flat settings, which TensorBoard shows as HParams.
      start: step that the run resumes from; later records of an earlier try are dropped.
      every: steps between points in TensorBoard and Weights & Biases.
      wandb: project in Weights & Biases, empty for none, or a run there, of `begin_wandb`;
        WANDB_MODE=offline needs no network. A run that resumes goes on there too.

    Raises:
      ConfigError: wandb is asked for and not installed, or cannot be reached.
    """

    @explains_calls
    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, object],
        *,
        start: int = 0,
        every: int = 10,
        wandb: Any = "",
    ) -> None:
        if not is_whole(every, 1):
            raise ConfigError(f"metrics: every={brief(every)}; give a whole number of steps")
        if isinstance(wandb, str):
            wandb = begin_wandb(wandb, settings, Path(out), goes_on=start > 0)
        self._wandb = wandb
        from tensorboardX import SummaryWriter  # here: 0.3 s that `--help` need not wait for
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import hparams

        self._every = every
        self._file = open_after(Path(out) / METRICS, start)
        # 10 s, not 120: what a kill may cost, and how late the curves are on the screen
        self._board = SummaryWriter(
            str(Path(out) / "tensorboard"), purge_step=start + 1, flush_secs=10
        )
        self._summary = Summary
        shown = {k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()}
        for summary in hparams(shown, {"validation_loss": math.nan}):
            self._board.file_writer.add_summary(summary)

    def write(self, record: Mapping[str, object]) -> None:
        """Writes one record, numbers and texts by name; it holds at least `step`.

        Raises:
          ConfigError: as `plain`; nothing of the record is written.
        """
        record = plain(record)
        self._file.write(to_line(record) + "\n")
        self._file.flush()
        step = record["step"]
        if step % self._every and "validation_loss" not in record:
            return
        shown = ((k, v) for k, v in record.items() if k != "step")
        numbers = {k: v for k, v in shown if v is not None and not isinstance(v, str)}
        # One event for all: `add_scalar` costs three times as much, and warns of each NaN.
        points = [self._summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        self._board.file_writer.add_summary(self._summary(value=points), step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flushes and closes all of them."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
