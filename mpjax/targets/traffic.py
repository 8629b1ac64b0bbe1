"""Bytes between a chip and its memory in one call of a compiled program, loops counted in full.

`compiled.cost_analysis()` counts the body of a loop once, so that of a scan over layers it has one
layer's bytes. Here each computation counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from mpjax.interpret.audit.collectives import BEGINS, bits_of, calls_of, place_of, runs

_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
# They hold or name values and move none; what is asynchronous counts where it starts.
_FREE = frozenset(
    {
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call"),
        *("conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"),
        *("async-start", "async-update", "async-done", "domain", "add-dependency"),
    }
)
_PARTS = ("dynamic-slice", "slice", "gather")  # they read as much as they make


class _Array(NamedTuple):
    """An array of a type: its bytes, whether it lies in the chip's main memory, and its shape."""

    bytes: int
    main: bool
    shape: str
    elements: int


class _Line(NamedTuple):
    """An instruction of a compiled program."""

    name: str
    opcode: str
    result: tuple[_Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool
    number: int  # of a parameter, else -1


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text)


def _arrays(text: str) -> tuple[_Array, ...]:
    from mpjax.probe import HLO_NAMES  # a command, which no package loads before it runs

    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        count = math.prod(int(n) for n in dims.split(",") if n)
        size = math.ceil(count * bits_of(dtype) / 8)
        shape = f"{HLO_NAMES.get(dtype, dtype)}[{dims}]"
        found.append(_Array(size, "S(" not in layout, shape, count))
    return tuple(found)


def _read(line: str) -> _Line | None:
    begins = _NAME.match(line)
    if begins is None:
        return None
    at = begins.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    if not (opcode := re.match(r"\S*\s+([\w\-]+)\(", line[end:])):
        return None
    opens = end + opcode.end() - 1
    closes = _closing(line, opens)
    return _Line(
        begins[2], opcode[1], _arrays(line[at:end]),
        tuple(re.findall(r"%([\w.\-]+)", line[opens:closes])), line[closes:], bool(begins[1]),
        int(line[opens + 1 : closes]) if opcode[1] == "parameter" else -1,
    )  # fmt: skip


