"""Custom derivative rules under a transform: the user's rule stays, at the dtypes that come in.

If only the function of a `custom_jvp` or `custom_vjp` were replaced, `grad` would run the rule as
it was traced. So the transform evaluates function and rule, and both are joined anew. The results
of a rule are cast to the dtypes of its function's results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from mpjax.errors import ConfigError
from mpjax.interpret.core.retrace import Run, aval_of, cast, is_staged
from mpjax.interpret.core.shard_map import zeros
from mpjax.interpret.core.walk import as_typed
from mpjax.typing import Array, DType

Learn: TypeAlias = Callable[[ClosedJaxpr, int], None]


def rebuild(eqn: JaxprEqn, args: Sequence[Array], run: Run, learn: Learn) -> list[Array]:
    """Runs a custom rule's function by a transform, with its rule for later transformation.

    Args:
      eqn: a `custom_jvp_call`, `custom_vjp_call` or `custom_vmap_call`.
      args: its arguments, floating-point ones perhaps in other dtypes than recorded.
      run: evaluates a jaxpr; records nothing.
      learn: is called with a backward rule, before it is run, and the number of its residuals, its
        first arguments; the others are cotangents.
    """
    if eqn.primitive.name == "custom_jvp_call":
        return _jvp(eqn, args, run)
    if eqn.primitive.name == "custom_vmap_call":
        return _vmap(eqn, args, run)
    return _vjp(eqn, args, run, learn)


def _boundary(
    function: ClosedJaxpr, args: Sequence[Array | jax.ShapeDtypeStruct], run: Run
) -> list[DType]:
    """Dtypes of the plain function's results, which those of its rule have too."""
    shapes = jax.eval_shape(lambda *values: run(function, values, 0).outs, *args)
    return [shape.dtype for shape in shapes]


def _closed_over(consts: Sequence[Array], eqn: JaxprEqn, values: Sequence[Array]) -> list[Array]:
    """What a rule closes over, as values of the current trace.

    A rule is traced when it is differentiated, and closes over tracers of the trace that the
    equation came from, which has ended. Their variables are the equation's first inputs.
    """
    pairs = zip(eqn.invars, values, strict=False)
    known = {atom: x for atom, x in pairs if isinstance(atom, Var)}

    def value(const: Any) -> Any:
        atom = const.val if is_staged(const) else None
        if isinstance(atom, Literal):
            return as_typed(atom.val)
        return known.get(atom, const) if isinstance(atom, Var) else const

    return list(map(value, consts))


