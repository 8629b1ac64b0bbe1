"""Pickles of plain data, read by a machine that can build such data and do nothing else.

It is no `pickle.Unpickler`: it looks no name up, calls nothing but what its caller gives it, and
holds no more than the file can fill. `pickletools` splits the file into opcodes.
"""

from __future__ import annotations

import dataclasses
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

# The first two of a file that a pickler wrote are below 10 and below 2010: it writes a list or dict
# by the thousand. A container takes a byte of the file and 90 of memory; a tensor needs four.
_MOST_MARKS, _MOST_VALUES, _MOST_CONTAINERS = 100, 100_000, 200_000
# What pushes its argument.
_PLAIN = frozenset(
    """
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING
    SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    """.split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class Maker:
    """What a name stands for that a pickle may call.

    Args:
      make: takes the pickle's arguments and returns plain data.
    """

    make: Callable[..., Any]


def read_pickle(
    file: IO[bytes],
    names: Mapping[str, Any],
    *,
    build: Callable[[Any, Any], None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the object that a pickle describes; the file is then behind it.

    Args:
      file: at the pickle, in memory or memory-mapped: a read beyond its end is short there, and
        takes no memory.
      names: `MODULE.NAME` -> what it stands for, a Maker where it may be called.
      build: sets the state of an object, or raises.
      persistent: persistent id -> object.

    Raises:
      UnpicklingError: an opcode, a name or a nesting that plain data does not need.
      ValueError: bytes that are no pickle.

    Example:
      >>> import io
      >>> read_pickle(io.BytesIO(pickle.dumps({"a": (1, [2])})), {}, build=print)
      {'a': (1, [2])}
      >>> read_pickle(io.BytesIO(pickle.dumps(print)), {}, build=print)
      Traceback (most recent call last):
      _pickle.UnpicklingError: it names builtins.print, which plain data does not need
    """
    machine = _Machine(names, build, persistent)
    for opcode, argument, _ in pickletools.genops(file):
        machine.run(opcode.name, argument)
    return machine.pop()


class _Machine:
    def __init__(self, names: Mapping[str, Any], build: Any, persistent: Any) -> None:
        self._names, self._set_state, self._persistent = names, build, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._containers = 0

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise pickle.UnpicklingError("an opcode without its operand")
        return self._stack.pop()

    def _marked(self) -> list[Any]:
        """The values above the last mark, which are taken off the stack with it."""
        if not self._marks:
            raise pickle.UnpicklingError("an opcode without its mark")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def run(self, name: str, argument: Any) -> None:
        """Executes one opcode."""
        if name in _PLAIN:
            self._stack.append(argument)
        elif name in _OTHERS:
            _OTHERS[name](self, argument)
        elif name in _CONSTANTS:
            self._containers += name.startswith("EMPTY")
            self._stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            self._containers += 1
            self._stack.append(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("BINGET", "LONG_BINGET"):
            if argument >= len(self._memo):
                raise pickle.UnpicklingError(f"memo {argument}, which was never set")
            self._stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._put(argument)
        else:
            raise pickle.UnpicklingError(f"the opcode {name}, which plain data does not need")
        if len(self._stack) > _MOST_VALUES or len(self._marks) > _MOST_MARKS:
            raise pickle.UnpicklingError("more values at once than any pickler leaves")
        if self._containers > _MOST_CONTAINERS:
            raise pickle.UnpicklingError(f"more than {_MOST_CONTAINERS} lists and dicts")

    def _put(self, index: int) -> None:
        """Picklers number what they memoise from 0, that of Python 2 from 1."""
        value = self.pop()
        self._stack.append(value)
        if index == 1 and not self._memo:
            self._memo.append(None)
        if index > len(self._memo):
            raise pickle.UnpicklingError(f"memo {index} behind {len(self._memo)}")
        self._memo[index : index + 1] = [value]

    def _memoize(self, _: Any) -> None:
        value = self.pop()
        self._stack.append(value)
        self._memo.append(value)

    def _proto(self, _: Any) -> None:
        """Says a version; the opcodes say enough."""

    def _frame(self, _: Any) -> None:
        """Says how much to read ahead; nothing is read ahead here."""

    def _stop(self, _: Any) -> None:
        if self._marks or len(self._stack) != 1:
            raise pickle.UnpicklingError("an end in the middle")

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._marked()))

    def _append(self, _: Any) -> None:
        self._extend([self.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, values: list[Any]) -> None:
        if not self._stack or type(self._stack[-1]) is not list:
            raise pickle.UnpicklingError("elements of what is no list")
        self._stack[-1].extend(values)

    def _setitem(self, _: Any) -> None:
        value = self.pop()
        self._update([self.pop(), value])

    def _setitems(self, _: Any) -> None:
        self._update(self._marked())

    def _update(self, values: list[Any]) -> None:
        if not self._stack or not isinstance(self._stack[-1], dict) or len(values) % 2:
            raise pickle.UnpicklingError("items of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):  # the hash of tuples in tuples can take for ever
                raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")
            self._stack[-1][key] = value

    def _global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name not in self._names:
            raise pickle.UnpicklingError(f"it names {name}, which plain data does not need")
        self._stack.append(self._names[name])

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise pickle.UnpicklingError("a name that is no text")
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        arguments, maker = self.pop(), self.pop()
        if type(maker) is not Maker or type(arguments) is not tuple:
            raise pickle.UnpicklingError("a call of what is no function")
        self._stack.append(maker.make(*arguments))

    def _build(self, _: Any) -> None:
        state = self.pop()
        self._set_state(self._stack[-1] if self._stack else None, state)

    def _binpersid(self, _: Any) -> None:
        if self._persistent is None:
            raise pickle.UnpicklingError("a persistent id")
        self._stack.append(self._persistent(self.pop()))


_OTHERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._proto,
    "FRAME": _Machine._frame,
    "STOP": _Machine._stop,
    "MARK": _Machine._mark,
    "MEMOIZE": _Machine._memoize,
    "TUPLE": _Machine._tuple,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,  # a class called with its arguments
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._binpersid,
}
