"""The smallest change of precision that removes a fault, found by trying each in turn."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax.interpret.core.location import Location
from mpjax.interpret.core.trace import Program
from mpjax.interpret.nonfinite.fault import is_number
from mpjax.interpret.nonfinite.first_fault import FirstFault
from mpjax.interpret.nonfinite.instrument import InstrumentedProgram, any_low
from mpjax.interpret.nonfinite.propagation import Propagation
from mpjax.interpret.nonfinite.sites import SEEN, Key, location_at
from mpjax.interpret.nonfinite.widen import is_low

NONE = "none: the value is not finite in float32 either"
_log = logging.getLogger("mpjax.interpret")
_LOSS_SCALE = re.compile(r"(loss_scale|scale|\])\.value$|loss_scale$")


def find_cure(program: Program, first_fault: FirstFault, exact: float | None) -> str:
    """Returns the smallest change that removes a fault, in words.

    Tried in this order: the operation in float32; a loss scale lower by a power of two, where an
    argument is one; everything in float32, and then the smallest module around the operation that
    will do. Other faults of the program do not count, whether they are there already or come up
    when this one is removed: if no change leaves the program without any, one is looked for that
    keeps this value finite, and what breaks next is named.

    Args:
      program: what runs.
      first_fault: what broke in it.
      exact: what the operation gives in float32 on the same operands; None if that is not known.
    """
    key, location = (
        first_fault.found.key,
        first_fault.instrumented.sites[first_fault.found.key].location,
    )
    low = any_low(first_fault.instrumented.sites)
    paths = list(_around(location.path))
    whole: list[tuple[str, Callable[[Key, Location], bool]]] = [
        *((f"{path} in float32", functools.partial(_is_inside, path)) for path in paths),
        ("all of it in float32", lambda *_: True),
    ]
    alone = ("this operation in float32", lambda k, _: k == key)
    may_do = low and _may_fit(first_fault, exact)
    if may_do and _is_cured(program, first_fault, *alone):
        return alone[0]
    if lower := _lower_scale(program, first_fault):
        return lower
    if not low:
        return NONE
    if _is_cured(program, first_fault, *whole[-1]):
        # Every module that holds one that will do will do.
        cured = lambda index: _is_cured(program, first_fault, *whole[index])  # noqa: E731
        return whole[_least(-1, len(paths), cured)][0]
    return _of_this_value(program, first_fault, exact, [*([alone] if may_do else []), *whole])


def _least(failing: int, working: int, works: Callable[[int], bool]) -> int:
    """The least number that works, by halving; all above one that works do too."""
    while working - failing > 1:
        middle = (working + failing) // 2
        working, failing = (middle, failing) if works(middle) else (working, middle)
    return working


def _may_fit(first_fault: FirstFault, exact: float | None) -> bool:
    """Whether the operation alone in float32 may do: whoever reads its value casts it down.

    In a loop it may be a carry that reads it, which then is float32 too.
    """
    if exact is None or {*first_fault.instrumented.sites[first_fault.found.key].levels} - {"shard"}:
        return True
    eqn = first_fault.instrumented.sites[first_fault.found.key].eqn
    avals: list[Any] = [var.aval for var in eqn.outvars if is_number(var.aval)]
    return abs(exact) <= max(float(jnp.finfo(a.dtype).max) for a in avals)  # not so for NaN


def _of_this_value(
    program: Program,
    first_fault: FirstFault,
    exact: float | None,
    changes: Sequence[tuple[str, Callable[[Key, Location], bool]]],
) -> str:
    """The smallest change that keeps the value finite, in a program that then breaks elsewhere."""
    finite = exact is not None and math.isfinite(exact)
    for words, wide in changes:
        _trying(words)
        outcome = _Outcome(
            InstrumentedProgram(program.closed, wide=wide), program.args, first_fault
        )
        if outcome.is_held:
            return words + outcome.then
        finite |= outcome.is_finite
    if not finite:
        return NONE
    eqn = first_fault.instrumented.sites[first_fault.found.key].eqn
    avals: list[Any] = [var.aval for var in eqn.outvars if is_number(var.aval)]
    dtype = avals[0].dtype.name
    value = "it" if exact is None or not math.isfinite(exact) else f"{exact:.6g}"
    if not is_low(dtype):
        return "all of it in float32, its outputs too"
    return f"this operation and what holds its value in float32: {dtype} cannot hold {value}"


def _is_cured(
    program: Program, first_fault: FirstFault, words: str, wide: Callable[[Key, Location], bool]
) -> bool:
    """Whether a change leaves a program in which nothing from this fault affects an output."""
    _trying(words)
    if first_fault.reached:  # its outputs and gates tell, unless other faults come through to them
        instrumented = InstrumentedProgram(program.closed, wide=wide, only=frozenset())
        records, _ = instrumented(program.args)
        if not instrumented.found(records):
            return True
        if not first_fault.others:
            return False
    return _Outcome(
        InstrumentedProgram(program.closed, wide=wide), program.args, first_fault
    ).is_clean


def _trying(words: str) -> None:
    """Says what is tried, for each compiles the program again and some take minutes."""
    _log.info("trace_nonfinite: trying %s", words)


class _Outcome:
    """What is left of a fault in a changed program.

    Args:
      instrumented: the program, with all its sites.
      args: its arguments.
      first_fault: the fault.
    """

    def __init__(
        self, instrumented: InstrumentedProgram, args: Sequence[Any], first_fault: FirstFault
    ) -> None:
        records, _ = instrumented(args)
        found = {f.key: f for f in instrumented.found(records)}
        self._instrumented = instrumented
        outputs = {key for key in found if key[0] == len(instrumented.closed.jaxpr.eqns)}
        sites = frozenset(found) - outputs
        lost = {key for key in sites if found[key].code < SEEN}  # a value that did not fit
        own = found.get(first_fault.found.key)
        self.is_finite = own is None or own.order > first_fault.found.order
        left = sites - first_fault.others
        if self.is_finite:  # what follows from other faults is theirs; they do not explain this one
            elsewhere = sites & first_fault.others
            left -= (
                Propagation(instrumented.closed, elsewhere, instrumented.sites, sites).reached_sites
                - lost
            )
        misfits = {key for key in outputs if not first_fault.reached or key[1] in first_fault.outs}
        self.is_held = self.is_finite and not misfits and not lost - first_fault.others
        self._next = [f for f in found.values() if f.key in left and f.key != first_fault.found.key]
        if not first_fault.reached or misfits:
            self.is_clean = not left and not misfits
        else:  # an infinity may remain that affects no output, as in 1 / (1 + inf)
            self.is_clean = not Propagation(
                instrumented.closed, left, instrumented.sites, sites
            ).affects_output

    @property
    def then(self) -> str:
        """Which operation breaks next, in words."""
        if not self._next:
            return ""
        key = min(self._next, key=lambda f: f.order).key
        location = location_at(self._instrumented.closed, key)
        where = f" at {location.line}" if location.line else ""
        return f"; then {self._instrumented.sites[key].eqn.primitive.name} breaks{where}"


def _is_inside(path: str, key: Key, location: Location) -> bool:
    return location.path == path or location.path.startswith(f"{path}/")


def _around(path: str) -> Iterator[str]:
    parts = path.split("/") if path else []
    for count in range(len(parts), 0, -1):
        yield "/".join(parts[:count])


def _lower_scale(program: Program, first_fault: FirstFault) -> str:
    """A loss scale lower by the smallest power of two that removes the fault; empty if none."""
    scales = [
        (i, float(np.max(np.asarray(x))))
        for i, (name, x) in enumerate(zip(program.names, program.args, strict=True))
        if _LOSS_SCALE.search(name) and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    largest = max((value for _, value in scales), default=0.0)
    if not (math.isfinite(largest) and largest >= 2):
        return ""

    def clean(power: int) -> bool:
        _trying(f"a loss scale 2^{power} lower")
        args = list(program.args)
        for index, _ in scales:
            # In its dtype and on its devices, as the compiled program expects it.
            args[index] = program.args[index] * jnp.asarray(2.0**-power, args[index].dtype)
        return _Outcome(first_fault.instrumented, args, first_fault).is_clean

    most = int(math.log2(largest))
    if not clean(most):
        return ""
    power = _least(0, most, clean)
    return f"a loss scale 2^{power} lower: {largest:g} -> {largest / 2**power:g}"