def _jvp(eqn: JaxprEqn, args: Sequence[Array], run: Run) -> list[Array]:
    p = eqn.params
    skip = p["num_consts"]

    @jax.custom_jvp
    def function(*values: Array) -> list[Array]:
        return run(p["call_jaxpr"], values, 0).outs

    def rule(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[list[Array], list[Any]]:
        absent = [isinstance(t, SymbolicZero) for t in tangents[skip:]]
        jaxpr, consts, missing = p["jvp_jaxpr_fun"].call_wrapped(*absent)
        consts = _closed_over(consts, eqn, primals[:skip])
        present = [t for t, zero in zip(tangents[skip:], absent, strict=True) if not zero]
        inputs = [*primals[skip:], *present]
        outs = run(ClosedJaxpr(jaxpr, consts), inputs, 1).outs
        tangents_left = iter(outs[len(missing) :])
        wanted = _boundary(p["call_jaxpr"], primals, run)
        outputs = [cast(x, dtype) for x, dtype in zip(outs, wanted, strict=False)]

        def tangent(y: Array, is_zero: bool) -> Any:
            if is_zero:
                return _zero(jax.typeof(y).to_tangent_aval(), p["symbolic_zeros"])
            return cast(next(tangents_left), y.dtype)

        return outputs, list(map(tangent, outputs, missing))

    function.defjvp(rule, symbolic_zeros=p["symbolic_zeros"])
    return list(function(*args))


def _zero(aval: ShapedArray, symbolic: bool) -> Any:
    """A zero; a symbolic one for a rule that takes them."""
    if symbolic:
        return SymbolicZero(aval)
    if aval.dtype == jax.dtypes.float0:  # of an integer
        return np.zeros(aval.shape, aval.dtype)
    return zeros(aval)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """Which arguments of a `custom_vjp` are differentiated; its rule is traced for these."""

    flags: tuple[bool, ...]


def _residuals(params: Mapping[str, Any]) -> tuple[int, list[int | None]]:
    """How many residuals a rule computes; and for each residual which argument it is, or None."""
    _, tree, sources = params["out_trees"]()
    return tree.num_leaves - sum(source is not None for source in sources), sources


def _cotangents(returned: Sequence[Any]) -> list[Any]:
    """The cotangents that a rule returns; since JAX 0.12 they come in a pair with its logs."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], list):
        return returned[0]
    return list(returned)


def _vjp(eqn: JaxprEqn, args: Sequence[Array], run: Run, learn: Learn) -> list[Array]:
    p = eqn.params
    skip = p["num_consts"]

    @jax.custom_vjp
    def function(*values: Array) -> list[Array]:
        return run(p["call_jaxpr"], values, 0).outs

    # Only symbolic zeros say whether something closed over is differentiated.
    symbolic = bool(p["symbolic_zeros"] or skip)

    def forward(*values_in: Any) -> tuple[list[Array], tuple[Any, ...]]:
        values = [g.value for g in values_in] if symbolic else list(values_in)
        if symbolic and any(g.perturbed for g in values_in[:skip]):
            name = p["call_jaxpr"].jaxpr.debug_info.func_name
            raise ConfigError(
                f"autocast: the custom_vjp function {name} is differentiated with respect to"
                " an array that it closes over, for which its rule has no cotangent; pass the"
                " array as an argument"
            )
        # A rule without symbolic zeros is traced for all of its arguments.
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
        return results, (_Perturbed(flags), residuals, list(values[:skip]), like)

    def backward(saved: tuple[Any, ...], cotangents: list[Any]) -> tuple[Array | None, ...]:
        perturbed, residuals, outside, like = saved
        jaxpr, _ = p["fwd_jaxpr_thunk"].call_wrapped(*perturbed.flags)
        own, sources = _residuals(p)
        left = iter(jaxpr.outvars[:own])
        atoms = [next(left) if s is None else p["call_jaxpr"].jaxpr.invars[s] for s in sources]
        # A residual that is a literal stays one: the backward rule may branch on it.
        known = [isinstance(atom, Literal) for atom in atoms]
        avals = [atom.aval for atom, fixed in zip(atoms, known, strict=True) if not fixed]
        tangents = [v.aval.to_tangent_aval() for v in jaxpr.outvars[own:]]
        absent = [p["symbolic_zeros"] and isinstance(x, SymbolicZero) for x in cotangents]
        passed = [x for x, is_zero in zip(cotangents, absent, strict=True) if not is_zero]
        present = [_zero(aval_of(x), False) if isinstance(x, SymbolicZero) else x for x in passed]
        missing: list[bool] = []

        def traced(values: Sequence[Array], arrays: Sequence[Array]) -> list[Array]:
            variables, left = iter(values), iter(arrays)
            saved = [atom.val if isinstance(atom, Literal) else next(variables) for atom in atoms]
            pairs = zip(tangents, absent, strict=True)
            full = [SymbolicZero(aval) if is_zero else next(left) for aval, is_zero in pairs]
            gradients = _cotangents(p["bwd"].call_wrapped(*saved, *full))
            missing[:] = [type(x).__name__ in ("Zero", "NoneType") for x in gradients]
            return [x for x, none in zip(gradients, missing, strict=True) if not none]

        # Traced at the dtypes that the rule was written for, then evaluated low.
        arrays = [aval for aval, is_zero in zip(tangents, absent, strict=True) if not is_zero]
        closed = jax.make_jaxpr(traced)(avals, arrays)
        closed = ClosedJaxpr(closed.jaxpr, _closed_over(closed.consts, eqn, outside))
        varying_residuals = [x for x, fixed in zip(residuals, known, strict=True) if not fixed]
        learn(closed, len(varying_residuals))
        outs = iter(run(closed, [*varying_residuals, *present], 2).outs)
        found = [None if none else next(outs) for none in missing]
        pairs = zip(found, like, strict=True)
        return (*[None] * skip, *(None if x is None else cast(x, y.dtype) for x, y in pairs))

    function.defvjp(forward, backward, symbolic_zeros=symbolic)
    return list(function(*args))


def _vmap(eqn: JaxprEqn, args: Sequence[Array], run: Run) -> list[Array]:
    p = eqn.params
    call, tree = p["call"], p["in_tree"]

    @jax.custom_batching.custom_vmap
    def function(*values: Array) -> list[Array]:
        return run(call, values, 0).outs

    @function.def_vmap
    def rule(size: int, batched: Sequence[bool], *values: Array) -> tuple[list[Array], list[bool]]:
        mapped: list[bool] = []

        def traced(*flat: Array) -> list[Array]:
            both = jax.tree.unflatten(tree, flat)
            outs, marks = p["rule"](size, jax.tree.unflatten(tree, batched), *both)
            mapped[:] = jax.tree.leaves(marks)
            return jax.tree.leaves(outs)

        pairs = list(zip(values, call.in_avals, strict=True))
        avals = [jax.ShapeDtypeStruct(x.shape, aval.dtype) for x, aval in pairs]
        closed = jax.make_jaxpr(traced)(*avals)  # at the traced dtypes; then evaluated low
        outs = run(ClosedJaxpr(closed.jaxpr, _closed_over(closed.consts, eqn, values)), values, 1)
        singles = [jax.ShapeDtypeStruct(aval.shape, x.dtype) for x, aval in pairs]
        wanted = _boundary(call, singles, run)
        return [cast(x, dtype) for x, dtype in zip(outs.outs, wanted, strict=True)], mapped

    return list(function(*args))
