"""A transform: a record and a random generator become a record, as grain's `random_map` takes it.

All transforms of this package draw from the generator alone, so that seed, epoch and record decide
what a record becomes: the same after a resume, and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpjax.errors import ConfigError, brief

Transform = Callable[[Any, np.random.Generator], Any]


def check_rate(where: str, name: str, rate: object) -> None:
    """Checks a share of words, tokens or records that may be changed.

    Raises:
        ConfigError: it is no number of 0 or above and below 1.
    """
    number = isinstance(rate, int | float | np.number) and not isinstance(rate, bool)
    if not (number and 0 <= rate < 1):  # type: ignore[operator]
        raise ConfigError(
            f"{where}: {name}={brief(rate)}; expected a share of 0 or above and below 1, as 0.1"
        )


def check_transforms(where: str, transforms: object) -> tuple[Transform, ...]:
    """Returns transforms as a tuple.

    Raises:
        ConfigError: there is none, or one that cannot be called.
    """
    found = tuple(transforms) if isinstance(transforms, list | tuple) else (transforms,)
    if not found:
        raise ConfigError(f"{where}: no transform; give at least one, such as RandomSwap(0.1)")
    for one in found:
        if not callable(one) or isinstance(one, type):
            raise ConfigError(
                f"{where}: {brief(one)} is no transform; give one such as RandomSwap(0.1), or a"
                " function (record, random generator) -> record"
            )
    return found


def transformed(transforms: Sequence[Transform], record: Any, draw: np.random.Generator) -> Any:
    """Returns a record after all transforms, the first one first."""
    for transform in transforms:
        record = transform(record, draw)
    return record


@dataclass(frozen=True)
class OneOf:
    """Changes a share of the records, each by one transform, drawn with equal chances.

    Args:
        transforms: of records of one kind.
        share: of the records that are changed, above 0; 1 is all.

    Raises:
        ConfigError: no transforms, or a share out of range.

    Example:
        >>> from mpjax.data.augment import RandomDeletion, RandomSwap
        >>> change = OneOf([RandomSwap(0.3), RandomDeletion(0.3)], share=0.5)
        >>> draw = np.random.default_rng(0)
        >>> [change("a b c d", draw) for _ in range(4)]
        ['a b c d', 'd b c a', 'a b c d', 'a b c d']
    """

    transforms: Sequence[Transform]
    share: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", check_transforms("OneOf", self.transforms))
        number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not (number and 0 < self.share <= 1):
            raise ConfigError(
                f"OneOf: share={brief(self.share)}; expected a share above 0 and at most 1"
            )

    def __call__(self, record: Any, draw: np.random.Generator) -> Any:
        if draw.random() >= self.share:
            return record
        return self.transforms[int(draw.integers(len(self.transforms)))](record, draw)
