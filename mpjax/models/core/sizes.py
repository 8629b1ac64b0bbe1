"""Configurations of models: ranges of fields, and named sizes with some fields changed."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.typing import Settings

C = TypeVar("C", bound="ModelConfig")
FieldValue: TypeAlias = float | str | Sequence[str] | Sequence[int]

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "COUNTS": (lambda n: not n < 1, "be at least 1; raise it"),
    "OPTIONAL": (lambda x: 0 <= x < math.inf, "not be negative; give a finite number, 0 is off"),
    "POSITIVE": (lambda x: 0 < x < math.inf, "be positive; give a finite number"),
    "RATES": (lambda x: 0 <= x < 1, "be in [0, 1); lower it"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; each kind names its fields by the range that they must be in.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    POSITIVE: ClassVar[tuple[str, ...]] = ()
    RATES: ClassVar[tuple[str, ...]] = ()
    CHOICES: ClassVar[Mapping[str, Collection[str]]] = {}

    def __post_init__(self) -> None:
        for group, (holds, wanted) in _RANGES.items():
            for name in getattr(self, group):
                value: Any = getattr(self, name)
                kinds: Any = (int, np.integer) if group == "COUNTS" else (int, float, np.number)
                if not isinstance(value, kinds) or isinstance(value, bool):
                    what = "whole number" if group == "COUNTS" else "number"
                    raise ConfigError(f"model: {name}={brief(value)} is no {what}; give one")
                if not holds(value):
                    raise ConfigError(f"model: {name}={value} must {wanted}")
        for name, choices in self.CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ConfigError(f"model: {name}={value!r} is unknown; known: {' '.join(choices)}")


def _unknown(what: str, name: object, known: Collection[str]) -> ConfigError:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"model: unknown {what} {name!r}; {hint}known: {' '.join(known)}")


def named_config(
    kind: type[C], sizes: Mapping[str, Settings], size: str | C, changes: Mapping[str, FieldValue]
) -> C:
    """Returns the configuration of a named size, or a given one, with some fields changed.

    Raises:
      ConfigError: unknown size or field.
    """
    fields = sorted(field.name for field in dataclasses.fields(kind))
    if isinstance(size, str) and size in sizes:
        size = kind(**sizes[size])
    if not isinstance(size, kind):
        raise _unknown("size", size, sizes)
    if unknown := sorted(set(changes) - set(fields)):
        raise _unknown("field", unknown[0], fields)
    return kind(**{name: getattr(size, name) for name in fields} | dict(changes))
