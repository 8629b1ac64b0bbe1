"""How autocast runs each equation of a jaxpr: in which dtype, with which casts."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Atom
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from mpjax.errors import ConfigError
from mpjax.formats import widest
from mpjax.interpret.autocast.float32_consumers import float32_consumers
from mpjax.interpret.autocast.histories import CLOSED, Histories
from mpjax.interpret.autocast.products import Sides, add_bias, biases, product, sides
from mpjax.interpret.autocast.rules import UNCHANGED, CastPolicy, CastRules
from mpjax.interpret.autocast.weak import Weak, is_known_number
from mpjax.interpret.core import custom_rules, op_lists
from mpjax.interpret.core.control_flow import REBUILT, Rebind
from mpjax.interpret.core.location import OPAQUE, Location, location_of
from mpjax.interpret.core.op_lists import PLAIN, Lists, is_product, operation
from mpjax.interpret.core.retrace import Bounds, RecordKey, Records, Result, cast, is_float
from mpjax.interpret.core.walk import CALLS, CUSTOM_RULES, bind, walk
from mpjax.typing import Array, DType, Key

_log = logging.getLogger("mpjax.interpret")
_SHORT = 8  # equations
_FULL = jnp.dtype(jnp.float32)
_JIT = ("jit", "pjit")
_PASSES_WEAK = CALLS | {"remat2", "checkpoint"}
_WITH_RULES = CUSTOM_RULES | {"custom_vmap_call"}
_HOLDING = REBUILT | _WITH_RULES


class CastInterpreter:
    """One autocast of one function call.

    Args:
      cast_rules: what happens where.
      lists: which operations run low.
      said: what was logged already; each line is logged once.
      key: for recipes that draw random numbers.
      histories: for recipes that take their scales from past steps.
    """

    def __init__(
        self,
        cast_rules: CastRules,
        lists: Lists,
        said: set[str] | None = None,
        key: Key | None = None,
        histories: Histories | None = None,
    ) -> None:
        self.cast_rules, self.lists, self.histories = cast_rules, lists, histories
        self._said = set() if said is None else said
        self._key, self._drawn = key, 0
        self.paths: dict[str, None] = {}
        self.rebind = Rebind()
        self.gradients: dict[int, Sides] = {}
        self._rules: list[ClosedJaxpr] = []  # held, so that the ids of their equations stay theirs

    def say(self, line: str) -> None:
        """Logs a line, once."""
        if line not in self._said:
            self._said.add(line)
            _log.warning("%s", line)

    def draw(self, cast_policy: CastPolicy) -> Key | None:
        """A key of its own for each product whose recipe draws; None without one."""
        if self._key is None or cast_policy.recipe is None or not cast_policy.recipe.uses_key:
            return None
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)

    def learn(self, rule: ClosedJaxpr, residuals: int) -> None:
        """Finds the gradients in a backward rule, whose cotangents stand behind its residuals."""
        if self.cast_rules.quantises:
            self._rules.append(rule)
            self.gradients |= sides(rule, residuals)

    def evaluate(
        self,
        closed: ClosedJaxpr,
        args: Sequence[Array],
        weak: Bounds,
        outer: Location,
        lists: Lists | None = None,
    ) -> Result:
        """Evaluates a jaxpr; `weak` has the bounds of its inputs that are weak constants."""
        scope = CastScope(self, closed, args, weak, outer, lists or self.lists)
        outs = walk(closed, args, scope.visit, outer, lines=False)
        return Result(
            outs, scope.records, [scope.weak.bound(atom) for atom in closed.jaxpr.outvars]
        )


class CastScope:
    """What is known while the equations of one jaxpr are evaluated."""

    def __init__(
        self,
        interpreter: CastInterpreter,
        closed: ClosedJaxpr,
        args: Sequence[Array],
        weak: Bounds,
        outer: Location,
        lists: Lists,
    ) -> None:
        self.interpreter, self.lists, self.outer = interpreter, lists, outer
        self.weak = Weak(closed.jaxpr.invars, weak)
        self.low: dict[tuple[Var, DType], Array] = {}  # casts of one value are shared
        self.records: Records = {}  # what products under delayed scaling observe
        self.biases = biases(closed.jaxpr)
        inputs = zip(closed.jaxpr.invars, args, weak, strict=True)
        strong = [var for var, x, bound in inputs if bound is None and x.dtype == _FULL]
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

    def _cast(self, atom: Atom, x: Array, dtype: DType) -> Array:
        """The value of an atom in a dtype, cast once."""
        if not is_float(x) or x.dtype == dtype:
            return x
        found = None if isinstance(atom, Literal) else self.low.get((atom, dtype))
        if found is None:
            found = self.weak.narrow(atom, x, dtype)
            found = cast(x, dtype) if found is None else found
            if not isinstance(atom, Literal):
                self.low[atom, dtype] = found
        return found

    def _all(self, eqn: JaxprEqn, args: Sequence[Array], dtype: DType) -> list[Array]:
        pairs = zip(eqn.invars, args, strict=True)
        return [self._cast(atom, x, dtype) if _may_change(x) else x for atom, x in pairs]

    def _recorded(self, eqn: JaxprEqn, args: Sequence[Array]) -> list[Array]:
        """Arguments in the dtypes that they were traced in."""
        return [self._cast(a, x, _dtype(a)) for a, x in zip(eqn.invars, args, strict=True)]

    def visit(self, eqn: JaxprEqn, location: Location, args: list[Array]) -> list[Array]:
        """Runs an equation in the dtype that lists and rules give it."""
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
        if name in op_lists.WHOLE and eqn.primitive.name != name:
            return self._whole(eqn, self._following(eqn, args), location)
        if kind == "wide":
            outs, dtype = self._full(eqn, args, location), self._followed(eqn, args)
            return outs if dtype is None else [cast(x, dtype) for x in outs]
        if kind == "low":
            return self._low(eqn, args, cast_policy, location)
        if name == "convert_element_type":
            return self._convert(eqn, args)
        if kind == "widest":
            return self._widest(eqn, args, location)
        if eqn.primitive.name in op_lists.APART:
            return bind(eqn, args)
        if eqn.primitive.name in _HOLDING:
            return self._inside(eqn, args, location)
        return self._opaque(eqn, args, location)

    def _opaque(self, eqn: JaxprEqn, args: Sequence[Array], location: Location) -> list[Array]:
        """As it was traced; if it holds products, that is logged and marked for `audit`."""
        values, count = self._recorded(eqn, args), op_lists.held_products(eqn)
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
        self, eqn: JaxprEqn, args: list[Array], cast_policy: CastPolicy, location: Location
    ) -> list[Array]:
        """As it was traced; what it holds may have a rule of its own."""
        values = self._recorded(eqn, args)
        if cast_policy.recipe is not None and is_product(eqn) and all(map(_may_change, values[:2])):
            y = self._product(eqn, values, cast_policy, location)
            return [cast(y, _dtype(eqn.outvars[0]))]
        cast_rules = self.interpreter.cast_rules
        if location.no_autocast or not (cast_rules.by_path or cast_rules.quantises):
            return bind(eqn, values)
        if eqn.primitive.name in _HOLDING:
            outs = self._inside(eqn, values, location)
            return [cast(x, _dtype(var)) for x, var in zip(outs, eqn.outvars, strict=True)]
        if cast_policy.recipe is None:
            return bind(eqn, values)
        return self._opaque(eqn, args, location)

    def _following(self, eqn: JaxprEqn, args: Sequence[Array]) -> list[Array]:
        """Arguments in the widest dtype of those that are not weak."""
        dtype = self._followed(eqn, args)
        return list(args) if dtype is None else self._all(eqn, args, dtype)

    def _followed(self, eqn: JaxprEqn, args: Sequence[Array]) -> DType | None:
        """The widest dtype of the arguments that are not weak; None without any."""
        pairs = zip(eqn.invars, args, strict=True)
        strong = [x.dtype for a, x in pairs if is_float(x) and self.weak.bound(a) is None]
        return widest(*strong) if strong else None

    def _widest(self, eqn: JaxprEqn, args: Sequence[Array], location: Location) -> list[Array]:
        self.weak.follow(eqn, args)
        if id(eqn) in self.biases:
            return add_bias(eqn, args, self.biases[id(eqn)])
        return self._whole(eqn, self._following(eqn, args), location)

    def _full(self, eqn: JaxprEqn, args: Sequence[Array], location: Location) -> list[Array]:
        values = self._all(eqn, args, _FULL)
        if eqn.primitive.name not in _HOLDING:  # the results of a call are not weak
            self.weak.follow(eqn, args)
        return self._whole(eqn, values, location)

    def _whole(self, eqn: JaxprEqn, values: list[Array], location: Location) -> list[Array]:
        """An operation; of a function of JAX, all of it runs in the dtype of its arguments."""
        recorded = [_dtype(atom) for atom in eqn.invars]
        if eqn.primitive.name not in _HOLDING or [x.dtype for x in values] == recorded:
            return bind(eqn, values)
        return self._inside(eqn, values, location, PLAIN)

    def _low(
        self, eqn: JaxprEqn, args: list[Array], cast_policy: CastPolicy, location: Location
    ) -> list[Array]:
        assert cast_policy.low is not None  # `visit` leaves all else as it was traced
        if not any(map(is_float, args)) or not all(map(_may_change, args[:2])):
            return bind(eqn, self._recorded(eqn, args))
        values = self._all(eqn, args, cast_policy.low)
        if eqn.primitive.name in op_lists.LOW:
            return [self._product(eqn, values, cast_policy, location)]
        outs, output = self._whole(eqn, values, location), cast_policy.output
        return outs if output is None else [cast(x, output) for x in outs]

    def _product(
        self, eqn: JaxprEqn, values: list[Array], cast_policy: CastPolicy, location: Location
    ) -> Array:
        key, gradients = self.interpreter.draw(cast_policy), self.interpreter.gradients
        recipe, histories, amax = cast_policy.recipe, self.interpreter.histories, None
        site: RecordKey = ()
        if recipe is not None and recipe.history and histories is not None:
            where = f"autocast: {location.path or 'the function'}"
            site, amax = histories.of(eqn, recipe, where)
        y, amax = product(eqn, values, cast_policy, location, key, gradients.get(id(eqn)), amax)
        if amax is not None:
            self.records[site] = amax.observed_amax
        return y

    def _convert(self, eqn: JaxprEqn, args: list[Array]) -> list[Array]:
        x, atom = args[0], eqn.invars[0]
        if not is_float(eqn.outvars[0].aval):
            return bind(eqn, args)
        if not is_float(x):
            if x.dtype == jnp.bool_:
                self.weak.mark(eqn.outvars[0], 1.0)
            elif is_known_number(x) or getattr(atom.aval, "weak_type", False):
                largest = abs(float(x)) if is_known_number(x) else math.inf
                self.weak.mark(eqn.outvars[0], largest)
            return bind(eqn, args)
        if self.weak.bound(atom) is not None:
            self.weak.follow(eqn, args)
        return [self._cast(atom, x, eqn.params["new_dtype"])]

    def _inside(
        self, eqn: JaxprEqn, args: list[Array], location: Location, lists: Lists | None = None
    ) -> list[Array]:
        """Evaluates the jaxprs that an equation holds."""
        interpreter, name, lists = self.interpreter, eqn.primitive.name, lists or self.lists
        # A carry or an operand of a branch is strong: it may be another value later.
        passed = name in _PASSES_WEAK
        weak = [self.weak.bound(atom) if passed else None for atom in eqn.invars]

        histories = interpreter.histories
        held = histories.below(eqn) if histories is not None and name == "scan" else {}
        slices, tree = jax.tree.flatten(held)  # a scan has one of each for every iteration
        closed_in = CLOSED.get(name, "")
        if name in _JIT and _asks(eqn):
            closed_in = "a jit with shardings or donation of its own"

        def run(closed: ClosedJaxpr, values: Sequence[Array], number: int) -> Result:
            values, own = values[: len(values) - len(slices)], values[len(values) - len(slices) :]
            bounds = weak if passed else [None] * len(values)
            if histories is None:
                return interpreter.evaluate(closed, values, bounds, location, lists)
            with histories.inside(eqn, number, jax.tree.unflatten(tree, own), closed_in):
                return interpreter.evaluate(closed, values, bounds, location, lists)

        if name in _WITH_RULES:
            return custom_rules.rebuild(eqn, self._following(eqn, args), run, interpreter.learn)
        where: Hashable = location.path if interpreter.cast_rules.by_path else ""
        tag = (where, location.no_autocast, id(lists), tuple(weak))
        # A jit hands out no more than it was traced with, so with histories it is evaluated here.
        if name in _JIT and not _asks(eqn) and (histories is not None or _is_short(eqn)):
            result = run(eqn.params["jaxpr"], args, 0)
        else:
            # What is met twice has a history for each.
            rebound = interpreter.rebind(
                eqn, [*args, *slices], run, tag if histories is None else None
            )
            assert rebound is not None  # all of `_HOLDING` are rebuilt
            result = rebound
        self.records |= result.records
        if name in _JIT:
            for var, bound in zip(eqn.outvars, result.bounds, strict=True):
                self.weak.mark(var, bound)
        return result.outs


def _asks(eqn: JaxprEqn) -> bool:
    """Whether a call has settings, so that it must stay a call."""
    p = eqn.params
    asked = (*p["in_shardings"], *p["out_shardings"])
    return any(isinstance(s, jax.sharding.Sharding) for s in asked) or any(p["donated_invars"])


def _is_short(eqn: JaxprEqn) -> bool:
    """Whether a call without settings is so short that it is evaluated in its caller."""
    return len(eqn.params["jaxpr"].jaxpr.eqns) <= _SHORT


def _dtype(atom: Atom) -> DType:
    """The dtype that a value was traced in."""
    dtype: Any = getattr(atom.aval, "dtype", None)
    return dtype


def _may_change(x: Array) -> bool:
    """Whether autocast may cast a value: floating-point, and not float64."""
    return is_float(x) and x.dtype.itemsize <= _FULL.itemsize