class Program:
    """A compiled program, read once: its computations, and how often each runs.

    Args:
      text: `compiled.as_text()`.

    Example:
      >>> program = Program('''ENTRY %main (a: f8e4m3fn[8,4], b: f8e5m2[4,2]) -> f32[8,2] {
      ...   %a = f8e4m3fn[8,4]{1,0} parameter(0)
      ...   %b = f8e5m2[4,2]{1,0} parameter(1)
      ...   ROOT %c = f32[8,2]{1,0} dot(%a, %b), metadata={op_name="jit(f)/mlp/up/dot"}
      ... }''')
      >>> program.bytes(), program.largest(1), program.float8_operations()
      (104, ((64, 'float32[8,2]', 'mlp/up'),), 128)
    """

    def __init__(self, text: str) -> None:
        self._times = runs(text)
        self._lines: dict[str, dict[str, _Line]] = {}
        own: dict[str, _Line] = {}
        for line in text.splitlines():
            if begins := BEGINS.match(line):
                own = self._lines.setdefault(begins[2], {})
            elif found := _read(line):
                own[found.name] = found
        self._fused = {
            name
            for lines in self._lines.values()
            for line in lines.values()
            if line.opcode not in ("while", "conditional", "call", "async-start")
            for name in calls_of(line.rest)
        }

    def bytes(self) -> int:
        """Returns the bytes that it reads from and writes to the memory of its chip.

        What lies in on-chip memory (another memory space than 0) is not counted; a fusion counts
        what enters and leaves it, of an array that is only sliced or updated the part.
        """
        return sum(
            self._times.get(name, 0) * self._moved(line, lines)
            for name, lines in self._lines.items()
            if name not in self._fused
            for line in lines.values()
        )

    def largest(self, count: int) -> tuple[tuple[int, str, str], ...]:
        """Returns the largest arrays that it makes in main memory: bytes, dtype[shape], path.

        Args:
          count: how many; those of one dtype, shape and path are one.
        """
        sizes: dict[tuple[str, str], int] = {}
        for name, lines in self._lines.items():
            for line in lines.values() if name not in self._fused else ():
                if line.opcode in _FREE or line.opcode.endswith("-done"):
                    continue
                said = re.search(r'op_name="([^"]*)"', line.rest)
                path = place_of(said[1])[0] if said else ""
                for array in line.result:
                    if array.main:
                        sizes[array.shape, path] = array.bytes
        order = sorted(sizes.items(), key=lambda one: (-one[1], one[0]))
        return tuple((size, shape, path) for (shape, path), size in order[:count])

    def float8_operations(self) -> int:
        """Returns the operations of matrix products whose operands are float8, on a GPU.

        A recipe's products are traced in bfloat16, which holds the numbers of 8 bits exactly; the
        compiler of a GPU that multiplies float8 makes products of float8 of them.
        """
        total = 0
        for name, lines in self._lines.items():
            for line in lines.values():
                library = line.opcode == "custom-call" and "matmul$f8" in line.rest
                taken = [lines[one].result[0] for one in line.operands[:2] if one in lines]
                if not (line.opcode == "dot" or library) or len(taken) < 2:
                    continue
                if all(one.shape.startswith("float8") for one in taken):
                    a, b, c = (one.elements for one in (*taken, line.result[0]))
                    # (M K)(K N) / (M N) is K squared: without batch axes, as linear maps are.
                    total += self._times.get(name, 1) * 2 * c * math.isqrt(a * b // c)
        return total

    def _moved(self, line: _Line, lines: dict[str, _Line]) -> int:
        made = sum(x.bytes for x in line.result if x.main)
        if line.opcode in _FREE or line.opcode.endswith("-done"):
            return 0
        if line.opcode == "copy-start":  # its result names what it reads, too
            return made
        taken = [lines[name].result for name in line.operands if name in lines]
        if line.opcode == "slice-start":
            part = line.result[1] if len(line.result) > 1 else line.result[0]
            return part.bytes * (1 + part.main)
        if line.opcode in _PARTS:
            whole = taken[0][0].main if taken and taken[0] else True
            return made + whole * line.result[0].bytes
        if line.opcode == "dynamic-update-slice":
            update = taken[1][0]
            return update.bytes * (update.main + line.result[0].main)
        called = calls_of(line.rest)
        if line.opcode == "fusion" and called and called[0] in self._lines:
            return self._into(line, lines, called[0]) + self._out_of(line, called[0])
        return made + sum(x.bytes for result in taken for x in result if x.main)

    def _into(self, line: _Line, lines: dict[str, _Line], fused: str) -> int:
        total = 0
        for at, name in enumerate(line.operands):
            if name not in lines:
                continue
            whole = sum(x.bytes for x in lines[name].result if x.main)
            total += min(whole, self._used(fused, at, whole)) if whole else 0
        return total

    def _used(self, fused: str, at: int, whole: int) -> int:
        """How many bytes of its parameter a fused computation reads, of so many."""
        named = [x.name for x in self._lines[fused].values() if x.number == at]
        return self._users(fused, named[0], whole) if named else whole

    def _users(self, fused: str, name: str, whole: int) -> int:
        total = 0
        for user in self._lines[fused].values():
            if name not in user.operands:
                continue
            if user.opcode in _PARTS and user.operands[0] == name:
                total += user.result[0].bytes
            elif user.opcode == "bitcast":
                total += self._users(fused, user.name, whole)
            elif user.opcode == "dynamic-update-slice" and user.operands.count(name) == 1:
                if user.operands[0] != name:
                    total += whole
            elif user.opcode == "fusion" and (called := calls_of(user.rest)):
                at = user.operands.index(name)
                total += self._used(called[0], at, whole)
            else:
                return whole
        return total

    def _out_of(self, line: _Line, fused: str) -> int:
        """What a fusion writes: of an array that it updates in place, the update."""
        inner = self._lines[fused]
        root = next((x for x in inner.values() if x.root), None)
        if root is None:
            return sum(x.bytes for x in line.result if x.main)
        ends = [root]
        if root.opcode == "tuple":
            ends = [inner[name] for name in root.operands if name in inner]
        if len(ends) != len(line.result):
            return sum(x.bytes for x in line.result if x.main)
        total = 0
        for end, array in zip(ends, line.result, strict=True):
            while end.opcode == "bitcast" and end.operands[0] in inner:
                end = inner[end.operands[0]]
            if not array.main:
                continue
            if end.opcode == "dynamic-update-slice" and end.operands[1] in inner:
                total += inner[end.operands[1]].result[0].bytes
            else:
                total += array.bytes
        return total
