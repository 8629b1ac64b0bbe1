"""A program that records which operations make infinities or NaN, and in which iteration.

It is one jitted program. Each site, an operation that could make one, records whether its output is
finite, and in a `while` loop in which iteration it was not (`first`). Chosen sites are checked
closely, which costs ten times as much to compile: whether the operation is at fault, the range of
its inputs, what it gives in float32; and their outputs can be repaired.

A program that records at every site takes four times as long to compile as one that records at
none, and compiling takes nearly all of the time. So a few sites are checked in a program with these
alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from mpjax.interpret.core.control_flow import Rebind
from mpjax.interpret.core.location import Location
from mpjax.interpret.core.op_lists import FOLLOW, FULL_CUDA, LOW
from mpjax.interpret.core.platforms import branch_taken, check_platform
from mpjax.interpret.core.retrace import RecordKey, Records, Result, aval_of, cast, is_float
from mpjax.interpret.core.shard_map import agreed
from mpjax.interpret.core.walk import CALLS, CUSTOM_RULES, bind, walk
from mpjax.interpret.nonfinite import fault, sites
from mpjax.interpret.nonfinite.fault import FINE, all_finite, is_inexact
from mpjax.interpret.nonfinite.sites import SEEN, Found, Key, Site, packed
from mpjax.interpret.nonfinite.summaries import among, digest, has_nan, range_of
from mpjax.typing import Array, DType, DTypeLike

SiteCodes: TypeAlias = list[tuple[Key, Array]]  # sites of one trace, with their codes
Digests: TypeAlias = list[tuple[int, bool]]  # of outputs: of their bits, and whether they hold NaN
Wide: TypeAlias = Callable[[Key, Location], bool]  # whether an operation is computed in float32

# Evaluated within the trace of what holds them.
_SAME = CALLS | CUSTOM_RULES


@dataclasses.dataclass
class InstrumentedProgram:
    """A program and what it records.

    Args:
      closed: the program.
      checked: sites that are checked closely; which of them are repaired is an input.
      shards: whether they also record the mask of their values at fault, for its shards.
      wide: which operations are computed in float32, by key and location; None: none of them.
      only: the sites that record anything, beside finiteness checks (`is_finite`) and the outputs
        (see `output_key`). None: all sites do.
    """

    closed: ClosedJaxpr
    checked: tuple[Key, ...] = ()
    shards: bool = False
    wide: Wide | None = None
    only: Collection[Key] | None = None

    def __post_init__(self) -> None:
        self._platform = check_platform("trace_nonfinite", None)
        self.sites: dict[Key, Site] = {}
        self._site_keys: dict[Key, tuple[Key, ...]] = {}
        self._rebind = Rebind(sites.first)
        self._repairs: Any = None
        self._compiled: jax.stages.Compiled | None = None
        self._recorded: list[RecordKey] = []
        self._masked: list[RecordKey] = []

    def __call__(
        self, args: Sequence[Array], repairs: Sequence[Key] = ()
    ) -> tuple[Records, Digests]:
        """Runs the program.

        Args:
          args: its arguments.
          repairs: sites to repair, of `checked`.

        Returns:
          What was recorded; and for each output a digest of its bits and whether it holds a NaN,
          none if `only` says what to record.
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
        records |= dict(zip(self._masked, masks, strict=True))  # on their devices, for their shards
        return records, [(int(bits), bool(nan)) for bits, nan in jax.device_get(digests)]

    def found(self, records: Records) -> list[Found]:
        """Returns the sites that were not finite or at fault, in the order of execution."""
        return sorted(sites.found_in(self.sites, self._site_keys, records), key=lambda f: f.order)

    def _run(
        self, args: list[Array], repairs: Array
    ) -> tuple[list[Array], list[Array], list[tuple[Array, Array]]]:
        self.sites, self._site_keys, self._repairs = {}, {}, repairs
        outs, records, _ = self._evaluate(self.closed, args, Location(), (), (), None)
        if self.closed.jaxpr.eqns:
            records |= self._outputs(outs)
        self._masked = [key for key in records if key[0] == sites.MASK]
        masks = [records.pop(key) for key in self._masked]
        self._recorded = list(records)
        digests = [(digest(x), has_nan(x)) for x in outs] if self.only is None else []
        return list(records.values()), masks, digests

    def _outputs(self, outs: Sequence[Array]) -> Records:
        """Records of the outputs that do not fit their dtype, or are not finite."""
        records: Records = {}
        for number, (x, aval) in enumerate(zip(outs, self.closed.out_avals, strict=True)):
            codes = []
            if self.wide is not None:
                (x,), lost = self._narrowed([x], [getattr(aval, "dtype", None)])
                codes += [] if lost is None else [lost]
            if self.only is not None and is_inexact(x) and jnp.size(x):
                codes.append(jnp.where(all_finite(x), jnp.int32(FINE), jnp.int32(SEEN)))
            if codes:
                key = sites.output_key(self.closed, number)
                self.sites[key] = Site(self.closed.jaxpr.eqns[-1], Location(), ())
                self._site_keys[key] = (key,)
                code = codes[0]
                if len(codes) > 1:  # an output that does not fit is infinite for that reason
                    code = jnp.where(code > FINE, code, codes[1])
                records[sites.FLAGS, *key] = packed([code])
        return records

    def _evaluate(
        self,
        closed: ClosedJaxpr,
        args: Sequence[Array],
        outer: Location,
        key: Key,
        levels: tuple[str, ...],
        site_codes: SiteCodes | None,
    ) -> Result:
        records: Records = {}
        count, codes = itertools.count(), [] if site_codes is None else site_codes

        def visit(eqn: JaxprEqn, location: Location, values: list[Array]) -> list[Array]:
            outs, found, _ = self._visit(eqn, location, values, (*key, next(count)), levels, codes)
            records.update(found)
            return outs

        outs = walk(closed, args, visit, outer, lines=False)
        if site_codes is None and codes:
            codes.sort(key=lambda pair: pair[1].dtype != jnp.bool_)  # as `packed` takes them
            self._site_keys[key] = tuple(each for each, _ in codes)
            records[sites.FLAGS, *key] = packed([code for _, code in codes])
        return Result(outs, records)

    def _visit(
        self,
        eqn: JaxprEqn,
        location: Location,
        args: list[Array],
        key: Key,
        levels: tuple[str, ...],
        site_codes: SiteCodes,
    ) -> Result:
        name = eqn.primitive.name

        def run(inner: ClosedJaxpr, values: Sequence[Array], number: int) -> Result:
            if name == "while" and number == 0:  # a test has no sites
                return Result(jaxpr_as_fun(inner)(*values))
            step = None if name in ("scan", "while") else number
            around = (*levels, *sites.level(eqn))
            same = site_codes if name in _SAME else None
            return self._evaluate(inner, values, location, (*key, step), around, same)

        branch = branch_taken(eqn, self._platform)
        if branch is not None:  # the others are for other platforms
            inner = eqn.params["branches"][branch]
            return self._evaluate(inner, args[1:], location, (*key, branch), levels, site_codes)
        held = self._rebind(eqn, args, run)
        if held is not None:
            return held
        lost: Array | None = None
        if self.wide is not None and self.wide(key, location) and (wide := widened(eqn, args)):
            outs = wide
        else:
            if self.wide is not None:
                dtypes = [getattr(atom.aval, "dtype", None) for atom in eqn.invars]
                args, lost = self._narrowed(args, dtypes)
            outs = bind(eqn, args)
        makes = fault.can_make(eqn) or fault.can_stop(eqn)
        asks = self.only is not None and name == "is_finite"
        wanted = asks or key in self.only if self.only is not None else makes or lost is not None
        if not wanted:
            return Result(outs)
        self.sites[key] = Site(eqn, location, levels)
        if key in self.checked:
            outs, code, records = self._check(eqn, args, outs, key, levels)
            site_codes.append((key, code if lost is None else jnp.maximum(code, lost)))
            return Result(outs, records)
        fine = [jnp.all(out) for out in outs] if asks else []
        if makes:
            fine = [all_finite(out) for out in outs if is_inexact(out) and out.size]
        code = functools.reduce(operator.and_, fine) if fine else jnp.ones((), jnp.bool_)
        if lost is not None:
            code = jnp.where(code, jnp.int32(FINE), jnp.int32(SEEN))
            code = jnp.where(lost > FINE, lost, code)
        site_codes.append((key, code))
        return Result(outs)

    def _check(
        self, eqn: JaxprEqn, args: list[Array], outs: list[Array], key: Key, levels: tuple[str, ...]
    ) -> tuple[list[Array], Array, Records]:
        """Outputs, repaired if that is chosen; their code, see `faults`; and what was measured."""
        code, results = jnp.int32(FINE), []
        records: Records = {}
        wide = widened(eqn, args) or outs
        least, most = jnp.float32(jnp.inf), jnp.float32(-jnp.inf)  # in float32, where it broke
        for out, exact in zip(outs, wide, strict=True):
            if is_inexact(out) and out.size:
                found, nonfinite = fault.faults(eqn, args, out)
                code = jnp.where(found > FINE, found, code)
                least, most = among(exact, nonfinite, least, most)
                chosen = self._repairs[self.checked.index(key)]
                out = fault.repaired(out, agreed(nonfinite, out) & chosen)
                if self.shards and set(levels) <= {"scan", "reverse"}:
                    records.setdefault((sites.MASK, *key), nonfinite)
                legal = (code == FINE) & ~all_finite(out)  # a mask of -inf, or what follows
                code = jnp.where(legal, jnp.int32(SEEN), code)
            results.append(out)
        measured = [packed([code])[0].astype(jnp.float32), *map(range_of, args)]
        measured.append(jnp.stack([least, most]))
        return results, code, records | {(sites.RANGES, *key): jnp.concatenate(measured)}

    def _narrowed(
        self, values: Sequence[Array], dtypes: Sequence[DType | None]
    ) -> tuple[list[Array], Array | None]:
        """Values in the dtypes that they were traced in; `INFINITY` if one did not fit."""
        lost: Array | None = None
        results = []
        for x, dtype in zip(values, dtypes, strict=True):
            if dtype is not None and is_float(x) and x.dtype != dtype:
                y = cast(x, dtype)
                over = all_finite(x) & ~all_finite(y)
                code = jnp.where(over, jnp.int32(fault.INFINITY), jnp.int32(FINE))
                lost, x = code if lost is None else jnp.maximum(lost, code), y
            results.append(x)
        return results, lost


