"""Triggers: what makes a dynamic schedule leave its low precision, and what lets it return."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from mpjax.errors import ConfigError, is_whole
from mpjax.formats.checks import did_you_mean
from mpjax.typing import Settings

_WIDER = 1.25  # memory must be free by so much more than the headroom before a promotion
_LONGEST = 10  # doublings of the hold
_DEVIATIONS = 3.0  # of the lowest window's losses, which a rise must exceed as well


class Evidence(NamedTuple):
    """What a dynamic schedule knows at the end of a window of steps; Python numbers.

    Args:
      high: whether the high precision ran in this window.
      windows: whole windows since the last switch.
      trips: promotions so far.
      skips: share of the window's steps that were skipped.
      loss: mean of the window's finite losses, NaN if there is none.
      best: mean loss of the lowest window before, inf in the first one.
      spread: standard deviation of the losses of that window.
      underflow: share of the backward pass's numbers that are zero or too small for the low
        precision's format, NaN if it is not measured.
      free: GB free on the fullest device, inf if they are not asked for.
    """

    high: bool
    windows: int
    trips: int
    skips: float
    loss: float
    best: float
    spread: float
    underflow: float = math.nan
    free: float = math.inf


class Verdict(NamedTuple):
    """Whether to switch, and why; a reason without a switch says what prevented it."""

    switch: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Triggers:
    r"""When a dynamic schedule switches; looked at after every `window` steps.

    It goes up to the high precision when, in a window, the share of skipped steps reaches `skips`
    (all steps in the first window, where a loss scale finds its place), no loss was finite, the
    mean loss rises above $b + \max(r\,|b|,\ 3\sigma_b)$ with $b$ the mean and $\sigma_b$ the
    standard deviation of the lowest window so far, or underflow reaches `underflow`. It returns
    when all of them are below half of that, after `hold` windows at the first promotion, twice as
    many at each further one, so that it does not flap.

    Args:
      window: steps between decisions.
      skips: share of the window's steps, in (0, 1].
      rise: $r$, relative rise of the loss.
      hold: windows that it stays high at least.
      underflow: share in (0, 1] of the numbers of the backward pass that are zero or would be zero
        in the low precision's format, measured by `mpjax.monitor` once a window; 0 does not
        measure.
      headroom: GB that the high precision must leave free on each device: with less it goes low;
        0 does not ask. What is free is not the run's to repeat: with it, a run that is resumed may
        switch elsewhere.

    Raises:
      ConfigError: a value out of its range.

    Example:
      >>> triggers = Triggers.parse("window=10,skips=0.5")
      >>> triggers.judge(Evidence(False, 3, 0, skips=0.6, loss=2.0, best=1.9, spread=0.1))
      Verdict(switch=True, reason='60% of the last 10 steps were skipped, limit 50%')
      >>> str(triggers)
      'window=10,skips=0.5'
    """

    window: int = 20
    skips: float = 0.3
    rise: float = 0.2
    hold: int = 3
    underflow: float = 0.0
    headroom: float = 0.0

    def __post_init__(self) -> None:
        for name, whole, low, high in (
            ("window", True, 2, 2**20), ("skips", False, 0, 1), ("rise", False, 0, math.inf),
            ("hold", True, 1, 2**20), ("underflow", False, 0, 1), ("headroom", False, 0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            number = is_whole(value) or isinstance(value, float) and math.isfinite(value)
            fits = number and low <= value <= high and (not whole or int(value) == value)
            if not fits or (value == 0 and name in ("skips", "rise")):
                kind = "a whole number" if whole else "a number"
                reach = f"{low} .. {high}" if high < math.inf else f"{low} or above"
                above = ", not 0" if name in ("skips", "rise") else ""
                raise ConfigError(
                    f"precision schedule: {name}={value} must be {kind} of {reach}{above}; the"
                    f" default is {name}={self.__dataclass_fields__[name].default}"
                )
            object.__setattr__(self, name, int(value) if whole else float(value))

    @classmethod
    def parse(cls, text: str) -> Triggers:
        """Reads `window=20,skips=0.3,rise=0.2,hold=3,underflow=0.5,headroom=2`, or some of them."""
        known = [field.name for field in dataclasses.fields(cls)]
        found: Settings = {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.partition("=")
            if name not in known or name in found:
                hint = "stands twice" if name in found else "is unknown"
                guess = "" if name in found else did_you_mean(name, known)
                raise ConfigError(
                    f"precision schedule: {name!r} {hint} in {text!r}; {guess}write NAME=NUMBER"
                    f" with NAME in {' '.join(known)}"
                )
            try:
                found[name] = float(value)
            except ValueError:
                default = cls.__dataclass_fields__[name].default
                raise ConfigError(
                    f"precision schedule: {name}={value!r} in {text!r} is no number; write"
                    f" {name}={default}"
                ) from None
        return cls(**found)

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return ",".join(f"{f.name}={getattr(self, f.name):g}" for f in changed)

    def judge(self, evidence: Evidence) -> Verdict:
        """Returns whether to switch after a window, and why."""
        margin = max(self.rise * abs(evidence.best), _DEVIATIONS * evidence.spread)
        return self._down(evidence, margin) if evidence.high else self._up(evidence, margin)

    def _up(self, evidence: Evidence, margin: float) -> Verdict:
        last, highest = f"the last {self.window} steps", evidence.best + margin
        # In the first window a dynamic loss scale skips steps until it has found its level.
        limit = 1.0 if math.isinf(evidence.best) else self.skips
        reason = ""
        if evidence.skips >= limit:
            reason = f"{evidence.skips:.0%} of {last} were skipped, limit {limit:.0%}"
        elif math.isnan(evidence.loss):
            reason = f"no loss of {last} was finite"
        elif evidence.loss > highest:
            reason = f"the loss rose to {evidence.loss:.4g} over {last}, limit {highest:.4g}"
        elif self.underflow and evidence.underflow >= self.underflow:
            share = f"{evidence.underflow:.0%}"
            reason = f"{share} of the backward pass underflows, limit {self.underflow:.0%}"
        if reason and evidence.free < _WIDER * self.headroom:
            return Verdict(
                False,
                f"{reason}; stays, because only {evidence.free:.2f} GB are free and headroom="
                f"{self.headroom:g} asks for {_WIDER * self.headroom:g} before a promotion",
            )
        return Verdict(bool(reason), reason)

    def _down(self, evidence: Evidence, margin: float) -> Verdict:
        if evidence.free < self.headroom:
            return Verdict(True, f"{evidence.free:.2f} GB are free, headroom {self.headroom:g} GB")
        hold = self.hold * 2 ** min(max(evidence.trips - 1, 0), _LONGEST)
        calm = (
            evidence.windows >= hold
            and evidence.skips <= self.skips / 2
            and evidence.loss <= evidence.best + margin / 2  # False for NaN
            and not (self.underflow and evidence.underflow > self.underflow / 2)
        )
        if not calm:
            return Verdict(False)
        return Verdict(
            True,
            f"calm again: {evidence.skips:.0%} skipped, loss {evidence.loss:.4g},"
            f" {evidence.windows} windows after the last switch",
        )
