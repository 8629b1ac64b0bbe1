"""The progress bar of a run, and plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpjax.typing import Settings


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Ignores what a terminal raises that is closed, gone or lacks a character."""
    try:
        yield
    except (OSError, ValueError):
        pass
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # rich's answer to a broken pipe
            raise


def describe(record: Settings) -> str:
    """Returns one line about a step: loss, speed, loss scale, skips.

    Example:
      >>> describe({"loss": 2.5, "tokens_per_s": 1234.5, "loss_scale": 65536.0, "skipped": 1})
      'loss 2.5000 · 1,234 tokens/s · scale 2^16 · 1 skipped'
    """
    parts = [f"loss {record['loss']:.4f}", f"{record['tokens_per_s']:,.0f} tokens/s"]
    scale = record.get("loss_scale", 1.0)
    if scale != 1:
        power = math.log2(scale)
        parts.append(f"scale 2^{power:.0f}" if power.is_integer() else f"scale {scale:g}")
    if record.get("skipped"):
        parts.append(f"{record['skipped']} skipped")
    return " · ".join(parts)


class ProgressBar:
    """Shows steps, loss, tokens/s, ETA, loss scale and skips while a run goes on.

    What the terminal cannot show is left out; it never stops the run.

    Args:
      steps: of the whole run.
      start: steps done before.
      console: where to; standard error by default.
      label: what stands before the bar.
      lines: how many lines to print where there is no terminal.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        console: Console | None = None,
        label: str = "train",
        lines: int = 20,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        self._label, self._every = label, max(1, -(-steps // lines))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
        )
        # Drawn by `update`, once a second: a drawing costs milliseconds, and a thread of its own
        # takes them from the training step on a small machine.
        self._bar = Progress(*columns, console=self._console, auto_refresh=False)
        self._last: Settings | None = None
        self._drawn = -math.inf
        self._task = self._bar.add_task(label, total=steps, completed=start, line="compiling")

    def __enter__(self) -> ProgressBar:
        if self._live:
            with _shown():
                self._bar.start()
        return self

    def update(self, record: Settings) -> None:
        """Shows a record."""
        if "loss" not in record:
            return
        if self._live:
            self._last = record
            if time.monotonic() - self._drawn >= 1:
                self._draw()
        elif record["step"] % self._every == 0:
            line = f"{self._label} {record['step']} · {describe(record)}"
            with _shown():
                self._console.print(line)

    def _draw(self) -> None:
        if self._last is not None:
            step, line = self._last["step"], describe(self._last)
            with _shown():
                self._bar.update(self._task, completed=step, line=line, refresh=True)
        self._drawn = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._draw()  # the last step
            with _shown(), contextlib.suppress(IndexError):  # rich's, where it could not start
                self._bar.stop()
