"""autocast: any function with its products in a low dtype and its delicate parts in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from mpjax.interpret import custom
from mpjax.interpret.control import Rebind, Result, cast, is_float, widest
from mpjax.interpret.demand import demanded
from mpjax.interpret.lists import APART, SCATTER, WHOLE, WIDE, Lists, make_lists
from mpjax.interpret.place import UNTOUCHED as UNTOUCHED_SCOPE
from mpjax.interpret.place import Place, place_of
from mpjax.interpret.products import product
from mpjax.interpret.region import UNTOUCHED, Region, Regions, regions
from mpjax.interpret.trace import trace
from mpjax.interpret.walker import bind, walk

_PLAIN = Lists(low=frozenset(), full=frozenset())
_NARROW = 4  # bytes: what is at least as wide is not cast to float32


def _name(eqn: JaxprEqn) -> str:
    """The operation that an equation is to a reader: a kept function's name, or its primitive."""
    name = eqn.primitive.name
    if name in ("jit", "pjit"):
        return str(eqn.params["name"])
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return str(eqn.params["call_jaxpr"].jaxpr.debug_info.func_name)
    return name


class Autocast:
    """One autocast of one function call.

    Args:
      regions: what happens where.
      lists: which operations run low.
    """

    def __init__(self, regions: Regions, lists: Lists) -> None:
        self.regions = regions
        self.lists = lists
        self.paths: dict[str, None] = {}
        self.rebind = Rebind()

    def evaluate(
        self,
        closed: ClosedJaxpr,
        args: Sequence[Any],
        weak: Sequence[float | None],
        outer: Place,
        lists: Lists | None = None,
    ) -> Result:
        """Evaluates a jaxpr; the note is, for each output, its bound if it is a weak constant."""
        frame = _Frame(self, closed, weak, outer, self.lists if lists is None else lists)
        outs = walk(closed, args, frame.visit, outer, lines=False)
        note = [frame.bound(atom) for atom in closed.jaxpr.outvars]
        return Result(list(outs), {}, note)


