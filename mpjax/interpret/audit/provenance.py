"""Where a wide value of a program comes from, and which steps use it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mpjax.interpret.core.dataflow import Flow, Step, Value, reach
from mpjax.interpret.core.op_lists import SHAPE


class Origin(NamedTuple):
    """The first argument, constant or new array that a wide value is made of.

    Args:
      kind: `argument`, `constant`, `number` or `made`; `cast` if there is none, so that all of it
        was low before.
      text: such as `args[0]['w'] (float32[8,8])`.
      step: the operation that reads or makes it; None for the value itself.
    """

    kind: str
    text: str
    step: Step | None


def origin(value: Value) -> Origin:
    """Returns the origin of a wide value, the nearest one if there are several."""
    queue: list[tuple[Value, Step | None]] = [(value, None)]
    visited: set[Value] = set()
    made: Step | None = None
    shape = _shape(value)
    for value, reader in queue:  # grows while it is read
        if value in visited or not value.wide:
            continue
        visited.add(value)
        if value.origin:
            if value.number:
                return Origin("number", value.origin, reader)
            if value.origin.startswith("a constant"):
                return Origin("constant", value.origin, reader)
            return Origin("argument", f"{value.origin} ({_shape(value)})", reader)
        queue += [(x, reader) for x in value.same]
        if value.step is not None:
            wide = [x for x in value.step.ins if x.wide and not x.number]
            if not wide and not any(x.low for x in value.step.ins):
                return Origin("made", f"{shape}, made by the function", value.step)
            made = value.step
            queue += [(x, made) for x in wide]
    return Origin("cast", f"{shape} cast up", made)


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


class Makers:
    """The steps that make a wide value of low ones, and which of them each value depends on.

    Args:
      flow: the program.
      makes: whether a step is one.
    """

    def __init__(self, flow: Flow, makes: Callable[[Step], bool]) -> None:
        self._steps = [step for step in flow.steps if makes(step)]
        own = {step: 1 << number for number, step in enumerate(self._steps)}
        self._found: dict[Step, int] = {}  # their numbers as bits, in program order
        changed = True
        while changed:  # once more for each loop in a loop
            changed = False
            for step in flow.steps:
                bits = own.get(step, 0)
                for value in step.ins:
                    bits |= self._bits(value)
                changed |= bits != self._found.get(step, 0)
                self._found[step] = bits

    def _bits(self, value: Value) -> int:
        """The makers behind a value, reached through wide values only."""
        bits = 0
        for source in reach([value], lambda x: x.same if x.wide else ()):
            bits |= self._found.get(source.step, 0) if source.step and source.wide else 0
        return bits

    def behind(self, value: Value) -> Iterator[Step]:
        """Yields them in program order."""
        bits = self._bits(value)
        while bits:
            yield self._steps[(bits & -bits).bit_length() - 1]
            bits &= bits - 1

    def before(self, step: Step, value: Value) -> bool:
        """Returns whether one of them stands before a step."""
        return any(maker.order < step.order for maker in itertools.islice(self.behind(value), 1))


def readers(value: Value) -> Iterator[tuple[Step, set[Value]]]:
    """Yields the first steps that compute with a value, with its copies that they may read."""
    stack, inside = [value], {value}
    found: dict[Step, None] = {}
    while stack:
        value = stack.pop()
        moved = list(value.joins)
        for reader in value.readers:
            if reader.name in SHAPE and not any(x.wide and x not in inside for x in reader.ins):
                moved += reader.outs
            else:
                found[reader] = None
        stack += [x for x in moved if x not in inside]
        inside.update(moved)
    return ((reader, inside) for reader in found)


def _shape(value: Value) -> str:
    return f"{value.aval.dtype}[{','.join(map(str, value.aval.shape))}]"
