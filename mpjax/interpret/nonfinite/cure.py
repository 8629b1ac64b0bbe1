"""The smallest change of precision that removes a fault, found by trying each in turn."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from mpjax.interpret.core.location import Location
from mpjax.interpret.core.retrace import aval_of
from mpjax.interpret.core.trace import Program
from mpjax.interpret.nonfinite.fault import is_inexact
from mpjax.interpret.nonfinite.first_fault import FirstFault
from mpjax.interpret.nonfinite.instrument import InstrumentedProgram, Wide, any_low, is_low
from mpjax.interpret.nonfinite.propagation import Propagation
from mpjax.interpret.nonfinite.sites import SEEN, Key, location_at
from mpjax.typing import Array, DType

# A change of precision: in words, and which operations it computes in float32.
Change: TypeAlias = tuple[str, Wide]

NONE = "none: the value is not finite in float32 either"
_log = logging.getLogger("mpjax.interpret")
_LOSS_SCALE = re.compile(r"(loss_scale|scale|\])\.value$|loss_scale$")


def find_cure(program: Program, first_fault: FirstFault, exact: float | None) -> str:
    """Returns the smallest change that removes a fault, in words.

    Tried in this order: the operation in float32; a loss scale lower by a power of two, if an
    argument is one; everything in float32, and then the smallest module around the operation that
    suffices. Other faults of the program do not count, whether they are there already or appear
    when this one is removed: if no change leaves the program without any, one is looked for that
    keeps this value finite, and the operation that breaks next is named.

    Args:
      program: what runs.
      first_fault: what broke in it.
      exact: what the operation gives in float32 on the same operands; None if that is not known.
    """
    key, names = first_fault.found.key, first_fault.site.location.path.split("/")
    paths = ["/".join(names[:count]) for count in range(len(names), 0, -1) if names[0]]
    whole: list[Change] = [
        *((f"{path} in float32", functools.partial(_is_inside, path)) for path in paths),
        ("all of it in float32", lambda key, location: True),
    ]
    alone: Change = ("this operation in float32", lambda other, location: other == key)
    low = any_low(first_fault.instrumented.sites)
    may_do = low and _may_fit(first_fault, exact)

    def cured(change: Change) -> bool:
        return _is_cured(program, first_fault, change)

    if may_do and cured(alone):
        return alone[0]
    if lower := _lower_scale(program, first_fault):
        return lower
    if not low:
        return NONE
    if cured(whole[-1]):
        # If one module suffices, those around it do too.
        return whole[_least(-1, len(paths), lambda index: cured(whole[index]))][0]
    return _of_this_value(program, first_fault, exact, [*([alone] if may_do else []), *whole])


def _least(failing: int, working: int, works: Callable[[int], bool]) -> int:
    """The least number that works, by bisection; all numbers above it work too."""
    while working - failing > 1:
        middle = (working + failing) // 2
        working, failing = (middle, failing) if works(middle) else (working, middle)
    return working


def _may_fit(first_fault: FirstFault, exact: float | None) -> bool:
    """Whether the operation alone in float32 may suffice: its readers cast its value down.

    In a loop its reader may be a carry, which then is float32 too.
    """
    if exact is None or {*first_fault.site.levels} - {"shard"}:
        return True
    return abs(exact) <= max(float(jnp.finfo(d).max) for d in _dtypes(first_fault))  # not for NaN


def _dtypes(first_fault: FirstFault) -> list[DType]:
    """The dtypes of the operation's results."""
    return [aval_of(var).dtype for var in first_fault.site.eqn.outvars if is_inexact(var.aval)]


def _of_this_value(
    program: Program, first_fault: FirstFault, exact: float | None, changes: Sequence[Change]
) -> str:
    """The smallest change that keeps the value finite, in a program that then breaks elsewhere."""
    finite = exact is not None and math.isfinite(exact)
    for words, wide in changes:
        _trying(words)
        instrumented = InstrumentedProgram(program.closed, wide=wide)
        outcome = _Outcome(instrumented, program.args, first_fault)
        if outcome.is_held:
            return words + outcome.then
        finite |= outcome.is_finite
    if not finite:
        return NONE
    dtype = _dtypes(first_fault)[0].name
    value = "it" if exact is None or not math.isfinite(exact) else f"{exact:.6g}"
    if not is_low(dtype):
        return "all of it in float32, its outputs too"
    return f"this operation and what holds its value in float32: {dtype} cannot hold {value}"


def _is_cured(program: Program, first_fault: FirstFault, change: Change) -> bool:
    """Whether in a changed program this fault affects no output."""
    words, wide = change
    _trying(words)
    if first_fault.reached:  # outputs and finiteness checks suffice, unless other faults reach them
        instrumented = InstrumentedProgram(program.closed, wide=wide, only=frozenset())
        records, _ = instrumented(program.args)
        if not instrumented.found(records):
            return True
        if not first_fault.others:
            return False
    instrumented = InstrumentedProgram(program.closed, wide=wide)
    return _Outcome(instrumented, program.args, first_fault).is_clean


def _trying(words: str) -> None:
    """Logs what is tried: each change compiles the program again, which may take minutes."""
    _log.info("trace_nonfinite: trying %s", words)


class _Outcome:
    """What a fault still does in a changed program, which records at all of its sites."""

    def __init__(
        self, instrumented: InstrumentedProgram, args: Sequence[Array], first_fault: FirstFault
    ) -> None:
        records, _ = instrumented(args)
        found = {f.key: f for f in instrumented.found(records)}
        self._instrumented, closed = instrumented, instrumented.closed

        def propagated(starts: frozenset[Key]) -> Propagation:
            return Propagation(closed, starts, instrumented.sites, sites)

        outputs = {key for key in found if key[0] == len(closed.jaxpr.eqns)}
        sites = frozenset(found) - outputs
        lost = {key for key in sites if found[key].code < SEEN}  # a value that did not fit
        own = found.get(first_fault.found.key)
        self.is_finite = own is None or own.order > first_fault.found.order
        left = sites - first_fault.others
        if self.is_finite:  # sites that other faults reach are no consequence of this one
            left -= propagated(sites & first_fault.others).reached_sites - lost
        misfits = {key for key in outputs if not first_fault.reached or key[1] in first_fault.outs}
        self.is_held = self.is_finite and not misfits and not lost - first_fault.others
        self._next = [f for f in found.values() if f.key in left and f.key != first_fault.found.key]
        if not first_fault.reached or misfits:
            self.is_clean = not left and not misfits
        else:  # an infinity may remain that affects no output, as in 1 / (1 + inf)
            self.is_clean = not propagated(left).affects_output

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
