"""Steps of several programs that take turns in one process, and their times beside one of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

Step: TypeAlias = Callable[[], float]  # takes one step, returns the loss before it


class Turns(NamedTuple):
    """Losses and seconds of each program, in order."""

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """The time of a program over that of another in the same round: median, 10 and 90 %."""
        each = np.array(self.seconds[name]) / np.array(self.seconds[to])
        low, middle, high = np.percentile(each, [10, 50, 90])
        return float(middle), float(low), float(high)

    def rows(self, to: str, tokens: int) -> list[list[str]]:
        """Name, ms a step, tokens a second, time over that of one of them, first and last loss.

        Args:
          to: name of that one.
          tokens: of a step.
        """
        found = []
        for name, taken in self.seconds.items():
            middle, low, high = self.ratio(name, to)
            found.append([
                name, f"{1e3 * np.median(taken):.0f}", f"{tokens / np.median(taken):,.0f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{self.losses[name][0]:.6f}",
                f"{self.losses[name][-1]:.4f}",
            ])  # fmt: skip
        return found

    def spread_of_first(self, ending: str) -> float:
        """How far the first losses of the programs lie apart whose names end so."""
        return float(np.ptp([x[0] for name, x in self.losses.items() if name.endswith(ending)]))


HEAD = ["side", "ms a step", "tokens/s", "time / {} (10 to 90 %)", "first loss", "last"]


def take_turns(steps: dict[str, Step], warm: int, rounds: int) -> Turns:
    """Times steps in random order, after some that are not timed."""
    losses = {name: [run() for _ in range(warm)] for name, run in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            began = time.perf_counter()
            losses[name].append(steps[name]())
            seconds[name].append(time.perf_counter() - began)
    return Turns(losses, seconds)