# The program runs once, so that optimizing it takes longer than it saves.
_QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


_FULL = jnp.dtype(jnp.float32)
_KNOWN = FOLLOW | FULL_CUDA | LOW | {"convert_element_type"}


def is_low(dtype: DTypeLike | None) -> bool:
    """Returns whether a dtype is a float narrower than float32."""
    return (
        dtype is not None
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.dtype(dtype).itemsize < _FULL.itemsize
    )


def widened(eqn: JaxprEqn, args: Sequence[Array]) -> list[Array] | None:
    """Runs an operation with everything low in float32; None for one that has to stay as it is.

    Args:
      eqn: the operation.
      args: its arguments, in whatever dtypes they come.
    """
    name = eqn.primitive.name
    if name not in _KNOWN:
        return None
    if name == "convert_element_type":
        if not is_low(eqn.params["new_dtype"]):
            return bind(eqn, args)
        return [lax.convert_element_type(args[0], jnp.float32)]
    floats = [x.dtype for x in args if is_float(x)]
    if not any(map(is_low, floats)) and not _mixed(eqn, floats):
        return None
    values = [cast(x, _FULL) if is_float(x) and is_low(x.dtype) else x for x in args]
    asked = is_low(eqn.params.get("preferred_element_type"))
    return bind(eqn, values, **({"preferred_element_type": _FULL} if asked else {}))


def runs_wide(eqn: JaxprEqn) -> bool:
    """Returns whether an operation is float32 already, or `widened` can run it so."""
    return eqn.primitive.name in _KNOWN or not any(
        is_low(getattr(atom.aval, "dtype", None)) for atom in (*eqn.invars, *eqn.outvars)
    )


def _mixed(eqn: JaxprEqn, dtypes: Sequence[DType]) -> bool:
    """Whether it was traced low and has float32 arguments already."""
    return list(dtypes) != [aval_of(a).dtype for a in eqn.invars if is_float(a.aval)]


def any_low(found: dict[Key, Site]) -> bool:
    """Returns whether an operation of a program has a float narrower than float32 in it."""
    return any(
        is_low(getattr(atom.aval, "dtype", None))
        for site in found.values()
        for atom in (*site.eqn.invars, *site.eqn.outvars)
    )
