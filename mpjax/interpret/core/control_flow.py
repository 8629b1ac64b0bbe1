"""Equations that hold jaxprs, rebuilt around what a transform makes of those jaxprs.

Each rule keeps the primitive and its settings (donation, shardings, remat policy, unrolling) and
puts new jaxprs in. A transform may change dtypes: carries of loops then take the widest of what
goes in and comes out, and the branches of a conditional agree on the widest of theirs. It may also
record values: what is recorded in a scan is stacked, in a loop folded, in a branch that does not
run zero, in a `shard_map` one for each shard.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import AbstractValue
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun, mapped_aval

from mpjax.formats import widest
from mpjax.interpret.core.retrace import (
    Result,
    Run,
    Traced,
    as_closed,
    avals_of,
    cast,
    is_float,
    retrace,
)
from mpjax.interpret.core.shard_map import run_shards, varying, zeros
from mpjax.interpret.core.walk import CUSTOM_RULES, bind, scan_sizes
from mpjax.typing import Array

# so far, of this iteration, its number -> so far
Fold: TypeAlias = Callable[[Array, Array, Array], Array]


class Rebind:
    """Runs equations that hold jaxprs, with each of those evaluated by a transform.

    Args:
      fold: how a `while` loop adds what an iteration records to what was recorded before, which
        starts at zero. With it `jit` and custom rules are evaluated in place, which a transform
        that is never differentiated can do. Without it nothing may be recorded in a `while` or a
        `jit`, and custom rules are left to the transform.
    """

    def __init__(self, fold: Fold | None = None) -> None:
        self._fold = fold
        self._known: dict[Hashable, tuple[Traced, ClosedJaxpr]] = {}

    def __call__(
        self, eqn: JaxprEqn, args: Sequence[Array], run: Run, tag: Hashable = None
    ) -> Result | None:
        """Runs an equation.

        Args:
          eqn: the equation.
          args: its arguments, floating-point ones perhaps in other dtypes than recorded. Behind
            those of a scan may be further arrays; `run` gets their slices behind its own values.
          run: evaluates one of its jaxprs. It may be called more than once.
          tag: what decides, beside jaxpr and avals, what `run` makes of a jaxpr; a jaxpr that is
            met again under the same tag is not evaluated again. None: always evaluated.

        Returns:
          Its results; None for an equation that holds no jaxpr or is not to be looked into.
        """
        name = eqn.primitive.name
        if self._fold is not None and name in _IN_PLACE_WHEN_FOLDED:
            return _in_place(eqn, args, run)
        rule = _RULES.get(name)
        return rule(self, eqn, args, run, tag) if rule else None

    def _traced(
        self,
        held: ClosedJaxpr,
        avals: Sequence[AbstractValue],
        fn: Callable[..., Result],
        tag: Hashable,
        *more: Hashable,
    ) -> Traced:
        """Traces `fn`, which evaluates `held`, or takes what it gave under the same tags."""
        if tag is None:
            return retrace(fn, avals, held)
        key = (id(held.jaxpr), tag, more, tuple(avals))
        if key not in self._known:
            self._known[key] = retrace(fn, avals, held), held  # held, so that its id stays its own
        return self._known[key][0]

    def _call(self, eqn: JaxprEqn, args: Sequence[Array], run: Run, tag: Hashable) -> Result:
        """A `jit`, a `checkpoint` or a composite."""
        p = eqn.params
        name = "jaxpr" if "jaxpr" in p else "call_jaxpr"  # of a composite since JAX 0.12
        held = as_closed(p[name])
        new = self._traced(held, avals_of(args), lambda *xs: run(held, xs, 0), tag, "call")
        changed = _for_constants(eqn, len(new.consts))
        changed[name] = new.closed if held is p[name] else new.closed.jaxpr
        return new.split(bind(eqn, [*new.consts, *args], **changed))

    def _loop(
        self,
        held: ClosedJaxpr,
        number: int,
        consts: Sequence[Array],
        carry: list[Array],
        xs: Sequence[AbstractValue],
        run: Run,
        tag: Hashable,
    ) -> Traced:
        """Traces a loop's body; casts its carry until it is as wide as what the body gives."""
        start, size = len(consts), len(carry)

        def body(*values: Array) -> Result:
            outs, records, bounds = run(held, values, number)
            carried = [
                cast(x, widest(x.dtype, c.dtype)) if is_float(x) else x
                for x, c in zip(outs[:size], values[start : start + size], strict=True)
            ]
            return Result([*carried, *outs[size:]], records, bounds)

        while True:
            avals = [*avals_of([*consts, *carry]), *xs]
            new = self._traced(held, avals, body, tag, "loop", number, start, size)
            wanted = [aval.dtype for aval in new.avals[:size]]
            if wanted == [c.dtype for c in carry]:
                return new
            carry[:] = [cast(c, dtype) for c, dtype in zip(carry, wanted, strict=True)]

    def _scan(self, eqn: JaxprEqn, args: Sequence[Array], run: Run, tag: Hashable) -> Result:
        p = eqn.params
        n, size = scan_sizes(eqn)
        consts, carry, xs = list(args[:n]), list(args[n : n + size]), list(args[n + size :])
        slices = [mapped_aval(p["length"], 0, aval) for aval in avals_of(xs)]
        new = self._loop(p["jaxpr"], 0, consts, carry, slices, run, tag)
        if "num_consts" not in p:  # JAX 0.12 spells it in private trees
            return _public_scan(eqn, new, [*new.consts, *consts], carry, xs)
        changed = {
            **_for_constants(eqn, len(new.consts)),
            "jaxpr": new.closed,
            "num_consts": n + len(new.consts),
        }
        if isinstance(linear := changed.get("linear"), tuple):  # of arrays that are sliced as well
            changed["linear"] = linear + (False,) * (len(args) - len(eqn.invars))
        return new.split(bind(eqn, [*new.consts, *consts, *carry, *xs], **changed))

    def _while(self, eqn: JaxprEqn, args: Sequence[Array], run: Run, tag: Hashable) -> Result:
        p = eqn.params
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        tests, consts, carry = list(args[:n]), list(args[n:m]), list(args[m:])
        new = self._loop(p["body_jaxpr"], 1, consts, carry, [], run, tag)
        if new.keys:
            return self._recording_while(p["cond_jaxpr"], tests, [*new.consts, *consts], carry, new)
        test = self._traced(
            p["cond_jaxpr"],
            avals_of([*tests, *carry]),
            lambda *values: run(p["cond_jaxpr"], values, 0),
            tag,
            "test",
        )
        changed = {
            "cond_jaxpr": test.closed,
            "body_jaxpr": new.closed,
            "cond_nconsts": n + len(test.consts),
            "body_nconsts": m - n + len(new.consts),
        }
        return new.split(bind(eqn, [*test.consts, *tests, *new.consts, *consts, *carry], **changed))

    def _recording_while(
        self,
        test: ClosedJaxpr,
        tests: list[Array],
        consts: list[Array],
        carry: list[Array],
        body: Traced,
    ) -> Result:
        if self._fold is None:
            raise TypeError("a while loop cannot hand out what is recorded in it without a fold")
        fold, size = self._fold, len(carry)
        State = tuple[list[Array], list[Array], Array]

        def goes_on(carried: list[Array]) -> Array:
            return jaxpr_as_fun(test)(*tests, *carried)[0]

        def once(state: State) -> State:
            carried, found, number = state
            outs = jaxpr_as_fun(body.closed)(*consts, *carried)
            found = [fold(old, x, number) for old, x in zip(found, outs[size:], strict=True)]
            after = list(outs[:size])
            if test.out_avals[0].shape:  # under vmap: what has ended stays as it is
                on = goes_on(carried)
                after = [
                    jnp.where(jnp.reshape(on, on.shape + (1,) * (x.ndim - on.ndim)), x, old)
                    for x, old in zip(after, carried, strict=True)
                ]
            return after, found, number + 1

        empty = [zeros(aval) for aval in body.recorded.values()]
        outs, found, _ = lax.while_loop(
            lambda state: jnp.any(goes_on(state[0])), once, (carry, empty, jnp.int32(0))
        )
        return body.split([*outs, *found])

    def _cond(self, eqn: JaxprEqn, args: Sequence[Array], run: Run, tag: Hashable) -> Result:
        operands = list(args[1:])
        avals = avals_of(operands)
        first = [
            self._traced(b, avals, lambda *xs, b=b, i=i: run(b, xs, i), tag, "branch", i)
            for i, b in enumerate(eqn.params["branches"])
        ]
        dtypes = [
            widest(*[a.dtype for a in outs]) if is_float(outs[0]) else outs[0].dtype
            for outs in zip(*[t.avals for t in first], strict=True)
        ]
        shapes = {key: aval for t in first for key, aval in t.recorded.items()}
        axes = {key: set[str]() for key in shapes}  # of records inside a `shard_map`
        for t in first:
            for key, aval in t.recorded.items():
                axes[key] |= aval.manual_axis_type.varying
        hoisted = [x for t in first for x in t.consts]

        def aligned(t: Traced, start: int) -> Traced:
            def branch(*xs: Array) -> Result:
                constants = xs[start : start + len(t.consts)]
                own, records, bounds = t.split(
                    jaxpr_as_fun(t.closed)(*constants, *xs[len(hoisted) :])
                )
                # A dict of all keys in one order: what this branch does not record is zero.
                found = {k: records.get(k, jnp.zeros(a.shape, a.dtype)) for k, a in shapes.items()}
                filled = {k: varying(x, sorted(axes[k])) for k, x in found.items()}
                outs = [cast(x, dtype) for x, dtype in zip(own, dtypes, strict=True)]
                return Result(outs, filled, bounds)

            return retrace(branch, [*avals_of(hoisted), *avals])

        final, start = [], 0
        for t in first:
            same = not hoisted and t.keys == tuple(shapes) and not any(axes.values())
            same = same and [a.dtype for a in t.avals] == dtypes
            final.append(t if same else aligned(t, start))
            start += len(t.consts)
        outs = bind(eqn, [args[0], *hoisted, *operands], branches=tuple(t.closed for t in final))
        return final[0].split(outs)


