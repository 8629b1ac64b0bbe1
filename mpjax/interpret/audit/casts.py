"""Redundant casts, casts down that are cast up again, and sums in a low dtype."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeAlias

from mpjax.interpret.core.dataflow import Flow, Step, Value
from mpjax.interpret.core.op_lists import SHAPE
from mpjax.interpret.core.retrace import is_float

# They add up in the dtype of their operand (a psum on the wire).
_SUMS_LIKE_OPERAND = frozenset(
    {
        *("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp", "reduce_window_sum"),
        *("scatter-add", "scatter-mul", "psum", "psum2", "psum_invariant", "reduce_scatter"),
    }
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a program does at a line.

    Args:
      what: what it is, such as `float32 -> bfloat16 -> float32`.
      line: the source line.
      path: module path.
      direction: `forward` or `backward`.
      times: how often it happens in one call.
    """

    what: str
    line: str
    path: str
    direction: str
    times: int


Find: TypeAlias = Callable[[Flow], tuple[Finding, ...]]


def _counted(find: Callable[[Flow], Iterator[tuple[str, Step]]]) -> Find:
    """Findings of what a function yields with the steps at which it happens."""

    @functools.wraps(find)
    def findings(flow: Flow) -> tuple[Finding, ...]:
        times: Counter[tuple[str, str, str, str]] = Counter()
        for what, step in find(flow):
            location = step.location
            times[what, location.line, location.path, location.direction] += location.loops
        return tuple(Finding(*key, count) for key, count in times.items())

    return findings


@_counted
def low_reductions(flow: Flow) -> Iterator[tuple[str, Step]]:
    """Returns sums and products over an axis whose operand and result are low."""
    for step in flow.steps:
        if step.name in _SUMS_LIKE_OPERAND and step.outs and step.ins[0].low and step.outs[0].low:
            yield f"{step.name} in {step.outs[0].aval.dtype}", step


@_counted
def double_casts(flow: Flow) -> Iterator[tuple[str, Step]]:
    """Returns casts of a value that was cast just before, and casts that were made already."""
    # The backward pass may repeat a cast of the forward pass: that saves memory.
    made: dict[tuple[Value, str, bool], Step] = {}
    for step in flow.steps:
        if not _is_cast(step):
            continue
        new = str(step.outs[0].aval.dtype)
        first = made.setdefault((step.ins[0], new, step.location.backward), step)
        if first is not step:
            yield f"{step.ins[0].aval.dtype} -> {new}, made before at {first.location.line}", step
        before = _source(step.ins[0]).step
        if before is not None and _is_cast(before):
            chain = [before.ins[0].aval.dtype, before.outs[0].aval.dtype, new]
            yield " -> ".join(map(str, chain)), step


@_counted
def dead_casts(flow: Flow) -> Iterator[tuple[str, Step]]:
    """Returns casts without readers, and casts up that are only cast straight back."""
    for step in flow.steps:
        if not _is_cast(step):
            continue
        value, old = step.outs[0], step.ins[0].aval.dtype
        what = f"{old} -> {value.aval.dtype}"
        used = value.returned or value.joins
        if not used and not value.readers:
            yield f"{what}, never used", step
        elif not used and old.itemsize < value.aval.dtype.itemsize:
            back = [_is_cast(r) and r.outs[0].aval.dtype == old for r in value.readers]
            if all(back):
                yield f"{what}, cast straight back", step


def _is_cast(step: Step | None) -> bool:
    if step is None or step.name != "convert_element_type":
        return False
    old, new = step.ins[0].aval, step.outs[0].aval
    return is_float(old) and is_float(new) and old.dtype != new.dtype


def _source(value: Value) -> Value:
    """The value that this one is in another shape."""
    while value.step is not None and value.step.name in SHAPE and len(value.step.ins) == 1:
        value = value.step.ins[0]
    return value
