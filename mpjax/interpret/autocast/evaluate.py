"""How autocast runs each equation of a jaxpr: which dtype, which casts, what stays weak."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from mpjax.errors import ConfigError
from mpjax.formats import widest
from mpjax.interpret.autocast.float32_consumers import float32_consumers
from mpjax.interpret.autocast.products import add_bias, biases, product
from mpjax.interpret.autocast.rules import UNCHANGED, CastPolicy
from mpjax.interpret.autocast.weak import Weak, is_number
from mpjax.interpret.core import custom_rules
from mpjax.interpret.core.control_flow import REBUILT
from mpjax.interpret.core.location import OPAQUE, Location, location_of
from mpjax.interpret.core.matmuls import held_products, is_product
from mpjax.interpret.core.op_lists import APART, LOW, PLAIN, WHOLE, Lists, operation
from mpjax.interpret.core.retrace import Result, cast, is_float
from mpjax.interpret.core.walk import CALLS, CUSTOM_RULES, bind

if TYPE_CHECKING:
    from mpjax.interpret.autocast.interpreter import CastInterpreter

_SHORT = 8  # equations
_NARROW = 4  # bytes: what is at least as wide is not cast to float32


class CastScope:
    """What is known while the equations of one jaxpr are evaluated."""

    def __init__(
        self,
        interpreter: CastInterpreter,
        closed: ClosedJaxpr,
        args: Sequence[Any],
        weak: Sequence[float | None],
        outer: Location,
        lists: Lists,
    ) -> None:
        self.interpreter, self.lists, self.outer = interpreter, lists, outer
        self.weak = Weak(closed.jaxpr.invars, weak)
        self.low: dict[tuple[Var, Any], Any] = {}  # casts of one value are shared
        self.biases = biases(closed.jaxpr)
        strong = [
            var
            for var, x, bound in zip(closed.jaxpr.invars, args, weak, strict=True)
            if bound is None and x.dtype == jnp.float32
        ]
        wanted = float32_consumers(closed.jaxpr, self._kind, strong) if lists.full else frozenset()
        self.float32_consumers = {id(closed.jaxpr.eqns[index]) for index in wanted}

    def _kind(self, eqn: JaxprEqn) -> str | None:
        """The list that an equation is on; `full` where it stays as it was traced."""
        by_path = self.interpreter.cast_rules.by_path
        if by_path and self._cast_policy(location_of(eqn, self.outer, line=False)).low is None:
            return "full"
        kind = self.lists.kind(operation(eqn))
        return "bias" if kind == "widest" and id(eqn) in self.biases else kind

    def _cast_policy(self, location: Location) -> CastPolicy:
        return UNCHANGED if location.no_autocast else self.interpreter.cast_rules.at(location.path)

    def _cast(self, atom: Any, x: Any, dtype: Any) -> Any:
        """The value of an atom in a dtype, cast once."""
        if x.dtype == dtype or not is_float(x):
            return x
        if isinstance(atom, Literal):
            return self.weak.narrow(atom, x, dtype)
        if (atom, dtype) not in self.low:
            weak = self.weak.narrow(atom, x, dtype)
            self.low[atom, dtype] = cast(x, dtype) if weak is None else weak
        return self.low[atom, dtype]

    def _all(self, eqn: JaxprEqn, args: Sequence[Any], dtype: Any) -> list[Any]:
        return [
            self._cast(atom, x, dtype) if _may_change(x) else x
            for atom, x in zip(eqn.invars, args, strict=True)
        ]

    def _recorded(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        """Arguments in the dtypes that they were traced in."""
        return [
            self._cast(atom, x, _dtype(atom)) if hasattr(x, "dtype") else x
            for atom, x in zip(eqn.invars, args, strict=True)
        ]

    def visit(self, eqn: JaxprEqn, location: Location, args: list[Any]) -> list[Any]:
        """Runs an equation in the dtype that is its own."""
        self.interpreter.paths[location.path] = None
        if location.carried and not location.no_autocast:
            raise ConfigError(
                f"autocast: {location.path or 'the model'} carries its own Precision, whose"
                " policies would apply twice; give the Precision to the model, as in"
                " mpjax.models.decoder('small', 'bf16'), and leave autocast out"
            )
        name, cast_policy = operation(eqn), self._cast_policy(location)
        if cast_policy.low is None:
            return self._unchanged(eqn, args, cast_policy, location)
        kind = self.lists.kind(name)
        if kind == "full" or id(eqn) in self.float32_consumers:
            return self._full(eqn, args, location)
        if name in WHOLE and eqn.primitive.name != name:
            return self._whole(eqn, self._following(eqn, args), location)
        if kind == "wide":
            outs, dtype = self._full(eqn, args, location), self._followed(eqn, args)
            return [x if dtype is None else cast(x, dtype) for x in outs]
        if kind == "low":
            return self._low(eqn, args, cast_policy, location)
        if name == "convert_element_type":
            return self._convert(eqn, args)
        if kind == "widest":
            return self._widest(eqn, args, location)
        if eqn.primitive.name in APART:
            return bind(eqn, args)
        if _holds(eqn):
            return self._inside(eqn, args, location)
        return self._opaque(eqn, args, location)

    def _opaque(self, eqn: JaxprEqn, args: Sequence[Any], location: Location) -> list[Any]:
        """As it was traced; if it holds products, that is logged, and `audit` finds the mark."""
        values, count = self._recorded(eqn, args), held_products(eqn)
        if not count:
            return bind(eqn, values)
        line = location_of(eqn, self.outer).line
        where = ": ".join(part for part in (line, location.path) if part)
        self.interpreter.say(
            f"autocast: {where or 'the function'}: {eqn.primitive.name} stays as it was traced,"
            f" with {count} {'product' if count == 1 else 'products'} in float32, for it has rules"
            " of its own; call mpjax.autocast on the function that is given to it, if these are to"
            " be low"
        )
        with jax.named_scope(f"{OPAQUE}{eqn.primitive.name}"):
            return bind(eqn, values)

    def _unchanged(
        self, eqn: JaxprEqn, args: list[Any], cast_policy: CastPolicy, location: Location
    ) -> list[Any]:
        """As it was traced; what stands inside may have a rule of its own."""
        values = self._recorded(eqn, args)
        if cast_policy.recipe is not None and is_product(eqn) and all(map(_may_change, values[:2])):
            y = self._product(eqn, values, cast_policy, location)
            return [cast(y, _dtype(eqn.outvars[0]))]
        cast_rules = self.interpreter.cast_rules
        if location.no_autocast or not (cast_rules.by_path or cast_rules.quantises):
            return bind(eqn, values)
        if not _holds(eqn):
            return (
                bind(eqn, values)
                if cast_policy.recipe is None
                else self._opaque(eqn, args, location)
            )
        outs = self._inside(eqn, values, location)
        return [cast(x, _dtype(var)) for x, var in zip(outs, eqn.outvars, strict=True)]

    def _following(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        """Arguments in the widest dtype of those that are not weak."""
        dtype = self._followed(eqn, args)
        return list(args) if dtype is None else self._all(eqn, args, dtype)

    def _followed(self, eqn: JaxprEqn, args: Sequence[Any]) -> Any:
        """The widest dtype of the arguments that are not weak; None without any."""
        strong = [
            x.dtype
            for atom, x in zip(eqn.invars, args, strict=True)
            if hasattr(x, "dtype") and is_float(x) and self.weak.bound(atom) is None
        ]
        return widest(*strong) if strong else None

    def _widest(self, eqn: JaxprEqn, args: Sequence[Any], location: Location) -> list[Any]:
        self.weak.follow(eqn, args)
        if id(eqn) in self.biases:
            return add_bias(eqn, args, self.biases[id(eqn)])
        values = self._following(eqn, args)
        return self._whole(eqn, values, location) if _holds(eqn) else bind(eqn, values)

    def _at_least_full(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        return [
            self._cast(atom, x, jnp.dtype(jnp.float32))
            if hasattr(x, "dtype") and is_float(x) and x.dtype.itemsize < _NARROW
            else x
            for atom, x in zip(eqn.invars, args, strict=True)
        ]

    def _full(self, eqn: JaxprEqn, args: Sequence[Any], location: Location) -> list[Any]:
        values = self._at_least_full(eqn, args)
        if _holds(eqn):  # what it makes of weak numbers is a value like others
            return self._whole(eqn, values, location)
        self.weak.follow(eqn, args)
        return bind(eqn, values)

    def _whole(self, eqn: JaxprEqn, values: list[Any], location: Location) -> list[Any]:
        """A function of JAX as one operation: all of it in the dtype of its arguments."""
        recorded = [_dtype(atom) for atom in eqn.invars]
        if [x.dtype for x in values] == recorded:
            return bind(eqn, values)
        return self._inside(eqn, values, location, PLAIN)

    def _low(
        self, eqn: JaxprEqn, args: list[Any], cast_policy: CastPolicy, location: Location
    ) -> list[Any]:
        if not any(is_float(x) for x in args) or not all(_may_change(x) for x in args[:2]):
            return bind(eqn, self._recorded(eqn, args))
        values = self._all(eqn, args, cast_policy.low)
        if eqn.primitive.name in LOW:
            return [self._product(eqn, values, cast_policy, location)]
        outs = self._whole(eqn, values, location) if _holds(eqn) else bind(eqn, values)
        return [cast(x, cast_policy.output) for x in outs]

    def _product(
        self, eqn: JaxprEqn, values: list[Any], cast_policy: CastPolicy, location: Location
    ) -> Any:
        interpreter = self.interpreter
        return product(
            eqn,
            values,
            cast_policy,
            location,
            interpreter.draw(cast_policy),
            interpreter.gradients.get(id(eqn)),
        )

    def _convert(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        x, atom = args[0], eqn.invars[0]
        if not is_float(eqn.outvars[0].aval):
            return bind(eqn, args)
        if not is_float(x):
            if x.dtype == jnp.bool_:
                self.weak.mark(eqn.outvars[0], 1.0)
            elif is_number(x) or getattr(atom.aval, "weak_type", False):
                self.weak.mark(eqn.outvars[0], abs(float(x)) if is_number(x) else float("inf"))
            return bind(eqn, args)
        wanted = eqn.params["new_dtype"]
        if self.weak.bound(atom) is not None:
            self.weak.follow(eqn, args)
        return [self._cast(atom, x, wanted) if x.dtype != wanted else x]

    def _inside(
        self, eqn: JaxprEqn, args: list[Any], location: Location, lists: Lists | None = None
    ) -> list[Any]:
        interpreter = self.interpreter
        lists = self.lists if lists is None else lists
        # A carry or an operand of a branch is what it was made, whatever it is later.
        passed = eqn.primitive.name in _PASSES_WEAK
        weak = [self.weak.bound(atom) if passed else None for atom in eqn.invars]

        def run(closed: ClosedJaxpr, values: Sequence[Any], number: int) -> Result:
            bounds = weak if passed else [None] * len(values)
            return interpreter.evaluate(closed, values, bounds, location, lists)

        if eqn.primitive.name in _WITH_RULES:
            return custom_rules.rebuild(eqn, self._following(eqn, args), run, interpreter.learn)
        if eqn.primitive.name in ("jit", "pjit") and _is_wrapper(eqn):
            result = interpreter.evaluate(eqn.params["jaxpr"], args, weak, location, lists)
            self._note(eqn, result)
            return result.outs
        where: Hashable = location.path if interpreter.cast_rules.by_path else ""
        tag = (where, location.no_autocast, id(lists), tuple(weak))
        found = interpreter.rebind(eqn, args, run, tag)
        assert found is not None  # `_holds` said so
        if eqn.primitive.name in ("jit", "pjit"):
            self._note(eqn, found)
        return found.outs

    def _note(self, eqn: JaxprEqn, result: Result) -> None:
        """Keeps which results of a call are weak."""
        for var, bound in zip(eqn.outvars, result.note, strict=True):
            self.weak.mark(var, bound)


_PASSES_WEAK = CALLS | {"remat2", "checkpoint"}
_WITH_RULES = CUSTOM_RULES | {"custom_vmap_call"}
_HOLDING = REBUILT | _WITH_RULES


def _is_wrapper(eqn: JaxprEqn) -> bool:
    """Whether a call is so short, and so free of settings, that it is evaluated in its caller."""
    p = eqn.params
    asked = (*p["in_shardings"], *p["out_shardings"])
    if any(isinstance(s, jax.sharding.Sharding) for s in asked) or any(p["donated_invars"]):
        return False
    return len(p["jaxpr"].jaxpr.eqns) <= _SHORT


def _dtype(atom: Any) -> Any:
    """The dtype that a value was traced in."""
    return getattr(atom.aval, "dtype", None)


def _holds(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in _HOLDING


def _may_change(x: Any) -> bool:
    """Whether autocast may cast a value: floating-point, and not float64."""
    return hasattr(x, "dtype") and is_float(x) and x.dtype.itemsize <= _NARROW
