"""Leaks: products that run in float32 in a low-precision program, and what made them so.

The operands of each wide product are followed back, through operations, loops, branches and calls,
to where a low value became wide. A promotion whose other operand is wide because of an earlier
cause is a consequence of that and no cause. A gradient's product has the causes of the forward
product that it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable

from mpjax.interpret.audit.cost import contracted, operations
from mpjax.interpret.audit.provenance import Makers, is_argument, origin, readers
from mpjax.interpret.core.dataflow import Flow, Step, Value
from mpjax.interpret.core.location import called, written
from mpjax.interpret.core.op_lists import held_products, is_product

# A cause that reaches less than this share of a program's product FLOPs is minor.
MINOR = 0.001
# So is one whose products sum nothing (angles = positions x frequencies) below this share.
MINOR_OUTER = 0.05

_CASTS = ("astype", "convert_element_type", "asarray", "array")


@dataclasses.dataclass(frozen=True)
class Cause:
    """Where and how a low value became wide.

    Args:
      mechanism: `constant`, `number`, `argument` or `made`: the wide operand of a promotion;
        `cast`: it was cast up; `product`: a product of low operands gives a wide result;
        `operation`: another operation does; `cotangent`: only the gradient is wide, as the
        product's result is; `inputs`: all that the product is made of is wide; `opaque`: autocast
        left it so, inside an operation that has rules of its own.
      line: the source line, of the promotion where there is one.
      path: module path.
      dtype: the wide dtype.
      low: the dtype that should have been; empty where nothing was low.
      origin: what was wide from the beginning, or the operation that made it so.
    """

    mechanism: str
    line: str
    path: str
    dtype: str
    low: str
    origin: str


def wide_product(step: Step) -> bool:
    """Returns whether a step is a product with a float32 or float64 operand."""
    return is_product(step.eqn) and any(x.wide for x in step.ins[:2])


def is_opaque(step: Step) -> bool:
    """Returns whether a step holds float32 products in an operation that is not walked."""
    return not is_product(step.eqn) and held_products(step.eqn) > 0


class Leaks:
    """The causes of all wide products of a program.

    Args:
      flow: the program.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._makers = Makers(flow, _makes)
        self._forward: dict[Hashable, list[Step]] = {}
        self._narrowed: set[Hashable] = set()  # casts down in the forward pass
        for step in flow.steps:
            if step.transposed:
                continue
            if is_product(step.eqn):
                self._forward.setdefault(written(step.eqn), []).append(step)
            if _is_cast(step) and step.ins[0].wide and step.outs[0].low:
                self._narrowed.add(written(step.eqn))

    def by_cause(self) -> dict[Cause, list[Step]]:
        """Returns each cause with the products that it reaches; none in a float32 program."""
        reached: dict[Cause, list[Step]] = {}
        low = False
        for step in self._flow.steps:
            if step.location.opaque and (is_opaque(step) or wide_product(step)):
                products = reached.setdefault(_opaque(step), [])
                products += [step] if is_product(step.eqn) else []
                low = True  # all of the program was to be
                continue
            low |= is_product(step.eqn) and any(x.low for x in step.ins[:2])
            if not wide_product(step) or step.location.no_autocast:
                continue
            for cause, implicit in self._causes(step).items():
                reached.setdefault(cause, []).append(step)
                low |= implicit
        if not low:
            return {}
        # A cast down of a product's result casts its cotangent too, so one remedy serves both.
        for cause in [c for c in reached if c.mechanism == "product"]:
            same = [c for c in reached if (c.line, c.path) == (cause.line, cause.path)]
            for other in [c for c in same if c.mechanism == "cotangent"]:
                reached[cause] += reached.pop(other)
        return reached

    def is_minor(self, products: list[Step], total: int) -> bool:
        """Returns whether the products of a cause are too small to matter; False if not known."""
        if not products:
            return False
        share = sum(operations(s.eqn) * s.location.loops for s in products) / max(total, 1)
        outer = all(contracted(s.eqn) == 1 for s in products)
        return share < MINOR or (outer and share < MINOR_OUTER)

    @functools.cache  # noqa: B019 - one entry a step, and the object lives for one audit
    def _causes(self, product: Step) -> dict[Cause, bool]:
        """Causes of a wide product, each with whether it promoted a low value implicitly."""
        twins = self._forward.get(written(product.eqn), []) if product.transposed else []
        if twins:
            wide = [twin for twin in twins if wide_product(twin)]
            if not wide:
                return {_cotangent(product): True}
            return {c: i for twin in wide for c, i in self._causes(twin).items()}
        causes: dict[Cause, bool] = {}
        operands = [x for x in product.ins[:2] if x.wide]
        makers = [step for x in operands for step in self._makers.behind(x)]
        if len(operands) == 1:  # it meets a low operand in the product itself
            makers.append(product)
        for step in makers:
            if self._is_transposed_cast(step):
                causes[_cotangent(product)] = True
            elif not self._is_consequence(step):
                causes[self._cause(step)] = not _asked(step)
        if causes:
            return causes
        origins = dict.fromkeys(origin(x).text for x in operands)
        return {_of("inputs", product, operands[0], " and ".join(origins)): False}

    def _is_transposed_cast(self, step: Step) -> bool:
        return _is_cast(step) and step.transposed and written(step.eqn) in self._narrowed

    def _partners(self, step: Step) -> list[list[Value]]:
        """For each reader of a promoted value, its other operands that are wide."""
        if is_product(step.eqn):
            return [[x for x in step.ins[:2] if x.wide]]
        return [
            [x for x in reader.ins if x.wide and x not in inside]
            for reader, inside in readers(step.outs[0])
            if step.transposed or not reader.transposed  # a gradient reads what it is given
        ]

    @functools.cache  # noqa: B019 - as `_causes`
    def _is_consequence(self, step: Step) -> bool:
        """Whether a step is a consequence of an earlier cause."""
        met = [
            any(self._makers.before(step, x) for x in partners) for partners in self._partners(step)
        ]
        if not _asked(step):
            return any(met)
        # `h.astype(x.dtype)` is a consequence of x. Two casts of a product's operands are two
        # causes, but the cast of a weight is a consequence.
        feeds_product = any(is_product(reader.eqn) for reader, _ in readers(step.outs[0]))
        may_be = _is_cast(step) and (is_argument(step.ins[0]) or not feeds_product)
        return may_be and bool(met) and all(met)

    def _cause(self, step: Step) -> Cause:
        if not _is_cast(step) and not is_product(step.eqn):
            wide = next(x for x in step.outs if x.wide)
            return _of("operation", step, wide, step.name)
        partners = self._partners(step)
        # Without values that are wide through this step alone, and numbers if it has other readers.
        met = [x for each in partners for x in each if x.number or origin(x).kind != "cast"]
        best = [x for x in met if not x.number] or (met if len(partners) == 1 else [])
        if _asked(step) or not best:
            source = _dtype(step.ins[0])
            if _is_cast(step):
                return _of("cast", step, step.outs[0], f"a cast of {source}")
            return _of("product", step, step.outs[0], f"a product of {source}")
        return _met(step, best[0])


