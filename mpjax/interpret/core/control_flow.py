"""Equations that hold jaxprs, rebuilt around what a transform makes of those jaxprs.

Each rule keeps the primitive and its settings (donation, shardings, remat policy, unrolling) and
puts new jaxprs in. A transform may change dtypes: carries of loops then take the widest of what
goes in and comes out, and the branches of a conditional agree on the widest of theirs. It may also
record values: what is recorded in a scan is stacked, in a loop folded, in a branch that does not
run zero, in a `shard_map` one for each shard.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun, mapped_aval

from mpjax.formats import widest
from mpjax.interpret.core.retrace import (
    Result,
    Run,
    Traced,
    at_least,
    cast,
    is_float,
    retrace,
    widen,
)
from mpjax.interpret.core.shard_map import run_shards, varying
from mpjax.interpret.core.walk import CUSTOM_RULES, bind, scan_sizes

Fold = Callable[[Any, Any, Any], Any]  # so far, of this iteration, its number -> so far


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
        self._known: dict[Any, tuple[Traced, ClosedJaxpr]] = {}

    def __call__(
        self, eqn: JaxprEqn, args: Sequence[Any], run: Run, tag: Hashable = None
    ) -> Result | None:
        """Runs an equation.

        Args:
          eqn: the equation.
          args: its arguments, floating-point ones perhaps in other dtypes than recorded.
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

    def traced(
        self, held: ClosedJaxpr, avals: Sequence[Any], fn: Callable[..., Result], tag: Hashable
    ) -> Traced:
        """Traces `fn`, which evaluates `held`, or takes what it gave the last time."""
        if tag is None:
            return retrace(fn, avals, held)
        key = (id(held.jaxpr), tag, tuple(avals))
        if key not in self._known:
            self._known[key] = retrace(fn, avals, held), held  # held, so that its id stays its own
        return self._known[key][0]

    def _jit(self, eqn: JaxprEqn, args: Sequence[Any], run: Run, tag: Hashable) -> Result:
        p = eqn.params
        new = self.traced(
            p["jaxpr"], _avals(args), lambda *xs: run(p["jaxpr"], xs, 0), _also(tag, "jit")
        )
        n = len(new.consts)
        changed = {
            "jaxpr": new.closed,
            "donated_invars": (*[False] * n, *p["donated_invars"]),
            "in_shardings": (*p["in_shardings"][:1] * n, *p["in_shardings"]),
            "in_layouts": (*[None] * n, *p["in_layouts"]),
        }
        return new.split(bind(eqn, [*new.consts, *args], **changed))

    def _scan(self, eqn: JaxprEqn, args: Sequence[Any], run: Run, tag: Hashable) -> Result:
        p = eqn.params
        n, size = scan_sizes(eqn)
        m = n + size
        consts, carry, xs = list(args[:n]), list(args[n:m]), list(args[m:])

        def body(*values: Any) -> Result:
            outs, records, note = run(p["jaxpr"], values, 0)
            return Result(at_least(outs, values[n:m]), records, note)

        while True:
            avals = _avals([*consts, *carry])
            avals += [mapped_aval(p["length"], 0, aval) for aval in _avals(xs)]
            new = self.traced(p["jaxpr"], avals, body, _also(tag, n, m))
            if not widen(carry, new):
                break
        if "num_consts" not in p:  # JAX 0.12 spells it in private trees
            return _public_scan(eqn, new, [*new.consts, *consts], carry, xs)
        changed = {"jaxpr": new.closed, "num_consts": n + len(new.consts)}
        if "linear" in p:
            changed["linear"] = (*[False] * len(new.consts), *p["linear"])
        return new.split(bind(eqn, [*new.consts, *consts, *carry, *xs], **changed))

    def _while(self, eqn: JaxprEqn, args: Sequence[Any], run: Run, tag: Hashable) -> Result:
        p = eqn.params
        n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        tests, consts, carry = list(args[:n]), list(args[n:m]), list(args[m:])

        def body(*values: Any) -> Result:
            outs, records, note = run(p["body_jaxpr"], values, 1)
            return Result(at_least(outs, values[m - n :]), records, note)

        while True:
            new = self.traced(
                p["body_jaxpr"], _avals([*consts, *carry]), body, _also(tag, "body", m - n)
            )
            if not widen(carry, new):
                break
        if new.keys:
            return self._recording_while(p["cond_jaxpr"], tests, [*new.consts, *consts], carry, new)
        test = self.traced(
            p["cond_jaxpr"],
            _avals([*tests, *carry]),
            lambda *values: run(p["cond_jaxpr"], values, 0),
            _also(tag, "test"),
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
        tests: list[Any],
        consts: list[Any],
        carry: list[Any],
        body: Traced,
    ) -> Result:
        if self._fold is None:
            raise TypeError("a while loop cannot hand out what is recorded in it without a fold")
        fold, size = self._fold, len(carry)
        State = tuple[list[Any], list[Any], Any]

        def goes_on(carried: list[Any]) -> Any:
            return jaxpr_as_fun(test)(*tests, *carried)[0]

        def more(state: State) -> Any:
            return jnp.any(goes_on(state[0]))

        def once(state: State) -> State:
            outs = jaxpr_as_fun(body.closed)(*consts, *state[0])
            found = [fold(old, x, state[2]) for old, x in zip(state[1], outs[size:], strict=True)]
            carried = list(outs[:size])
            if test.out_avals[0].shape:  # under vmap: what has ended stays as it is
                on = goes_on(state[0])
                carried = [
                    jnp.where(jnp.reshape(on, on.shape + (1,) * (x.ndim - on.ndim)), x, old)
                    for x, old in zip(carried, state[0], strict=True)
                ]
            return carried, found, state[2] + 1

        empty = [
            varying(jnp.zeros(a.shape, a.dtype), sorted(a.manual_axis_type.varying))
            for a in body.closed.out_avals[size:]
        ]
        outs, found, _ = lax.while_loop(more, once, (carry, empty, jnp.int32(0)))
        return body.split([*outs, *found])

    def _cond(self, eqn: JaxprEqn, args: Sequence[Any], run: Run, tag: Hashable) -> Result:
        operands = list(args[1:])
        avals = _avals(operands)
        first = [
            self.traced(b, avals, lambda *xs, b=b, i=i: run(b, xs, i), _also(tag, "branch", i))
            for i, b in enumerate(eqn.params["branches"])
        ]
        dtypes = [
            widest(*[a.dtype for a in outs]) if is_float(outs[0]) else outs[0].dtype
            for outs in zip(*[t.closed.out_avals[: t.own] for t in first], strict=True)
        ]
        shapes = {
            key: aval
            for t in first
            for key, aval in zip(t.keys, t.closed.out_avals[t.own :], strict=True)
        }
        propagation = {key: set[str]() for key in shapes}  # of records inside a `shard_map`
        for t in first:
            for key, aval in zip(t.keys, t.closed.out_avals[t.own :], strict=True):
                propagation[key] |= aval.manual_axis_type.varying
        hoisted = [x for t in first for x in t.consts]

        def aligned(t: Traced, start: int) -> Traced:
            def branch(*xs: Any) -> Result:
                constants = xs[start : start + len(t.consts)]
                own, records, note = t.split(
                    jaxpr_as_fun(t.closed)(*constants, *xs[len(hoisted) :])
                )
                # A dict of all keys in one order: what this branch does not record is zero.
                found = {k: records.get(k, jnp.zeros(a.shape, a.dtype)) for k, a in shapes.items()}
                filled = {k: varying(x, sorted(propagation[k])) for k, x in found.items()}
                outs = [cast(x, dtype) for x, dtype in zip(own, dtypes, strict=True)]
                return Result(outs, filled, note)

            return retrace(branch, [*_avals(hoisted), *avals])

        final, start = [], 0
        for t in first:
            same = not hoisted and t.keys == tuple(shapes) and not any(propagation.values())
            same = same and [a.dtype for a in t.closed.out_avals[: t.own]] == dtypes
            final.append(t if same else aligned(t, start))
            start += len(t.consts)
        outs = bind(eqn, [args[0], *hoisted, *operands], branches=tuple(t.closed for t in final))
        return final[0].split(outs)

    def _composite(self, eqn: JaxprEqn, args: Sequence[Any], run: Run, tag: Hashable) -> Result:
        name = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"  # JAX 0.12: without its consts
        held = eqn.params[name] if name == "jaxpr" else ClosedJaxpr(eqn.params[name], ())
        new = self.traced(held, _avals(args), lambda *xs: run(held, xs, 0), _also(tag, "composite"))
        body = new.closed if name == "jaxpr" else new.closed.jaxpr
        return new.split(bind(eqn, [*new.consts, *args], **{name: body}))

    def _remat(self, eqn: JaxprEqn, args: Sequence[Any], run: Run, tag: Hashable) -> Result:
        held = ClosedJaxpr(eqn.params["jaxpr"], ())
        new = self.traced(held, _avals(args), lambda *xs: run(held, xs, 0), _also(tag, "remat"))
        changed: dict[str, Any] = {"jaxpr": new.closed.jaxpr}
        if isinstance(eqn.params["prevent_cse"], tuple):
            changed["prevent_cse"] = (*[False] * len(new.consts), *eqn.params["prevent_cse"])
        return new.split(bind(eqn, [*new.consts, *args], **changed))


