"""A program run under watch: which operations made infinities or NaN, and in which iteration.

One jitted pass. Each site, an operation that could make one, records whether its output is finite,
and for loops of unknown length in which iteration it was not (`_first`). What more there is to
know costs ten times as much to compile, so it is asked of chosen sites only: whether the operation
is at fault, what went in, and its output can be repaired.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from mpjax.interpret.control import Rebind
from mpjax.interpret.digest import digest, has_nan, range_of
from mpjax.interpret.fault import (
    FINE,
    INFINITY,
    all_finite,
    can_make,
    can_stop,
    faults,
    is_number,
    repaired,
)
from mpjax.interpret.place import Place
from mpjax.interpret.retrace import Result, cast, is_float
from mpjax.interpret.shards import agreed
from mpjax.interpret.sites import (
    FLAGS,
    MASK,
    RANGES,
    SEEN,
    Found,
    Key,
    Site,
    first,
    found_in,
    level,
    packed,
)  # fmt: skip
from mpjax.interpret.walker import CALLS, CUSTOM_RULES, bind, walk
from mpjax.interpret.widen import is_low, widened

Frame = list[tuple[Key, Any]]  # sites of one trace, with their codes

# Evaluated within the trace of what holds them.
_SAME = CALLS | CUSTOM_RULES


@dataclasses.dataclass
class Watch:
    """What to do while a program runs.

    Args:
      closed: the program.
      checked: sites of which more is asked; which of them are repaired is an input.
      shards: whether they also give the mask of their bad values, to see its shards.
      wide: which operations are computed in float32, by key and place; None leaves all as traced.
    """

    closed: ClosedJaxpr
    checked: tuple[Key, ...] = ()
    shards: bool = False
    wide: Callable[[Key, Place], bool] | None = None

    def __post_init__(self) -> None:
        self.sites: dict[Key, Site] = {}
        self._frames: dict[Key, tuple[Key, ...]] = {}
        self._rebind = Rebind(first)
        self._repairs: Any = None
        self._compiled: Any = None
        self._recorded: list[Any] = []
        self._masked: list[Any] = []

    def __call__(
        self, args: Sequence[Any], repairs: Sequence[Key] = ()
    ) -> tuple[dict[Any, Any], list[tuple[int, bool]]]:
        """Runs the program.

        Args:
          args: its arguments.
          repairs: sites to repair, of `checked`.

        Returns:
          What was recorded; and for each output a digest of its bits and whether it holds a NaN.
        """
        if self._compiled is None:
            # Otherwise XLA may keep a float16 sum in float32, where it does not overflow.
            self._compiled = (
                jax.jit(self._run)
                .lower(list(args), np.zeros(len(self.checked), np.bool_))
                .compile(compiler_options={"xla_allow_excess_precision": False} | _QUICK)
            )
        chosen = np.array([key in repairs for key in self.checked], np.bool_)
        values, masks, digests = self._compiled(list(args), chosen)
        records = dict(zip(self._recorded, jax.device_get(values), strict=True))
        # not fetched: their shards are looked at
        records |= dict(zip(self._masked, masks, strict=True))
        return records, [(int(bits), bool(nan)) for bits, nan in jax.device_get(digests)]

    def found(self, records: dict[Any, Any]) -> list[Found]:
        """Returns the sites that were not finite or at fault, in the order of execution."""
        return sorted(found_in(self.sites, self._frames, records), key=lambda f: f.order)

    def _run(self, args: list[Any], repairs: Any) -> tuple[list[Any], Any, Any]:
        self.sites, self._frames, self._repairs = {}, {}, repairs
        outs, records, _ = self._evaluate(self.closed, args, Place(), (), (), None)
        if self.wide is not None and self.closed.jaxpr.eqns:
            outs, lost = self._narrowed(outs, [aval.dtype for aval in self.closed.out_avals])
            last: Key = (len(self.closed.jaxpr.eqns),)
            self.sites[last] = Site(self.closed.jaxpr.eqns[-1], Place(), ())
            self._frames[last] = (last,)
            records[FLAGS, *last] = packed([lost])
        self._masked = [key for key in records if key[0] == MASK]
        masks = [records.pop(key) for key in self._masked]
        self._recorded = list(records)
        return list(records.values()), masks, [(digest(x), has_nan(x)) for x in outs]

    def _evaluate(
        self,
        closed: ClosedJaxpr,
        args: Sequence[Any],
        outer: Place,
        key: Key,
        levels: tuple[str, ...],
        frame: Frame | None,
    ) -> Result:
        records: dict[Any, Any] = {}
        count, mine = itertools.count(), [] if frame is None else frame

        def visit(eqn: JaxprEqn, place: Place, values: list[Any]) -> list[Any]:
            outs, found, _ = self._visit(eqn, place, values, (*key, next(count)), levels, mine)
            records.update(found)
            return outs

        outs = walk(closed, args, visit, outer, lines=False)
        if frame is None and mine:
            self._frames[key] = tuple(each for each, _ in mine)
            records[FLAGS, *key] = packed([code for _, code in mine])
        return Result(outs, records)

    def _visit(
        self,
        eqn: JaxprEqn,
        place: Place,
        args: list[Any],
        key: Key,
        levels: tuple[str, ...],
        frame: Frame,
    ) -> Result:
        name = eqn.primitive.name

        def run(inner: ClosedJaxpr, values: Sequence[Any], number: int) -> Result:
            if name == "while" and number == 0:  # its test only decides
                return Result(jaxpr_as_fun(inner)(*values))
            step = None if name in ("scan", "while") else number
            around = (*levels, *level(eqn))
            same = frame if name in _SAME else None
            return self._evaluate(inner, values, place, (*key, step), around, same)

        held = self._rebind(eqn, args, run)
        if held is not None:
            return held
        lost: Any = None
        if self.wide is not None and self.wide(key, place) and (wide := widened(eqn, args)):
            outs = wide
        else:
            if self.wide is not None:
                dtypes = [getattr(atom.aval, "dtype", None) for atom in eqn.invars]
                args, lost = self._narrowed(args, dtypes)
            outs = bind(eqn, args)
        if not (can_make(eqn) or can_stop(eqn) or lost is not None):
            return Result(outs)
        self.sites[key] = Site(eqn, place, levels)
        if key in self.checked:
            outs, code, records = self._check(eqn, args, outs, key, levels)
        else:
            numbers = [out for out in outs if is_number(out) and out.size]
            fine = [all_finite(out) for out in numbers if can_make(eqn) or can_stop(eqn)]
            code, records = jnp.int32(FINE), {}
            if fine:
                code = jnp.where(functools.reduce(operator.and_, fine), code, jnp.int32(SEEN))
        frame.append((key, code if lost is None else jnp.maximum(code, lost)))
        return Result(outs, records)

    def _check(
        self, eqn: JaxprEqn, args: list[Any], outs: list[Any], key: Key, levels: tuple[str, ...]
    ) -> tuple[list[Any], Any, dict[Any, Any]]:
        """Outputs, repaired if that is chosen; how bad they were; and what was measured."""
        code, kept = jnp.int32(FINE), []
        records: dict[Any, Any] = {}
        for out in outs:
            if is_number(out) and out.size:
                found, bad = faults(eqn, args, out)
                code = jnp.where(found > FINE, found, code)
                out = repaired(out, agreed(bad, out) & self._repairs[self.checked.index(key)])
                if self.shards and set(levels) <= {"scan", "reverse"}:
                    records.setdefault((MASK, *key), bad)
                legal = (code == FINE) & ~all_finite(out)  # a mask of -inf, or what follows
                code = jnp.where(legal, jnp.int32(SEEN), code)
            kept.append(out)
        measured = [packed([code])[0].astype(jnp.float32), *map(range_of, args)]
        return kept, code, records | {(RANGES, *key): jnp.concatenate(measured)}

    def _narrowed(self, values: Sequence[Any], dtypes: Sequence[Any]) -> tuple[list[Any], Any]:
        """Values in the dtypes that they were traced in; and how bad it is if one did not fit."""
        lost, kept = None, []
        for x, dtype in zip(values, dtypes, strict=True):
            if dtype is not None and hasattr(x, "dtype") and is_float(x) and x.dtype != dtype:
                y = cast(x, dtype)
                over = all_finite(x) & ~all_finite(y)
                code = jnp.where(over, jnp.int32(INFINITY), jnp.int32(FINE))
                lost, x = code if lost is None else jnp.maximum(lost, code), y
            kept.append(x)
        return kept, lost


# One run: what the compiler would save in it, it does not earn.
_QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def any_low(sites: dict[Key, Site]) -> bool:
    """Returns whether an operation of a program has a float narrower than float32 in it."""
    return any(
        is_low(getattr(atom.aval, "dtype", None))
        for site in sites.values()
        for atom in (*site.eqn.invars, *site.eqn.outvars)
    )
