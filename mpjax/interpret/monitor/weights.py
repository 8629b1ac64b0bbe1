"""The weights among a program's arguments, and what it returns for each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from mpjax.interpret.core.dataflow import Flow, Step, Value, reach
from mpjax.interpret.core.op_lists import SHAPE
from mpjax.interpret.core.retrace import is_float
from mpjax.interpret.core.trace import Program

RENAMES = SHAPE | {
    *("copy", "copy_p", "convert_element_type", "optimization_barrier", "pvary"),
    *("settled", "with_derivative"),
}
# By which a new weight is made of its old one: sums, choices, casts and operations on bits.
_ADDS = RENAMES | {
    *("add", "sub", "select_n", "bitcast_convert_type", "reduce_precision", "clamp", "max", "min"),
    *("and", "or", "xor", "not", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
}
_KEY = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.([^.\[\]]+)")


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
