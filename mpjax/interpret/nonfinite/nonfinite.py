"""trace_nonfinite: the first operation of any function that made an infinity or a NaN."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, explains_calls
from mpjax.interpret.core.retrace import aval_of
from mpjax.interpret.core.trace import Program, trace
from mpjax.interpret.nonfinite.cure import NONE, find_cure
from mpjax.interpret.nonfinite.direction import direction
from mpjax.interpret.nonfinite.fault import KINDS, is_inexact
from mpjax.interpret.nonfinite.first_fault import FirstFault, find_first_fault
from mpjax.interpret.nonfinite.instrument import InstrumentedProgram, runs_wide
from mpjax.interpret.nonfinite.sites import MASK, RANGES, location_at
from mpjax.interpret.nonfinite.summaries import Range, reason
from mpjax.typing import Array, PyTree

_log = logging.getLogger("mpjax.interpret")


@dataclasses.dataclass(frozen=True)
class Nonfinite:
    """The first operation that made an infinity or a NaN that affects an output.

    Args:
      primitive: its name in JAX; `argument` if the function was given a NaN.
      path: module path, joined by `/`; the argument's name for `argument`.
      layer: iteration of the loop around it: an index into a scan, None outside of loops, a tuple
        from outside in for nested ones.
      direction: `forward`, `backward` or `optimizer`.
      line: the user's source line, `file.py:12 (function)`.
      kind: `inf` or `nan`.
      ranges: of each of its inputs.
      shard: indices of the broken shards, of `shard_map` or of an output that lies on several
        devices; None elsewhere.
      cure: the smallest change of precision that removes it; empty if none was looked for.
      reason: what happened, in a few words.
      exact: what the operation gives in float32 on the same operands, where it broke: the number
        of the largest magnitude, an infinity or NaN if one of them is not finite in float32 either;
        None if the operation cannot be run in float32.
    """

    primitive: str
    path: str
    layer: int | tuple[int, ...] | None
    direction: str
    line: str
    kind: str
    ranges: tuple[Range, ...]
    shard: tuple[int, ...] | None
    cure: str
    reason: str
    exact: float | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"iteration {self.layer}"
        value = ""
        if self.exact is not None and math.isfinite(self.exact):
            value = f"{self.exact:.6g} in float32"
        elif self.exact is not None and self.cure != NONE:
            value = "not finite in float32 either, from these inputs"
        rows = [
            ("where", ", ".join(filter(None, (self.path, layer)))),
            ("line", self.line),
            ("why", self.reason),
            *(("" if i else "input", str(r)) for i, r in enumerate(self.ranges)),
            ("shard", ", ".join(map(str, self.shard or ()))),
            ("value", value),
            ("cure", self.cure),
        ]
        head = f"first {self.kind}: {self.primitive}, {self.direction} pass"
        return "\n".join([head, *(f"  {name:6} {text}" for name, text in rows if text)])


@explains_calls
def trace_nonfinite(
    fn: Callable[..., PyTree], *args: PyTree, cure: bool = True, **kwargs: PyTree
) -> Nonfinite | None:
    """Returns the first operation that made an infinity or a NaN, and what would cure it.

    The function runs once, compiled as one program in which every operation is checked; nothing of
    it is edited and no argument is donated. A NaN is a fault where no input is NaN, an infinity
    where all inputs are finite; so masks of -inf and what follows from them are none, but a row
    that is masked as a whole is, at -inf - -inf. What affects no output is none either, such as
    log(0) in the branch that `where` drops. If there is a fault, the program is compiled and run
    again: to measure the operation's inputs, and for each cure that is tried. That takes a few
    times as long as to find the fault, so one line is logged as soon as it is found (a warning of
    the logger `mpjax.interpret`; each cure that is tried is an info).

    XLA may compute more exactly than the dtypes say (float16 sums in float32); here every
    operation rounds to its own dtype.

    Args:
      fn: any function of JAX arrays: a loss, its gradient, a train step that is not donating or
        that was not called with these arguments yet; `jax.jit` around it is looked through.
      args: its arguments.
      cure: whether to look for a cure; without, the report has none.
      kwargs: its arguments by name.

    Returns:
      A report that prints as a few lines; None if nothing broke.

    Raises:
      ConfigError: the function cannot be traced, an argument was donated before, or an argument
        is no array with values (inside of `jit`).

    Example:
      >>> def loss(w):
      ...     with jax.named_scope("norm"):
      ...         return jnp.sqrt(jnp.sum(w * w))
      >>> trace_nonfinite(loss, jnp.zeros(3)) is None
      True
      >>> report = trace_nonfinite(jax.grad(loss), jnp.zeros(3))
      >>> report.primitive, report.path, report.direction, report.kind, report.cure[:4]
      ('div', 'norm', 'backward', 'inf', 'none')
    """
    program = trace("trace_nonfinite", fn, args, kwargs)
    for name, x in zip(program.names, program.args, strict=True):
        if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise ConfigError(
                f"trace_nonfinite: {name} has no value here ({type(x).__name__}); call it outside"
                " of jit, with arrays"
            )
    _log.info("trace_nonfinite: the program is compiled with every operation under watch")
    arrays = [x for x in program.args if isinstance(x, jax.Array)]
    is_spread = any(len(x.sharding.device_set) > 1 for x in arrays)
    first_fault = find_first_fault(program.closed, program.args, is_spread)
    if first_fault is None:
        return _given(program)
    report = _report(program, first_fault)
    if not cure:
        return report
    where = ", ".join(filter(None, (report.path, report.line)))
    _log.warning(
        "trace_nonfinite: first %s: %s%s (%s); now its cure is looked for (cure=False: it is not)",
        report.kind, report.primitive, f", {where}" if where else "", report.reason,
    )  # fmt: skip
    return dataclasses.replace(report, cure=find_cure(program, first_fault, report.exact))


def _given(program: Program) -> Nonfinite | None:
    """A NaN among the arguments, or what the function closes over, that reaches an output."""
    closed = [(f"a closed-over array of {jnp.shape(x)}", x) for x in program.closed.consts]
    for name, x in [*zip(program.names, program.args, strict=True), *closed]:
        if is_inexact(x) and bool(jnp.any(jnp.isnan(x))):
            _, outs = InstrumentedProgram(program.closed)(program.args)
            if not any(is_nan for _, is_nan in outs):
                return None
            return Nonfinite(
                "argument", name, None, "forward", "", "nan", (Range.of(x),), None, NONE,
                "the function was given it: it broke before this call",
            )  # fmt: skip
    return None


def _report(program: Program, first_fault: FirstFault) -> Nonfinite:
    found, eqn = first_fault.found, first_fault.site.eqn
    ranges, shard, exact = _measured(first_fault)
    location = location_at(program.closed, found.key)
    kind, layers = KINDS[found.code], found.layers
    return Nonfinite(
        primitive=eqn.primitive.name,
        path=location.path,
        layer=None if not layers else layers[0] if len(layers) == 1 else layers,
        direction=direction(program.closed, found.key),
        line=location.line,
        kind=kind,
        ranges=ranges,
        shard=shard,
        cure="",
        reason=reason(eqn, kind, ranges),
        exact=exact,
    )


def _measured(
    first_fault: FirstFault,
) -> tuple[tuple[Range, ...], tuple[int, ...] | None, float | None]:
    """The ranges of the first fault's inputs, the broken shards, and what it gives in float32."""
    found, records, eqn = first_fault.found, first_fault.records, first_fault.site.eqn
    row = np.asarray(records[RANGES, *found.key])[found.stands]
    values = row[-3 * len(eqn.invars) - 2 : -2]
    ranges = tuple(
        Range(aval.dtype.name, tuple(aval.shape), *map(float, three))
        for aval, three in zip(map(aval_of, eqn.invars), values.reshape(-1, 3), strict=True)
        if is_inexact(aval)
    )
    exact = None
    if runs_wide(eqn):
        exact = max(map(float, row[-2:]), key=lambda x: (math.isnan(x), abs(x)))
    if found.shards:
        return ranges, found.shards, exact
    mask = records.get((MASK, *found.key))
    return ranges, None if mask is None else _bad_shards(mask, found.stands), exact


def _bad_shards(mask: Array, index: tuple[int, ...]) -> tuple[int, ...] | None:
    """Numbers of the devices whose part of a mask has something set; None if all have all of it."""
    if mask.sharding.is_fully_replicated:
        return None
    loops = len(index)  # the first axes are those of iterations
    if mask.sharding.shard_shape(mask.shape)[:loops] != mask.shape[:loops]:
        index = ()
    shards = (s for s in mask.addressable_shards if np.asarray(s.data)[index].any())
    return tuple(sorted(shard.device.id for shard in shards))
