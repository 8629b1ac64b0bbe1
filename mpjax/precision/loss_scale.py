"""Settings of the loss scale; the running state is in `mpjax.optim`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mpjax.errors import ConfigError

_SHORT = {
    "init": "init",
    "growth": "growth_factor",
    "backoff": "backoff_factor",
    "interval": "growth_interval",
    "hysteresis": "hysteresis",
    "min": "min_scale",
    "max": "max_scale",
}

_INT32_MAX = 2**31 - 1
# Normal numbers only: jitted arithmetic flushes subnormals, and 0 or inf would never come back.
_FLOAT32 = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class LossScaleSettings:
    """How the loss is scaled before the backward pass.

    Args:
      kind: `none`, `static` (always `init`) or `dynamic`.
      init: first scale.
      growth_factor: the scale is multiplied by it after `growth_interval` finite steps in a row.
      backoff_factor: the scale is multiplied by it at a non-finite step.
      growth_interval: finite steps between growths.
      hysteresis: non-finite steps until the first backoff after a growth; 1 backs off at once.
      min_scale: the scale never falls below it.
      max_scale: the scale never rises above it.

    Raises:
      ConfigError: a value outside its range.

    Example:
      >>> str(LossScaleSettings.parse("dynamic:init=1024,interval=200"))
      'dynamic:init=1024,interval=200'

    References:
      Micikevicius et al. 2018, Mixed Precision Training, section 3.2 (loss scaling).
    """

    kind: str = "none"
    init: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 1.0
    max_scale: float = 2.0**24

    def __post_init__(self) -> None:
        if self.kind not in ("none", "static", "dynamic"):
            raise ConfigError(
                f"loss scale: unknown kind {self.kind!r}; known: none, static:SCALE,"
                " dynamic:init=65536,interval=2000"
            )
        for short, field in _SHORT.items():
            value = getattr(self, field)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"loss scale: {short}={value} is not a positive finite number; give one"
                )
            number = int if field in ("growth_interval", "hysteresis") else float
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
        if self.growth_factor <= 1 or self.backoff_factor >= 1:
            raise ConfigError(
                f"loss scale: growth={self.growth_factor} must be above 1 and"
                f" backoff={self.backoff_factor} below 1; such as growth=2,backoff=0.5"
            )
        if self.kind == "dynamic" and not self.min_scale <= self.init <= self.max_scale:
            raise ConfigError(
                f"loss scale: init={self.init:g} lies outside min={self.min_scale:g} .."
                f" max={self.max_scale:g}; move init or the bounds"
            )

    @classmethod
    def parse(cls, text: str) -> LossScaleSettings:
        """Reads `none`, `static:1024` or `dynamic:init=...,growth=...,interval=...`."""
        kind, _, rest = text.partition(":")
        values: dict[str, float] = {}
        for part in filter(None, rest.split(",")):
            key, equals, number = part.partition("=")
            if kind == "static" and not equals:
                key, number = "init", part
            if kind == "none" or key not in _SHORT or (kind == "static" and key != "init"):
                raise ConfigError(
                    f"loss scale: unknown field {part!r} in {text!r}; write none, static:1024 or"
                    f" dynamic:KEY=VALUE,... with KEY in {' '.join(_SHORT)}"
                )
            try:
                values[_SHORT[key]] = float(number)
            except ValueError:
                raise ConfigError(
                    f"loss scale: {key}={number!r} is not a number; write {key}=1024"
                ) from None
        if kind == "static" and not values:
            raise ConfigError("loss scale: static needs its scale, such as static:1024")
        return cls(kind, **values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.kind == "none":
            return "none"
        if self.kind == "static":
            return f"static:{self.init!r}".removesuffix(".0")
        default = LossScaleSettings()
        parts = [
            f"{short}={getattr(self, field)!r}".removesuffix(".0")
            for short, field in _SHORT.items()
            if getattr(self, field) != getattr(default, field)
        ]
        return "dynamic:" + ",".join(parts) if parts else "dynamic"
