"""Custom derivative rules under a transform: the user's rule is kept, at the dtypes that come in.

Replacing only the function of a `custom_jvp` or `custom_vjp` would undo a transform under `grad`:
the rule would still run as it was traced. So function and rule are both evaluated by the transform
and joined anew. What leaves a rule is cast to the dtypes that its function has at the boundary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from mpjax.errors import ConfigError
from mpjax.interpret.core.retrace import Run, cast, is_staged
from mpjax.interpret.core.shard_map import varying
from mpjax.interpret.core.walk import as_typed


def rebuild(
    eqn: JaxprEqn,
    args: Sequence[Any],
    run: Run,
    learn: Callable[[ClosedJaxpr, int], None],
) -> list[Any]:
    """Runs a custom rule's function by a transform, with its rule for later transformation.

    Args:
      eqn: a `custom_jvp_call`, `custom_vjp_call` or `custom_vmap_call`.
      args: its arguments, floating-point ones perhaps in other dtypes than recorded.
      run: evaluates a jaxpr; records nothing.
      learn: is told of a backward rule, before it is run, how many of its first arguments were
        kept from forward; the others are cotangents.
    """
    if eqn.primitive.name == "custom_jvp_call":
        return _jvp(eqn, args, run)
    if eqn.primitive.name == "custom_vmap_call":
        return _vmap(eqn, args, run)
    return _vjp(eqn, args, run, learn)


def _boundary(function: ClosedJaxpr, args: Sequence[Any], run: Run) -> list[Any]:
    """Dtypes of what the plain function gives: those of its rule's results too."""
    shapes = jax.eval_shape(lambda *values: run(function, values, 0).outs, *args)
    return [shape.dtype for shape in shapes]