def _for_constants(eqn: JaxprEqn, count: int) -> dict[str, Any]:
    """Settings that an equation has for each argument, with those of as many constants before."""
    p = eqn.params
    fill: dict[str, tuple[object, ...]]
    fill = {"donated_invars": (False,), "prevent_cse": (False,), "linear": (False,)}
    fill |= {"in_layouts": (None,), "in_shardings": p.get("in_shardings", ())[:1]}
    return {k: x * count + p[k] for k, x in fill.items() if isinstance(p.get(k), tuple)}


def _public_scan(
    eqn: JaxprEqn, body: Traced, consts: list[Array], carry: list[Array], xs: list[Array]
) -> Result:
    size, p = len(carry), eqn.params

    def step(carry: list[Array], x: list[Array]) -> tuple[list[Array], list[Array]]:
        outs = jaxpr_as_fun(body.closed)(*consts, *carry, *x)
        return outs[:size], outs[size:]

    last, ys = lax.scan(
        step, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return body.split([*last, *ys])


def _in_place(eqn: JaxprEqn, args: Sequence[Array], run: Run) -> Result:
    held = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in eqn.params)
    result = run(as_closed(held), args, 0)
    shardings = eqn.params.get("out_shardings", (None,) * len(result.outs))
    outs = [
        lax.with_sharding_constraint(x, s) if isinstance(s, jax.sharding.Sharding) else x
        for x, s in zip(result.outs, shardings, strict=True)
    ]
    return result._replace(outs=outs)


_IN_PLACE_WHEN_FOLDED = CUSTOM_RULES | {"jit", "pjit", "composite", "custom_vmap_call"}
_RULES: dict[str, Callable[[Rebind, JaxprEqn, Sequence[Array], Run, Hashable], Result]] = {
    **dict.fromkeys(("jit", "pjit", "remat2", "checkpoint", "composite"), Rebind._call),
    **dict.fromkeys(
        ("closed_call", "core_call"), lambda self, eqn, args, run, tag: _in_place(eqn, args, run)
    ),
    "scan": Rebind._scan,
    "while": Rebind._while,
    "cond": Rebind._cond,
    "shard_map": lambda self, eqn, args, run, tag: run_shards(eqn, args, run),
}
REBUILT = frozenset(_RULES)  # names of the equations that `Rebind` knows
