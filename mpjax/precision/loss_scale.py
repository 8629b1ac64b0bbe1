"""Settings of the loss scale; the running state is in `mpjax.optim`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.formats import Format

_SHORT = {
    "init": "init",
    "growth": "growth_factor",
    "backoff": "backoff_factor",
    "interval": "growth_interval",
    "hysteresis": "hysteresis",
    "min": "min_scale",
    "max": "max_scale",
    "format": "format",
    "c": "deviations",
    "decay": "decay",
    "pow2": "power_of_two",
    "groups": "groups",
}
_BOUNDED = ("init", "growth", "backoff", "interval", "min", "max")
# Which of them each kind reads.
_READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "static": ("init",),
    "dynamic": (*_BOUNDED, "hysteresis"),
    "logmax": (*_BOUNDED, "format", "c", "decay", "pow2"),
    "leaf": (*_BOUNDED, "hysteresis", "groups"),
}
_WHOLE = ("growth_interval", "hysteresis")
_NUMBERS = [key for key in _SHORT if key not in ("format", "decay", "pow2", "groups")]

_INT32_MAX = 2**31 - 1
# Normal numbers only: jitted arithmetic flushes subnormals, and 0 or inf would never come back.
_FLOAT32 = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))
_LONGEST = 0.999999  # decay: 1 - decay still has 4 digits in float32


@dataclasses.dataclass(frozen=True)
class LossScaleSettings:
    """How the loss is scaled before the backward pass.

    Args:
      kind: `none`, `static` (always `init`), `dynamic`, `logmax` (from the running mean and
        deviation of log2 max|gradient|) or `leaf` (one dynamic scale a group of weights).
      init: first scale; 2^16 if left out, 1 for `logmax`, which finds its own.
      growth_factor: the scale is multiplied by it after `growth_interval` finite steps in a row.
      backoff_factor: the scale is multiplied by it at a non-finite step.
      growth_interval: finite steps between growths.
      hysteresis: non-finite steps until the first backoff after a growth; 1 backs off at once.
      min_scale: the scale never falls below it.
      max_scale: the scale never rises above it.
      format: of `logmax`: the format whose largest number gradients stay below.
      deviations: of `logmax`: standard deviations between the mean and that number.
      decay: of `logmax`: of the running mean and variance.
      power_of_two: of `logmax`: whether the scale is rounded down to a power of two.
      groups: of `leaf`: patterns of weight paths, first match wins; none: each leaf is a group.

    Raises:
      ConfigError: a value outside its range, or one that this kind does not read.

    Example:
      >>> str(LossScaleSettings.parse("dynamic:init=1024,interval=200"))
      'dynamic:init=1024,interval=200'
      >>> LossScaleSettings.parse("logmax:format=e5m2,c=3").deviations
      3.0

    References:
      Micikevicius et al. 2018, Mixed Precision Training, section 3.2 (loss scaling).
    """

    kind: str = "none"
    init: float = None  # type: ignore[assignment]  # a float from __post_init__ on
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    format: str = "float16"
    deviations: float = 4.0
    decay: float = 0.99
    power_of_two: bool = True
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _READS:
            raise ConfigError(
                f"loss scale: unknown kind {self.kind!r}; known: none, static:SCALE,"
                " dynamic:init=65536,interval=2000, logmax:format=float16,c=4,"
                " leaf:groups=PATTERN|PATTERN"
            )
        if self.init is None:
            object.__setattr__(self, "init", 1.0 if self.kind == "logmax" else 2.0**16)
        for short in _NUMBERS:
            self._check_number(short)
        if self.growth_factor <= 1 or self.backoff_factor >= 1:
            raise ConfigError(
                f"loss scale: growth={self.growth_factor} must be above 1 and"
                f" backoff={self.backoff_factor} below 1; such as growth=2,backoff=0.5"
            )
        reads = _READS[self.kind]
        if "init" not in reads and self.init != 2.0**16:
            raise ConfigError(
                f"loss scale: {self.kind} does not read init={self.init:g}; leave it out or write"
                f" static:{self.init:g}"
            )
        if "min" in reads and not self.min_scale <= self.init <= self.max_scale:
            raise ConfigError(
                f"loss scale: init={self.init:g} lies outside min={self.min_scale:g} .."
                f" max={self.max_scale:g}; move init or the bounds"
            )
        self._check_logmax()
        self._check_groups()
        for short, field in _SHORT.items():
            default = self.__dataclass_fields__[field].default
            if short not in reads and default is not None and getattr(self, field) != default:
                raise ConfigError(
                    f"loss scale: {self.kind} does not read {short}={getattr(self, field)}; leave"
                    f" it out or choose {' or '.join(k for k, v in _READS.items() if short in v)}"
                )

    def _check_number(self, short: str) -> None:
        field = _SHORT[short]
        value = getattr(self, field)
        scalar = isinstance(value, np.integer | np.floating | jax.Array) and value.shape == ()
        if scalar and not isinstance(value, jax.core.Tracer):
            value = value.item()
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not (known and math.isfinite(value) and value > 0):
            raise ConfigError(
                f"loss scale: {short}={brief(value)} is not a positive finite number; give one"
            )
        number = int if field in _WHOLE else float
        if number(value) != value:
            raise ConfigError(f"loss scale: {short}={value} is not a whole number; round it")
        low, high = (1, _INT32_MAX) if number is int else _FLOAT32
        if not low <= value <= high:
            raise ConfigError(
                f"loss scale: {short}={value:g} is outside what its"
                f" {'int32' if number is int else 'float32'} state holds, {low:g} .. {high:g};"
                " give one inside"
            )
        object.__setattr__(self, field, number(value))

    def _check_logmax(self) -> None:
        object.__setattr__(self, "format", Format.of(self.format).name)
        if Format(self.format).kind != "float":
            raise ConfigError(
                f"loss scale: format={self.format} is not a floating-point format; gradients are"
                " scaled for float16, e5m2 or another"
            )
        if not (isinstance(self.decay, int | float) and 0 <= self.decay <= _LONGEST):
            raise ConfigError(
                f"loss scale: decay={self.decay} is not in 0 .. {_LONGEST}; write decay=0.99"
            )
        if self.power_of_two not in (0, 1):
            raise ConfigError(
                f"loss scale: pow2={self.power_of_two} is neither 0 nor 1; write pow2=1"
            )
        object.__setattr__(self, "decay", float(self.decay))
        object.__setattr__(self, "power_of_two", bool(self.power_of_two))

    def _check_groups(self) -> None:
        if not isinstance(self.groups, str | list | tuple):
            raise ConfigError(
                f"loss scale: groups={brief(self.groups)}; write a list of patterns, such as"
                " ['**/embed', '**']"
            )
        groups = (self.groups,) if isinstance(self.groups, str) else tuple(self.groups)
        for pattern in groups:
            invalid = not isinstance(pattern, str) or not pattern or set(pattern) & set(" =,|")
            if invalid or groups.count(pattern) > 1:
                raise ConfigError(
                    f"loss scale: the group {pattern!r} is empty, stands twice or holds one of"
                    " ' =,|'; write groups=PATTERN|PATTERN, such as groups=**/embed|**"
                )
        object.__setattr__(self, "groups", groups)

    @classmethod
    def parse(cls, text: object) -> LossScaleSettings:
        """Reads `none`, `static:1024`, `dynamic:init=...,growth=...`, `logmax:...`, `leaf:...`.

        Args:
          text: one of these, settings, or a loss scale, whose settings are meant.

        Raises:
          ConfigError: anything else.
        """
        if not isinstance(text, str):
            settings = getattr(text, "settings", text)
            if not isinstance(settings, cls):
                number = isinstance(text, int | float) and not isinstance(text, bool)
                cure = f"static:{text}" if number else "static:1024"
                raise ConfigError(
                    f"loss_scale: {brief(text)} is no loss scale; write none, {cure} or dynamic"
                )
            return settings
        kind, _, rest = text.partition(":")
        if kind not in _READS:
            return cls(kind)  # which raises
        keys = [key for key in _SHORT if key in _READS[kind]]
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if kind == "static" and not equals:
                key, value = "init", part
            if key not in keys:
                long = kind if len(keys) > 1 else "dynamic"
                known = " ".join(key for key in _SHORT if key in _READS[long])
                raise ConfigError(
                    f"loss scale: unknown field {part!r} in {text!r}; write none, static:1024 or"
                    f" {long}:KEY=VALUE,... with KEY in {known}"
                )
            values[_SHORT[key]] = _value(key, value)
        if kind == "static" and not values:
            raise ConfigError("loss scale: static needs its scale, such as static:1024")
        return cls(kind, **values)

    def __str__(self) -> str:
        if self.kind == "static":
            return f"static:{self.init!r}".removesuffix(".0")
        default = LossScaleSettings(self.kind)
        parts = [
            f"{short}={_text(getattr(self, field))}"
            for short, field in _SHORT.items()
            if getattr(self, field) != getattr(default, field)
        ]
        return f"{self.kind}:{','.join(parts)}" if parts else self.kind


def _value(key: str, text: str) -> str | float | tuple[str, ...]:
    if key == "format":
        return text
    if key == "groups":
        return tuple(text.split("|"))
    try:
        return float(text)
    except ValueError:
        example = {"c": "4", "decay": "0.99", "pow2": "1"}.get(key, "1024")
        raise ConfigError(
            f"loss scale: {key}={text!r} is not a number; write {key}={example}"
        ) from None


def _text(value: str | float | tuple[str, ...]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return "|".join(value)
    return repr(float(value)).removesuffix(".0")