def _makes(step: Step) -> bool:
    """Whether a step makes a wide value of low ones."""
    wide = any(x.wide and not x.number for x in step.ins)
    low = any(x.low for x in step.ins) and any(x.wide for x in step.outs)
    return low and (is_product(step.eqn) or not wide)


def _is_cast(step: Step) -> bool:
    return step.name == "convert_element_type"


def _asked(step: Step) -> bool:
    """Whether a wide result is explicit, and no promotion of mixed operands."""
    if is_product(step.eqn):
        return all(x.low for x in step.ins[:2])
    if not _is_cast(step):
        return True
    names = called(step.eqn)
    return any(name in _CASTS for name in names) and not any("promote" in name for name in names)


def _met(step: Step, partner: Value) -> Cause:
    """The cause of a low and a wide operand, in a promotion or in a product of both."""
    kind, text, source = origin(partner)
    if is_product(step.eqn):  # nothing is promoted: the line is that of the wide operand
        cause = _of(kind, source or step, partner, text)
        return dataclasses.replace(cause, low=_of(kind, step, partner, text).low)
    line = source.location.line if source else ""
    apart = line not in ("", step.location.line)
    return _of(kind, step, partner, f"{text} at {line}" if apart else text)


def _cotangent(product: Step) -> Cause:
    wide = next(x for x in product.ins[:2] if x.wide)
    return _of("cotangent", product, wide, "the gradient of a wide result")


def _opaque(step: Step) -> Cause:
    count, location = held_products(step.eqn), step.location
    held = f" ({count} products inside)" if count else ""
    return Cause("opaque", location.line, location.path, "float32", "", f"{location.opaque}{held}")


def _of(mechanism: str, step: Step, wide: Value, origin: str) -> Cause:
    low = next((_dtype(x) for x in step.ins if x.low), "")
    return Cause(mechanism, step.location.line, step.location.path, _dtype(wide), low, origin)


def _dtype(value: Value) -> str:
    return str(value.aval.dtype)


_REMEDIES: dict[str, str] = {
    "constant": "make the constant {low}: jnp.asarray(constant, x.dtype)",
    "number": "write a Python number, which takes the dtype of what it meets",
    "argument": "cast the argument to {low} before it meets a {low} value",
    "made": "make the array in {low}: pass dtype=x.dtype, or cast it before it meets x",
    "cast": "cast the result back with .astype({low}) before the next product",
    "product": "cast the product's result to {low} before the next product",
    "operation": "cast the operation's result to {low} before the next product",
    "cotangent": "let the product give {low} and cast that up, or cast the cotangent in a"
    " custom_vjp",
    "opaque": "call mpjax.autocast on the function that is given to it, or keep it in float32 with"
    " mpjax.no_autocast",
    "inputs": "cast both operands of the product to {low}",
}


def remedy(cause: Cause, low: str) -> str:
    """Returns what to do about a cause, in a program whose low dtype is `low`."""
    return _REMEDIES[cause.mechanism].format(low=low)