class _Frame:
    """What is known while the equations of one jaxpr are evaluated."""

    def __init__(
        self,
        caster: Autocast,
        closed: ClosedJaxpr,
        weak: Sequence[float | None],
        outer: Place,
        lists: Lists,
    ) -> None:
        self.caster, self.lists, self.outer = caster, lists, outer
        # A weak value was made from Python numbers alone: it takes the dtype of what it meets. Its
        # bound says how large it can be, so that it is clamped where it would not fit.
        self.weak: dict[Var, float] = {
            var: bound
            for var, bound in zip(closed.jaxpr.invars, weak, strict=True)
            if bound is not None
        }
        self.low: dict[tuple[Var, Any], Any] = {}  # casts of one value are shared
        wanted = demanded(closed.jaxpr, self._is_full) if lists.full else frozenset()
        self.demanded = {id(closed.jaxpr.eqns[index]) for index in wanted}

    def _is_full(self, eqn: JaxprEqn) -> bool:
        name = _name(eqn)
        if name in WIDE or self.lists.kind(name) == "full":
            return True
        if name == "integer_pow" and eqn.params["y"] < 0:
            return True  # a reciprocal
        if not self.caster.regions.by_path:
            return False
        return self._region(place_of(eqn, self.outer, line=False)) is UNTOUCHED

    def _region(self, place: Place) -> Region:
        return UNTOUCHED if place.untouched else self.caster.regions.at(place.path)

    def bound(self, atom: Any) -> float | None:
        """The largest magnitude of a weak value; None for one that is not weak."""
        if isinstance(atom, Literal):
            if np.ndim(atom.val) or not is_float(atom.aval):
                return None
            value = abs(float(atom.val))
            return value if np.isfinite(value) else 0.0  # an infinity fits every dtype
        return self.weak.get(atom)

    def _cast(self, atom: Any, x: Any, dtype: Any) -> Any:
        """The value of an atom in a dtype, cast once."""
        if not is_float(x) or x.dtype == dtype:
            return x
        bound = self.bound(atom)
        if isinstance(atom, Literal):
            limit = float(jnp.finfo(dtype).max)
            value = float(x)
            return np.asarray(np.clip(value, -limit, limit) if np.isfinite(value) else value, dtype)
        if (atom, dtype) not in self.low:
            if bound is not None and bound > float(jnp.finfo(dtype).max):
                limit = jnp.asarray(float(jnp.finfo(dtype).max), x.dtype)
                x = lax.select(lax.is_finite(x), lax.clamp(-limit, x, limit), x)
            self.low[atom, dtype] = lax.convert_element_type(x, dtype)
        return self.low[atom, dtype]

    def _all(self, eqn: JaxprEqn, args: Sequence[Any], dtype: Any) -> list[Any]:
        return [
            self._cast(atom, x, dtype) if _may_change(x) else x
            for atom, x in zip(eqn.invars, args, strict=True)
        ]

    def _recorded(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        """Arguments in the dtypes that they were traced in."""
        return [
            self._cast(atom, x, atom.aval.dtype) if hasattr(x, "dtype") else x
            for atom, x in zip(eqn.invars, args, strict=True)
        ]

    def visit(self, eqn: JaxprEqn, place: Place, args: list[Any]) -> list[Any]:
        """Runs an equation in the dtype that is its own."""
        self.caster.paths[place.path] = None
        name, region = _name(eqn), self._region(place)
        if region is UNTOUCHED and not (self.caster.regions.by_path and _holds(eqn)):
            return bind(eqn, self._recorded(eqn, args))
        if name in WHOLE and eqn.primitive.name != name:
            return self._whole(eqn, self._following(eqn, args), place)
        if name in WIDE:
            outs = self._whole(eqn, self._at_least_full(eqn, args), place)
            followed = [x.dtype for x in args if is_float(x)]
            return [cast(x, widest(*followed)) for x in outs]
        kind = self.lists.kind(name)
        if name == "integer_pow" and eqn.params["y"] < 0 and self.lists.full:
            kind = "full"
        if kind == "full" or id(eqn) in self.demanded:
            return self._full(eqn, args, place)
        if kind == "low":
            return self._low(eqn, args, region, place)
        if name == "convert_element_type":
            return self._convert(eqn, args)
        if kind == "widest":
            return self._widest(eqn, args)
        if eqn.primitive.name in APART:
            return bind(eqn, args)
        if _holds(eqn):
            return self._inside(eqn, args, place)
        return bind(eqn, self._recorded(eqn, args))

    def _following(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        """Arguments in the widest dtype of those that are not weak."""
        mine = [
            (x.dtype, self.bound(atom) is not None)
            for atom, x in zip(eqn.invars, args, strict=True)
            if hasattr(x, "dtype") and is_float(x)
        ]
        strong = [dtype for dtype, weak in mine if not weak]
        if not strong:
            return list(args)
        return self._all(eqn, args, widest(*strong))

    def _widest(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        values = self._following(eqn, args)
        changed = {}
        if eqn.primitive.name in SCATTER and eqn.params.get("update_jaxpr") is not None:
            changed = _combiner(eqn, values[0].dtype)
        self._keep_weak(eqn)
        return bind(eqn, values, **changed)

    def _keep_weak(self, eqn: JaxprEqn) -> None:
        floats = [atom for atom in eqn.invars if is_float(atom.aval)]
        bounds = [self.bound(atom) for atom in floats]
        if floats and None not in bounds:
            known = eqn.primitive.name in _KEEPS_BOUND
            for var in eqn.outvars:
                self.weak[var] = max(b or 0.0 for b in bounds) if known else float("inf")

    def _at_least_full(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        return [
            self._cast(atom, x, jnp.dtype(jnp.float32))
            if hasattr(x, "dtype") and is_float(x) and x.dtype.itemsize < _NARROW
            else x
            for atom, x in zip(eqn.invars, args, strict=True)
        ]

    def _full(self, eqn: JaxprEqn, args: Sequence[Any], place: Place) -> list[Any]:
        values = self._at_least_full(eqn, args)
        self._keep_weak(eqn)
        if _holds(eqn) or eqn.primitive.name in custom.RULES:
            return self._whole(eqn, values, place)
        changed = {}
        if eqn.primitive.name in SCATTER and eqn.params.get("update_jaxpr") is not None:
            changed = _combiner(eqn, values[0].dtype)
        return bind(eqn, values, **changed)

    def _whole(self, eqn: JaxprEqn, values: list[Any], place: Place) -> list[Any]:
        """A function of JAX as one operation: all of it in the dtype of its arguments."""
        recorded = [atom.aval.dtype for atom in eqn.invars]
        if [x.dtype for x in values] == recorded:
            return bind(eqn, values)
        return self._inside(eqn, values, place, _PLAIN)

    def _low(
        self, eqn: JaxprEqn, args: list[Any], region: Region, place: Place
    ) -> list[Any]:
        if not any(is_float(x) for x in args) or not all(_may_change(x) for x in args[:2]):
            return bind(eqn, self._recorded(eqn, args))
        values = self._all(eqn, args, region.low)
        return [product(eqn, values, region, place)]

    def _convert(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        x, atom = args[0], eqn.invars[0]
        if not is_float(eqn.outvars[0].aval):
            return bind(eqn, args)
        if not is_float(x):
            if x.dtype == jnp.bool_:
                self.weak[eqn.outvars[0]] = 1.0
            return bind(eqn, args)
        wanted = eqn.params["new_dtype"]
        if self.bound(atom) is not None:
            self._keep_weak(eqn)
        return [self._cast(atom, x, wanted) if x.dtype != wanted else x]

    def _inside(
        self, eqn: JaxprEqn, args: list[Any], place: Place, lists: Lists | None = None
    ) -> list[Any]:
        caster = self.caster
        lists = self.lists if lists is None else lists
        # A carry or an operand of a branch is what it was made, whatever it is later.
        passed = eqn.primitive.name in _PASSES_WEAK
        weak = [self.bound(atom) if passed else None for atom in eqn.invars]

        def run(closed: ClosedJaxpr, values: Sequence[Any], number: int) -> Result:
            mine = weak if passed else [None] * len(values)
            return caster.evaluate(closed, values, mine, place, lists)

        if eqn.primitive.name in custom.RULES:
            if not custom.can_rebuild(eqn):
                return bind(eqn, self._recorded(eqn, args))
            return custom.rebuild(eqn, self._following(eqn, args), run).outs
        where: Hashable = place.path if caster.regions.by_path else ""
        tag = (where, place.untouched, id(lists), tuple(weak))
        result = caster.rebind(eqn, args, run, tag)
        assert result is not None  # `_holds` said so
        if eqn.primitive.name in ("jit", "pjit") and result.note:
            for var, bound in zip(eqn.outvars, result.note, strict=True):
                if bound is not None:
                    self.weak[var] = bound
        return result.outs


_KEEPS_BOUND = frozenset(
    {
        *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "neg"),
        *("select_n", "concatenate", "convert_element_type", "pad", "copy", "abs", "max", "min"),
        *("stop_gradient", "pvary", "rev", "gather", "dynamic_slice", "sign"),
    }
)
_PASSES_WEAK = frozenset({"jit", "pjit", "remat2", "checkpoint", "closed_call", "core_call"})
_HOLDING = frozenset(
    {
        *("jit", "pjit", "closed_call", "core_call", "scan", "while", "cond", "remat2"),
        *("checkpoint", "shard_map", *custom.RULES),
    }
)


def _holds(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in _HOLDING


def _may_change(x: Any) -> bool:
    """Whether autocast may cast a value: floating-point, and not float64."""
    return hasattr(x, "dtype") and is_float(x) and x.dtype.itemsize <= _NARROW


def _combiner(eqn: JaxprEqn, dtype: Any) -> dict[str, Any]:
    """The jaxpr that says how a scatter combines two numbers, in another dtype."""
    old = eqn.params["update_jaxpr"]
    if old.invars[0].aval.dtype == dtype:
        return {}
    combine = {"scatter-add": lax.add, "scatter-mul": lax.mul}
    combine |= {"scatter-min": lax.min, "scatter-max": lax.max}
    fn = combine.get(eqn.primitive.name, lambda a, b: b)
    number = jax.ShapeDtypeStruct((), dtype)
    return {"update_jaxpr": jax.make_jaxpr(fn)(number, number).jaxpr, "update_consts": ()}


def no_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that an `autocast` around it leaves as it was traced.

    Args:
      fn: any function of JAX arrays; inside, its arguments have the dtypes of a call without
        autocast.

    Example:
      >>> keep = no_autocast(lambda x, w: x @ w)
      >>> f = autocast(lambda x, w: (x @ w, keep(x, w)), "bf16", restore_dtypes=False)
      >>> [y.dtype.name for y in f(jnp.ones((2, 2)), jnp.ones((2, 2)))]
      ['bfloat16', 'float32']
    """

    @functools.wraps(fn)
    def apart(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(UNTOUCHED_SCOPE):
            return fn(*args, **kwargs)

    return apart


def autocast(
    fn: Callable[..., Any],
    precision: Any,
    *,
    lists: str = "cuda",
    low: Iterable[str] = (),
    full: Iterable[str] = (),
    widest: Iterable[str] = (),
    rules: Sequence[Any] = (),
    restore_dtypes: bool = True,
) -> Callable[..., Any]:
    """Returns a function that computes its products low and its delicate operations in float32.

    Nothing of the function is edited: it is traced, and its jaxpr is evaluated with casts put in.
    Products run in the low dtype, operations that lose digits or overflow (exp, log, sums, pow,
    softmax, cross-entropy ...) in float32, all others in the widest dtype of their inputs. Python
    numbers never widen. float64, integers and every cast that stands in the jaxpr stay. What runs
    value by value and feeds float32 operations only runs in float32 too, so that a softmax or a
    norm that JAX leaves no name of is exact.

    A cast to the dtype that a value had while it was traced leaves nothing in a jaxpr: in a
    float32 model `x.astype(float32)` cannot be seen, and only lists and rules can keep such a
    place in float32.

    Args:
      fn: any function of JAX arrays.
      precision: `bf16`, `fp16`, a policy, a recipe or a `Precision` without loss scale, update
        rule or moments.
      lists: `cuda` or `cpu`, after PyTorch's lists for them.
      low: names of operations to run low; of primitives, or of functions that JAX keeps as a call.
      full: names of operations to run in float32.
      widest: names of operations to run in the widest dtype of their inputs.
      rules: `PATTERN=VALUE` by module path, first match wins: `**/head=fp32` leaves these paths as
        they were traced, `**/mlp=r=fp8` quantises their products.
      restore_dtypes: whether outputs get the dtypes that they had without autocast.

    Returns:
      A function of the same arguments. It composes with grad (inside and outside), jit, vmap,
      checkpoint, scan and sharding.

    Raises:
      ConfigError: an unknown dtype, list, name or path, a Precision with fields that a function
        alone cannot honour; when called, a function that cannot be traced.

    Example:
      >>> f = autocast(lambda x, w: jax.nn.softmax(x @ w), "bf16")
      >>> jaxpr = jax.make_jaxpr(f)(jnp.ones((2, 3)), jnp.ones((3, 4)))
      >>> [v.aval.dtype.name for e in jaxpr.eqns if e.primitive.name == "dot_general"
      ...  for v in e.invars]
      ['bfloat16', 'bfloat16']

    References:
      PyTorch documentation, Automatic Mixed Precision package, Autocast Op Reference.
    """
    where, names = regions(precision, rules), make_lists(lists, low, full, widest)

    @functools.wraps(fn)
    def cast_fn(*args: Any, **kwargs: Any) -> Any:
        program = trace("autocast", fn, args, kwargs)
        caster = Autocast(where, names)
        given = [None] * len(program.args)
        outs = caster.evaluate(program.closed, program.args, given, Place()).outs
        where.check([path for path in caster.paths if path])
        if restore_dtypes:
            avals = program.closed.out_avals
            outs = [cast(x, aval.dtype) for x, aval in zip(outs, avals, strict=True)]
        return program.rebuild(outs)

    return cast_fn
