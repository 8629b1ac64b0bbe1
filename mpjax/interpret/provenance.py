"""Where a wide value of a program comes from, and who uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mpjax.interpret.flow import Step, Value
from mpjax.interpret.lists import SHAPE


class Origin(NamedTuple):
    """What a wide value is made of: the first argument, constant or new array behind it.

    Args:
      kind: `argument`, `constant`, `number` or `made`.
      text: such as `args[0]['w'] (float32[8,8])`.
      step: the operation that reads or makes it; None for the value itself.
    """

    kind: str
    text: str
    step: Step | None


def origin(value: Value) -> Origin:
    """Returns the origin of a wide value, the nearest one if there are several."""
    queue: list[tuple[Value, Step | None]] = [(value, None)]
    seen: set[Value] = set()
    made: Step | None = None
    for value, reader in queue:  # grows while it is read
        if value in seen or not value.wide:
            continue
        seen.add(value)
        if value.origin:
            if value.number:
                return Origin("number", value.origin, reader)
            if value.origin.startswith("a constant"):
                return Origin("constant", value.origin, reader)
            return Origin("argument", f"{value.origin} ({_shape(value)})", reader)
        queue += [(x, reader) for x in value.same]
        if value.step is not None:
            made = value.step
            queue += [(x, made) for x in made.ins if not x.number]
    assert made is not None  # it is wide, so something made it
    return Origin("made", f"{_shape(made.outs[0])} of {made.name}", made)


def is_argument(value: Value) -> bool:
    """Returns whether a value is an argument, or the slice of one that a scan reads."""
    while not value.origin:
        if value.step is not None and value.step.name in SHAPE:
            value = value.step.ins[0]
        elif len(value.same) == 1:
            (value,) = value.same
        else:
            return False
    return True


def behind(value: Value) -> Iterator[Step]:
    """Yields the steps that a wide value was computed by, through wide values only."""
    stack, seen = [value], set()
    while stack:
        value = stack.pop()
        if value in seen or not value.wide:
            continue
        seen.add(value)
        stack += value.same
        if value.step is not None:
            yield value.step
            stack += [x for x in value.step.ins if not x.number]


def readers(value: Value) -> Iterator[tuple[Step, set[Value]]]:
    """Yields the steps that first do more than move a value, with the values that are it."""
    stack, mine = [value], {value}
    found: dict[Step, None] = {}
    while stack:
        value = stack.pop()
        moved = list(value.joins)
        for reader in value.readers:
            if reader.name in SHAPE and not any(x.wide and x not in mine for x in reader.ins):
                moved += reader.outs
            else:
                found[reader] = None
        stack += [x for x in moved if x not in mine]
        mine.update(moved)
    return ((reader, mine) for reader in found)


def _shape(value: Value) -> str:
    return f"{value.aval.dtype}[{','.join(map(str, value.aval.shape))}]"
