"""Which tensors of a program are measured: found in its flow, without running it.

* weights: the floating-point leaves of the argument named `params`, else of the first argument;
* activations: operands (`lhs`, `rhs`) and result (`product`) of each forward product, what a module
  gives (`output`);
* activation gradients: of a product's result (`product`: what its backward products read) and of
  its operands (`operand`: what they give);
* gradients: of each weight, as the backward pass leaves it. They are followed back from what the
  program returns for each weight, a new weight or a gradient;
* updates: new weights minus old ones, where the program returns new ones.

A value is measured once: operands that are an earlier tensor cast or reshaped are left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax

from mpjax.interpret.core.dataflow import Flow, Step, Value, reach
from mpjax.interpret.core.op_lists import LOW, SHAPE
from mpjax.interpret.core.retrace import is_float
from mpjax.interpret.core.trace import Program
from mpjax.typing import Shape

RENAMES = SHAPE | {
    *("copy", "copy_p", "convert_element_type", "optimization_barrier", "pvary"),
    *("settled", "with_derivative"),
}
# Operations that make a new weight of its old one: sums, choices, casts and those on bits.
_ADDS = RENAMES | {
    *("add", "sub", "select_n", "bitcast_convert_type", "reduce_precision", "clamp", "max", "min"),
    *("and", "or", "xor", "not", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
}
_KEY = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.([^.\[\]]+)")
_SQUARES, _ROOTS = ("square", "integer_pow", "mul"), ("sqrt", "rsqrt")
_PARTS = ("split", "slice", "dynamic_slice", "squeeze")


class Mark(NamedTuple):
    """A value of an equation that is to be measured.

    Args:
      kind: `activations`, `gradients`, `activation_gradients`, `logits`, `squares` or `roots`.
      at: index of an operand, or that of a result as -1 - index.
      role: what it is to its module.
      name: of the weight that it belongs to; empty where the equation's module names it.
      layered: whether its first axis is that of layers.
    """

    kind: str
    at: int
    role: str = ""
    name: str = ""
    layered: bool = False


class Leaf(NamedTuple):
    """A weight among the arguments of a program.

    Args:
      name: its path, such as `decoder/mlp/up/kernel`.
      argument: its index.
      layered: whether its first axis is that of layers.
      new: index of the output that is the new weight, or None.
      gradient: index of the output that is its gradient, or None.
    """

    name: str
    argument: int
    layered: bool
    new: int | None
    gradient: int | None


class Tensors(NamedTuple):
    """The tensors of a program.

    Args:
      marks: id of an equation -> the values to measure there.
      weights: among the arguments.
      paths: of all modules.
      shapes: of the weights.
      flow: keeps the equations, so that their ids stay their own.
    """

    marks: dict[int, list[Mark]]
    weights: list[Leaf]
    paths: list[str]
    shapes: frozenset[Shape]
    flow: Flow


_Marker: TypeAlias = Callable[[Step, Mark], None]


def find_tensors(program: Program) -> Tensors:
    """Returns the tensors of a traced function."""
    flow = Flow(program)
    weights = find_weights(program, flow)
    marks: dict[int, list[Mark]] = {}

    def mark(step: Step, found: Mark) -> None:
        own = marks.setdefault(id(step.eqn), [])
        if found not in own:
            own.append(found)

    gradients = _mark_gradients(flow, weights, mark)
    _mark_products(flow, {flow.args[leaf.argument] for leaf in weights}, gradients, mark)
    shapes = frozenset(flow.args[leaf.argument].aval.shape for leaf in weights)
    return Tensors(marks, weights, list(flow.paths), shapes, flow)


def _mark_gradients(flow: Flow, weights: Sequence[Leaf], mark: _Marker) -> set[Value]:
    """Marks where gradients of weights leave the backward pass; returns these values."""
    found: set[Value] = set()
    for leaf in weights:
        index = leaf.new if leaf.new is not None else leaf.gradient
        if index is None:
            continue
        sources, between = sources_of(flow.outs[index])
        for step in sources:
            found.update(step.outs)
            if leaf.gradient is None:
                whole = step.outs[0].aval.shape == flow.args[leaf.argument].aval.shape
                mark(step, Mark("gradients", -1, "", leaf.name, leaf.layered and whole))
        if leaf.new is None:
            continue
        squares = [s for s in between if s.name in _SQUARES and _is_square(s)]
        roots = [s for s in between if s.name in _ROOTS]
        if len(squares) == 1 and len(roots) == 1:  # Adam's: g^2 into the moment, its root out
            mark(squares[0], Mark("squares", 0, name=leaf.name))
            mark(roots[0], Mark("roots", 0, "", leaf.name, leaf.layered))
    return found


def _is_square(step: Step) -> bool:
    if step.name == "mul":
        return step.ins[0] is step.ins[1]
    return step.name == "square" or step.eqn.params["y"] == 2


def _renamed(value: Value) -> Value:
    """The value that this one is, cast or laid out anew."""
    while True:
        renames = value.step is not None and value.step.name in RENAMES
        source = next(behind(value), None) if renames or len(value.same) == 1 else None
        if source is None or source.aval.size != value.aval.size:
            return value
        value = source


def _is_weight(value: Value, weights: set[Value]) -> bool:
    """Whether a value is a weight: a part of it, cast, or rounded and scaled by few numbers."""

    def ahead(value: Value) -> list[Value]:
        if value.step is None or value.step.name in _PARTS:
            return value.step.ins[:1] if value.step else value.same
        if value.step.name in LOW:
            return []
        ins = [v for v in same_size(value) if not v.step or v.step.name != "broadcast_in_dim"]
        return ins if len(set(ins)) == 1 else []

    return any(v in weights for v in reach([value], ahead))


def _is_cotangent(value: Value) -> bool:
    # What a backward pass lays out anew may be a number of the forward one.
    found = reach([_renamed(value)], lambda v: v.same)
    return any(v.step is not None and v.step.transposed for v in found)


def _mark_products(flow: Flow, weights: set[Value], gradients: set[Value], mark: _Marker) -> None:
    visited: set[Value] = set()
    sites = _sites([step for step in flow.steps if step.name in LOW])

    def new(value: Value) -> bool:
        root = _renamed(value)
        if not is_float(value.aval) or not value.aval.shape or root in visited:
            return False
        visited.add(root)
        return True

    for step in flow.steps:
        if step.name in LOW:
            site, holds = sites[id(step)], [_is_weight(v, weights) for v in step.ins[:2]]
            kind = "activation_gradients" if step.transposed else "activations"
            for i, (value, role) in enumerate(zip(step.ins[:2], ("lhs", "rhs"), strict=True)):
                if not holds[i] and _is_cotangent(value) == step.transposed and new(value):
                    mark(step, Mark(kind, i, ("product" if step.transposed else role) + site))
            out = step.outs[0]
            if _renamed(out) in gradients or out in gradients or not new(out):
                continue
            role = "operand" if step.transposed else "product"
            dims = step.eqn.params.get("dimension_numbers") if step.name == "dot_general" else None
            if step.transposed and not any(holds) and not (dims and dims[1][0]):
                if not gradients:  # the program returns nothing to follow them back from
                    mark(step, Mark("gradients", -1, "weight" + site))
            elif not (step.location.recomputed and step.location.backward):
                mark(step, Mark(kind, -1, role + site))
        elif step.name == "reduce_max" and not step.transposed and _feeds_softmax(step):
            mark(step, Mark("logits", 0))
        elif not step.transposed and not step.location.recomputed and step.location.path:
            for i, out in enumerate(step.outs):
                if _leaves(out, step) and out.aval.ndim and out.aval.size > 1 and new(out):
                    mark(step, Mark("activations", -1 - i, "output"))


def _leaves(value: Value, step: Step) -> bool:
    """Whether this is an output of a module: a forward operation outside of it reads it."""
    inside = f"{step.location.path}/"
    ways = (value, *value.joins)
    readers = [r for v in ways for r in v.readers if not r.location.backward]
    return is_float(value.aval) and (
        any(v.returned for v in ways)
        or any(not f"{r.location.path}/".startswith(inside) for r in readers)
    )


def _sites(steps: Sequence[Step]) -> dict[int, str]:
    """For each product the number of its line among those of its module; empty for a single one."""
    lines: dict[tuple[str, bool], dict[str, None]] = {}
    for step in steps:
        lines.setdefault((step.location.path, step.transposed), {})[step.location.line] = None
    found = {}
    for step in steps:
        own = list(lines[step.location.path, step.transposed])
        if step.transposed:
            own.reverse()  # the backward pass meets the last product first
        number = own.index(step.location.line) + 1
        found[id(step)] = str(number) if len(own) > 1 else ""
    return found


def _feeds_softmax(step: Step) -> bool:
    """Whether a maximum is the one that a softmax subtracts, of numbers that a product gave."""

    def passes(start: Value, wanted: str, through: frozenset[str]) -> list[Step]:
        found, todo = [], [start]
        for value in todo:
            for reader in [r for v in (value, *value.joins) for r in v.readers]:
                if reader.name == wanted:
                    found.append(reader)
                elif reader.name in through and len(todo) < 16:
                    todo += reader.outs
        return found

    moves = RENAMES | {"stop_gradient", "max", "select_n", "custom_jvp_call"}
    subtracted = passes(step.outs[0], "sub", moves)
    if not any(passes(s.outs[0], "exp", RENAMES) for s in subtracted):
        return False
    found = itertools.islice(reach([step.ins[0]], same_size), 65)
    return any(value.step is not None and value.step.name in LOW for value in found)


def _keys(name: str) -> tuple[str, ...]:
    """The parts of `args[0].params['mlp']['up']`."""
    return tuple(next(filter(None, groups), "") for groups in _KEY.findall(name))


def _outputs(program: Program) -> list[tuple[str, ...]]:
    """The path of each output array."""
    tree = program.rebuild([_Number(i) for i in range(len(program.closed.jaxpr.outvars))])
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {n: _keys(jax.tree_util.keystr(p)) for p, n in leaves if isinstance(n, _Number)}
    return [found[i] for i in sorted(found)]


class _Number(int):
    """The number of an output, which stands for it in the tree that the function returned."""


def find_weights(program: Program, flow: Flow) -> list[Leaf]:
    """Returns the weights: the leaves below `params`, else those of the first argument."""
    avals = [value.aval for value in flow.args]
    paths = [_keys(name) for name in program.names]
    named = [i for i, path in enumerate(paths) if "params" in path]
    first = [i for i, path in enumerate(paths) if path[:1] == ("0",)]
    found = {}
    for i in named or first:
        path = paths[i]
        cut = path.index("params") + 1 if "params" in path else 1
        while cut < len(path) and path[cut] == "params":  # Linen's own collection
            cut += 1
        if is_float(avals[i]):
            found[i] = path[cut:]
    new, gradient = _returned(flow, found, _outputs(program))
    leaves = []
    for i, rest in found.items():
        name, layered = "/".join(rest) or program.names[i], _is_layered(flow.args[i])
        leaves.append(Leaf(name, i, layered, new.get(i), gradient.get(i)))
    return leaves


def _returned(
    flow: Flow, weights: dict[int, tuple[str, ...]], outs: list[tuple[str, ...]]
) -> tuple[dict[int, int], dict[int, int]]:
    """Which output is the new value of a weight, and which its gradient."""
    at = {path: i for i, path in enumerate(outs)}
    prefixes: dict[tuple[str, ...], None] = {}
    for rest in weights.values():
        for path in outs:
            if rest == path[len(path) - len(rest) :]:
                prefixes[path[: len(path) - len(rest)]] = None
    complete = []
    for prefix in prefixes:
        mirror = {i: at.get((*prefix, *rest)) for i, rest in weights.items()}
        shaped = {
            i: j
            for i, j in mirror.items()
            if j is not None and flow.outs[j].aval.shape == flow.args[i].aval.shape
        }
        if len(shaped) == len(weights):
            complete.append((prefix, shaped))
    for prefix, shaped in complete:
        added = any(_adds(flow.outs[j], flow.args[i]) for i, j in shaped.items())
        # Linen's gradients lie below `params` too.
        bare = any(_leaves_backward(flow.outs[j]) for j in shaped.values())
        if added or (prefix[-1:] == ("params",) and not bare):
            return shaped, {}
    for _, shaped in complete:
        if any(sources_of(flow.outs[j])[0] for j in shaped.values()):
            return {}, shaped
    return {}, {}


def behind(value: Value) -> Iterator[Value]:
    """The values that a join is one of, or the operands of the operation that makes a value."""
    yield from value.same or (value.step.ins if value.step is not None else ())


def same_size(value: Value) -> list[Value]:
    """Those of the values behind one that have its size."""
    return [v for v in behind(value) if getattr(v.aval, "size", 0) == value.aval.size]


def _adds(new: Value, old: Value) -> bool:
    """Whether a value comes from another one through sums, choices and casts alone."""

    def ahead(value: Value) -> list[Value]:
        if value.step is not None and value.step.name not in _ADDS:
            return []
        return [v for v in behind(value) if v.aval.shape == old.aval.shape]

    return old in reach([new], ahead)


def _leaves_backward(value: Value) -> bool:
    """Whether a value is a result of the backward pass, at most cast or laid out anew."""
    while value.step is not None and not value.step.transposed:
        if value.step.name not in RENAMES or not value.step.ins:
            return False
        value = value.step.ins[0]
    return value.step is not None


def sources_of(value: Value) -> tuple[list[Step], list[Step]]:
    """The backward steps that a value comes from, value by value, and the steps on the way."""
    sources: list[Step] = []
    between: list[Step] = []

    def ahead(value: Value) -> list[Value]:
        if value.step is not None and (value.step.transposed or value.step.name == "add_any"):
            sources.append(value.step)
            return []
        between.extend([value.step] if value.step is not None else [])
        return list(value.same) or same_size(value)

    for _ in reach([value], ahead):
        pass
    return sources, between


def _is_layered(value: Value) -> bool:
    """Whether a program takes a weight apart along its first axis."""
    shape = value.aval.shape
    if len(shape) < 2:
        return False
    for _ in range(4):  # through a view or a cast
        parts = [v.aval.shape for v in value.joins]
        parts += [v.aval.shape[1:] for s in value.readers if s.name == "split" for v in s.outs]
        parts += [s.outs[0].aval.shape[1:] for s in value.readers if s.name == "slice"]
        if shape[1:] in parts:
            return True
        ahead = [s.outs[0] for s in value.readers if s.outs and s.outs[0].aval.shape == shape]
        if len(ahead) != 1:
            return False
        value = ahead[0]
    return False