def _closed_over(consts: Sequence[Any], eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """What a rule closes over, as values of today.

    A rule is traced when it is differentiated, and meets tracers of the trace that the equation
    came from, which is over. Their variables are the equation's first inputs.
    """
    pairs = zip(eqn.invars, values, strict=False)
    known = {atom: x for atom, x in pairs if isinstance(atom, Var)}

    def value(const: Any) -> Any:
        atom = const.val if is_staged(const) else None
        if isinstance(atom, Literal):
            return as_typed(atom.val)
        return known.get(atom, const) if isinstance(atom, Var) else const

    return list(map(value, consts))


def _jvp(eqn: JaxprEqn, args: Sequence[Any], run: Run) -> list[Any]:
    p = eqn.params
    skip = p["num_consts"]

    @jax.custom_jvp
    def function(*values: Any) -> list[Any]:
        return run(p["call_jaxpr"], values, 0).outs

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        absent = [isinstance(t, SymbolicZero) for t in tangents[skip:]]
        jaxpr, consts, zeros = p["jvp_jaxpr_fun"].call_wrapped(*absent)
        consts = _closed_over(consts, eqn, primals[:skip])
        present = [t for t, zero in zip(tangents[skip:], absent, strict=True) if not zero]
        inputs = [*primals[skip:], *present]
        outs = run(ClosedJaxpr(jaxpr, consts), inputs, 1).outs
        tangents_left = iter(outs[len(zeros) :])
        outputs = [
            cast(x, dtype)
            for x, dtype in zip(outs, _boundary(p["call_jaxpr"], primals, run), strict=False)
        ]
        tangents_out = [
            _zero(jax.typeof(y).to_tangent_aval(), p["symbolic_zeros"])
            if zero
            else cast(next(tangents_left), y.dtype)
            for zero, y in zip(zeros, outputs, strict=True)
        ]
        return outputs, tangents_out

    function.defjvp(rule, symbolic_zeros=p["symbolic_zeros"])
    return list(function(*args))


def _zero(aval: Any, symbolic: bool) -> Any:
    """A zero, which a rule with symbolic zeros may leave out of its arithmetic."""
    if symbolic:
        return SymbolicZero(aval)
    if aval.dtype == jax.dtypes.float0:  # of an integer
        return np.zeros(aval.shape, aval.dtype)
    return varying(jnp.zeros(aval.shape, aval.dtype), sorted(aval.manual_axis_type.varying))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """Which arguments of a `custom_vjp` are differentiated: its rule is traced for that."""

    flags: tuple[bool, ...]


def _residuals(params: dict[str, Any]) -> tuple[int, list[int | None]]:
    """How many residuals a rule gives itself, and for each of all which argument it is, or None."""
    _, tree, sources = params["out_trees"]()
    return tree.num_leaves - sum(source is not None for source in sources), sources


def _cotangents(returned: Any) -> list[Any]:
    """The cotangents that a rule gives; since JAX 0.12 they come in a pair with its logs."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], list):
        return returned[0]
    return list(returned)


def _vjp(
    eqn: JaxprEqn, args: Sequence[Any], run: Run, learn: Callable[[ClosedJaxpr, int], None]
) -> list[Any]:
    p = eqn.params
    skip = p["num_consts"]

    @jax.custom_vjp
    def function(*values: Any) -> list[Any]:
        return run(p["call_jaxpr"], values, 0).outs

    # Whether something closed over is differentiated is known with symbolic zeros only.
    symbolic = bool(p["symbolic_zeros"] or skip)

    def forward(*values_in: Any) -> tuple[list[Any], list[Any]]:
        values = [g.value for g in values_in] if symbolic else list(values_in)
        if symbolic and any(g.perturbed for g in values_in[:skip]):
            raise ConfigError(
                f"autocast: the custom_vjp function {_name(eqn)} is differentiated with respect to"
                " an array that it closes over, for which its rule has no cotangent; pass the"
                " array as an argument"
            )
        # A rule without symbolic zeros does not ask what is differentiated.
        flags = tuple(not p["symbolic_zeros"] or g.perturbed for g in values_in[skip:])
        jaxpr, consts = p["fwd_jaxpr_thunk"].call_wrapped(*flags)
        consts = _closed_over(consts, eqn, values[:skip])
        outs = run(ClosedJaxpr(jaxpr, consts), values[skip:], 1).outs
        own, sources = _residuals(p)
        saved = iter(outs[:own])
        residuals = [next(saved) if s is None else values[s] for s in sources]
        wanted = _boundary(p["call_jaxpr"], values, run)
        results = [cast(x, dtype) for x, dtype in zip(outs[own:], wanted, strict=True)]
        # The dtypes of the arguments, for their cotangents; empty, so that nothing is kept alive.
        like = [jnp.zeros((0,), v.dtype) for v in values[skip:]]
        return results, [_Perturbed(flags), residuals, list(values[:skip]), like]

    def backward(saved: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
        perturbed, residuals, outside, like = saved
        jaxpr, _ = p["fwd_jaxpr_thunk"].call_wrapped(*perturbed.flags)
        own, sources = _residuals(p)
        left = iter(jaxpr.outvars[:own])
        atoms = [next(left) if s is None else p["call_jaxpr"].jaxpr.invars[s] for s in sources]
        # A number that the forward rule keeps, the backward rule knows, which may branch on it.
        known = [isinstance(atom, Literal) for atom in atoms]
        avals = [atom.aval for atom, fixed in zip(atoms, known, strict=True) if not fixed]
        tangents = [v.aval.to_tangent_aval() for v in jaxpr.outvars[own:]]
        zeros = [p["symbolic_zeros"] and isinstance(x, SymbolicZero) for x in cotangents]
        present = [
            _zero(x.aval, False) if isinstance(x, SymbolicZero) else x
            for x, zero in zip(cotangents, zeros, strict=True)
            if not zero
        ]
        missing: list[bool] = []

        def traced(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
            variables, left = iter(values), iter(arrays)
            saved = [atom.val if isinstance(atom, Literal) else next(variables) for atom in atoms]
            pairs = zip(tangents, zeros, strict=True)
            full = [SymbolicZero(aval) if zero else next(left) for aval, zero in pairs]
            gradients = _cotangents(p["bwd"].call_wrapped(*saved, *full))
            missing[:] = [type(x).__name__ in ("Zero", "NoneType") for x in gradients]
            return [x for x, none in zip(gradients, missing, strict=True) if not none]

        # As the rule was written, so at the dtypes that it was written for; then evaluated low.
        arrays = [aval for aval, zero in zip(tangents, zeros, strict=True) if not zero]
        closed = jax.make_jaxpr(traced)(avals, arrays)
        closed = ClosedJaxpr(closed.jaxpr, _closed_over(closed.consts, eqn, outside))
        varying_residuals = [x for x, fixed in zip(residuals, known, strict=True) if not fixed]
        learn(closed, len(varying_residuals))
        outs = iter(run(closed, [*varying_residuals, *present], 2).outs)
        found = [None if none else next(outs) for none in missing]
        cast_back = [
            None if x is None else cast(x, y.dtype) for x, y in zip(found, like, strict=True)
        ]
        return (*[None] * skip, *cast_back)

    function.defvjp(forward, backward, symbolic_zeros=symbolic)
    return list(function(*args))


def _name(eqn: JaxprEqn) -> str:
    return str(eqn.params["call_jaxpr"].jaxpr.debug_info.func_name)


def _vmap(eqn: JaxprEqn, args: Sequence[Any], run: Run) -> list[Any]:
    p = eqn.params
    call, tree = p["call"], p["in_tree"]

    @jax.custom_batching.custom_vmap
    def function(*values: Any) -> list[Any]:
        return run(call, values, 0).outs

    @function.def_vmap
    def rule(size: int, batched: Sequence[bool], *values: Any) -> tuple[list[Any], list[bool]]:
        mapped: list[bool] = []

        def traced(*flat: Any) -> list[Any]:
            both = jax.tree.unflatten(tree, flat)
            outs, marks = p["rule"](size, jax.tree.unflatten(tree, batched), *both)
            mapped[:] = jax.tree.leaves(marks)
            return jax.tree.leaves(outs)

        avals = [
            jax.ShapeDtypeStruct(x.shape, aval.dtype)
            for x, aval in zip(values, call.in_avals, strict=True)
        ]
        closed = jax.make_jaxpr(traced)(*avals)  # as it was written; then evaluated low
        outs = run(ClosedJaxpr(closed.jaxpr, _closed_over(closed.consts, eqn, values)), values, 1)
        singles = [
            jax.ShapeDtypeStruct(aval.shape, x.dtype)
            for x, aval in zip(values, call.in_avals, strict=True)
        ]
        wanted = _boundary(call, singles, run)
        return [cast(x, dtype) for x, dtype in zip(outs.outs, wanted, strict=True)], mapped

    return list(function(*args))
