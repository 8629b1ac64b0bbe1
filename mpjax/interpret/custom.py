"""Custom derivative rules under a transform: the user's rule is kept, at the dtypes that come in.

Replacing only the function of a `custom_jvp` or `custom_vjp` would undo a transform under `grad`:
the rule would still run as it was traced. So function and rule are both evaluated by the transform
and joined anew. What leaves a rule is cast to the dtypes that its function has at the boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from mpjax.interpret.retrace import Run, cast, is_staged


def can_rebuild(eqn: JaxprEqn) -> bool:
    """Returns whether the rule can be evaluated by a transform (symbolic zeros cannot)."""
    return not eqn.params.get("symbolic_zeros", False)


def rebuild(eqn: JaxprEqn, args: Sequence[Any], run: Run) -> list[Any]:
    """Runs a custom rule's function by a transform, with its rule for later differentiation.

    Args:
      eqn: a `custom_jvp_call` or `custom_vjp_call`.
      args: its arguments, floating-point ones perhaps in other dtypes than recorded.
      run: evaluates a jaxpr; records nothing.
    """
    if eqn.primitive.name == "custom_jvp_call":
        return _jvp(eqn, args, run)
    return _vjp(eqn, args, run)


def _boundary(function: ClosedJaxpr, args: Sequence[Any], run: Run) -> list[Any]:
    """Dtypes of what the plain function gives: those of its rule's results too."""
    shapes = jax.eval_shape(lambda *values: run(function, values, 0).outs, *args)
    return [shape.dtype for shape in shapes]


def _closed_over(consts: Sequence[Any], eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """What a rule closes over, as values of today.

    A rule is traced when it is differentiated, and meets tracers of the trace that the equation
    came from, which is over. Their variables are the equation's first inputs.
    """
    known = dict(zip(eqn.invars, values, strict=False))
    variables = [c.val if is_staged(c) else None for c in consts]
    return [
        known.get(var, c) if isinstance(var, Var) else c
        for c, var in zip(consts, variables, strict=True)
    ]


def _jvp(eqn: JaxprEqn, args: Sequence[Any], run: Run) -> list[Any]:
    p = eqn.params
    skip = p["num_consts"]

    @jax.custom_jvp
    def function(*values: Any) -> list[Any]:
        return run(p["call_jaxpr"], values, 0).outs

    @function.defjvp
    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        jaxpr, consts, zeros = p["jvp_jaxpr_fun"].call_wrapped(*[False] * (len(args) - skip))
        consts = _closed_over(consts, eqn, primals[:skip])
        mine = [*primals[skip:], *tangents[skip:]]
        outs = run(ClosedJaxpr(jaxpr, consts), mine, 1).outs
        given = iter(outs[len(zeros) :])
        kept = [
            cast(x, dtype)
            for x, dtype in zip(outs, _boundary(p["call_jaxpr"], primals, run), strict=False)
        ]
        tangents_out = [
            jnp.zeros(jnp.shape(y), jax.typeof(y).to_tangent_aval().dtype)
            if zero
            else cast(next(given), y.dtype)
            for zero, y in zip(zeros, kept, strict=True)
        ]
        return kept, tangents_out

    return list(function(*args))


def _residuals(params: dict[str, Any]) -> tuple[int, list[int | None]]:
    """How many residuals a rule gives itself, and for each of all which argument it is, or None."""
    _, tree, sources = params["out_trees"]()
    return tree.num_leaves - sum(source is not None for source in sources), sources


def _cotangents(given: Any) -> list[Any]:
    """The cotangents that a rule gives; since JAX 0.12 they come in a pair with its logs."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], list):
        return given[0]
    return list(given)


def _vjp(eqn: JaxprEqn, args: Sequence[Any], run: Run) -> list[Any]:
    p = eqn.params
    skip, recorded = p["num_consts"], p["call_jaxpr"].in_avals

    @jax.custom_vjp
    def function(*values: Any) -> list[Any]:
        return run(p["call_jaxpr"], values, 0).outs

    def forward(*values: Any) -> tuple[list[Any], list[Any]]:
        jaxpr, consts = p["fwd_jaxpr_thunk"].call_wrapped(*[True] * (len(values) - skip))
        consts = _closed_over(consts, eqn, values[:skip])
        outs = run(ClosedJaxpr(jaxpr, consts), values[skip:], 1).outs
        own, sources = _residuals(p)
        saved = iter(outs[:own])
        residuals = [next(saved) if s is None else values[s] for s in sources]
        wanted = _boundary(p["call_jaxpr"], values, run)
        results = [cast(x, dtype) for x, dtype in zip(outs[own:], wanted, strict=True)]
        # The dtypes of the arguments, for their cotangents; empty, so that nothing is kept alive.
        like = [jnp.zeros((0,), v.dtype) for v in values[skip:]]
        return results, [residuals, list(values[:skip]), like]

    def backward(saved: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
        residuals, outside, like = saved
        jaxpr, _ = p["fwd_jaxpr_thunk"].call_wrapped(*[True] * len(like))
        own, sources = _residuals(p)
        fwd = iter([v.aval for v in jaxpr.outvars[:own]])
        avals = [next(fwd) if s is None else recorded[s] for s in sources]
        avals += [v.aval.to_tangent_aval() for v in jaxpr.outvars[own:]]
        missing: list[bool] = []

        def traced(*values: Any) -> list[Any]:
            given = _cotangents(p["bwd"].call_wrapped(*values))
            missing[:] = [type(x).__name__ in ("Zero", "NoneType") for x in given]
            return [x for x, none in zip(given, missing, strict=True) if not none]

        # As the rule was written, so at the dtypes that it was written for; then evaluated low.
        closed = jax.make_jaxpr(traced)(*avals)
        closed = ClosedJaxpr(closed.jaxpr, _closed_over(closed.consts, eqn, outside))
        outs = iter(run(closed, [*residuals, *cotangents], 2).outs)
        found = [None if none else next(outs) for none in missing]
        cast_back = [
            None if x is None else cast(x, y.dtype) for x, y in zip(found, like, strict=True)
        ]
        return (*[None] * skip, *cast_back)

    function.defvjp(forward, backward)
    return list(function(*args))