def _public_scan(
    eqn: JaxprEqn, body: Traced, consts: list[Any], carry: list[Any], xs: list[Any]
) -> Result:
    size, p = len(carry), eqn.params

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = jaxpr_as_fun(body.closed)(*consts, *carry, *x)
        return outs[:size], outs[size:]

    last, ys = lax.scan(
        step, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return body.split([*last, *ys])


def _avals(values: Sequence[Any]) -> list[Any]:
    return [jax.typeof(x) for x in values]


def _also(tag: Hashable, *more: Hashable) -> Hashable:
    return None if tag is None else (tag, *more)


def _in_place(eqn: JaxprEqn, args: Sequence[Any], run: Run, *_: Any) -> Result:
    held = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in eqn.params)
    held = held if isinstance(held, ClosedJaxpr) else ClosedJaxpr(held, ())
    outs, records, note = run(held, args, 0)
    shardings = eqn.params.get("out_shardings", (None,) * len(outs))
    results = [
        lax.with_sharding_constraint(x, s) if isinstance(s, jax.sharding.Sharding) else x
        for x, s in zip(outs, shardings, strict=True)
    ]
    return Result(results, records, note)


_IN_PLACE_WHEN_FOLDED = CUSTOM_RULES | {"jit", "pjit", "composite", "custom_vmap_call"}
_RULES: dict[str, Callable[..., Result]] = {
    "jit": Rebind._jit,
    "pjit": Rebind._jit,
    "closed_call": lambda self, *rest: _in_place(*rest),
    "core_call": lambda self, *rest: _in_place(*rest),
    "scan": Rebind._scan,
    "while": Rebind._while,
    "cond": Rebind._cond,
    "remat2": Rebind._remat,
    "checkpoint": Rebind._remat,
    "composite": Rebind._composite,
    "shard_map": lambda self, eqn, args, run, tag: run_shards(eqn, args, run),
}
REBUILT = frozenset(_RULES)  # names of the equations that `Rebind` knows
