"""Names of classes: in which order data has them, and in which order a checkpoint wants them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mpjax.errors import ConfigError


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct names in order: whole numbers by size where all are, else as text.

    Example:
        >>> sorted_names(["10", "9", "9"]), sorted_names(["b", "10", "9"])
        (('9', '10'), ('10', '9', 'b'))
    """
    distinct = set(names)
    if all(name.isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def places_in(names: Sequence[str], wanted: Sequence[str], what: str) -> np.ndarray:
    """Returns for each name its place among the wanted ones, int32.

    Args:
        names: those of data.
        wanted: those of a task or a checkpoint, in its order.
        what: what they name, for errors.

    Raises:
        ConfigError: a name that is not wanted, or one that is wanted twice.

    Example:
        >>> places_in(("bad", "good"), ("good", "fine", "bad"), "classes").tolist()
        [2, 0]
    """
    place = {name: i for i, name in enumerate(wanted)}
    if len(place) < len(wanted):
        raise ConfigError(f"{what}: {tuple(wanted)} names one twice; give each another name")
    if strange := [name for name in names if name not in place]:
        raise ConfigError(
            f"{what}: the data names {strange[0]!r}, which is none of {tuple(wanted)}; rename it in"
            " the data, or give the checkpoint other names with load_checkpoint(..., labels=...)"
        )
    return np.array([place[name] for name in names], np.int32)
