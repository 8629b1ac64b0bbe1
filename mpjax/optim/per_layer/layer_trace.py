"""An optimizer's update traced on abstract weights: which inputs each output depends on."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Jaxpr, Literal

from mpjax.optim.per_layer.dependence import (
    RANDOM,
    alike,
    aval_of,
    called,
    element,
    inputs_of,
    is_elementwise,
    traced,
    without_leaf,
)
from mpjax.optim.per_layer.layer_stacks import (
    LayerPaths,
    Path,
    own_paths,
    parts_of,
    stack_of,
    structure_of,
)
from mpjax.typing import Grads, Params, PyTree, Shape

_MOVES = frozenset(
    "reshape concatenate slice squeeze transpose split dynamic_slice gather copy pad"
    " broadcast_in_dim convert_element_type expand_dims".split()
)


class Owner(NamedTuple):
    """The weight, and the layer of it, that a leaf belongs to; what is left of the leaf's path."""

    weight: Path
    layer: int | None
    rest: str


def owners_of(tree: PyTree, weights: LayerPaths) -> list[Owner | None]:
    """Returns for each leaf of a state the weight whose path its own path holds."""
    found: list[Owner | None] = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        parts = parts_of(path)
        ends = itertools.combinations(range(len(parts) + 1), 2)
        spans = sorted(ends, key=lambda span: span[0] - span[1])  # the longest first
        start, end = next((s for s in spans if parts[slice(*s)] in weights), (0, 0))
        # A tree of one array has no path: nothing in a state tells that it is its own.
        own = weights[parts[start:end]] if end else None
        rest = "/".join((*parts[:start], "*", *parts[end:]))
        found.append(own and Owner(*own, rest))
    return found


def abstract(tree: PyTree) -> PyTree:
    """Returns the shapes and dtypes of a tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


class UpdateTrace(NamedTuple):
    """An optimizer's update on abstract weights.

    Args:
      state: abstract.
      jaxpr: of the update, without the closure; its inputs are gradients, state, weights, extras.
      inputs: the owner of each input.
      outputs: of each output: updates, state.
      kinds: `grads`, `state`, `params` or `extra`, for each input.
      reads: the inputs that each output depends on.
    """

    state: PyTree
    jaxpr: Jaxpr
    inputs: list[Owner | None]
    outputs: list[Owner | None]
    kinds: list[str]
    reads: list[frozenset[int]]

    @property
    def crossing(self) -> bool:
        """Whether a weight's update, or a number of no weight, depends on another weight's."""
        for owner, inputs in zip(self.outputs, self.reads, strict=True):
            for i in inputs - {RANDOM}:
                other = self.inputs[i]
                if other is not None and (owner is None or owner[:2] != other[:2]):
                    return True
        return False

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn."""
        return any(RANDOM in inputs for inputs in self.reads)

    def own_inputs(self) -> dict[tuple[Path, str], set[frozenset[str]]]:
        """Returns which of its own inputs each weight's update and state read, and the operations.

        Layers that are treated alike give one set.
        """
        found: dict[tuple[Path, str], set[frozenset[str]]] = {}
        outputs = zip(self.outputs, self.reads, strict=True)
        for index, (owner, inputs) in enumerate(outputs):
            if owner is not None:
                known = [(self.kinds[i], self.inputs[i]) for i in inputs - {RANDOM}]
                own = {f"{kind}:{o.rest}" for kind, o in known if o and o[:2] == owner[:2]}
                steps, _ = _arithmetic(self.jaxpr, index)
                own |= {f"{count} {name}" for name, count in steps.items()}
                found.setdefault((owner.weight, owner.rest), set()).add(frozenset(own))
        return found


def _arithmetic(
    jaxpr: Jaxpr, output: int, shape: Shape | None = None
) -> tuple[collections.Counter[str], set[int]]:
    """Operations on arrays behind an output, by name, and the inputs that they lead to.

    Only arrays with the shape of the output are followed, further axes in front aside: a norm over
    all weights has as many terms as there are leaves. Operations that only move numbers are not
    counted.
    """
    shape = aval_of(jaxpr.outvars[output]).shape if shape is None else shape
    made = {x: (eqn, i) for eqn in jaxpr.eqns for i, x in enumerate(eqn.outvars)}
    inputs = {x: i for i, x in enumerate(jaxpr.invars)}
    steps: collections.Counter[str] = collections.Counter()
    rest, visited, reached = [jaxpr.outvars[output]], set(), set()
    while rest:
        x = rest.pop()
        if isinstance(x, Literal) or x in visited:
            continue
        if not shape or aval_of(x).shape[-len(shape) :] != shape:
            continue
        visited.add(x)
        if x in inputs:
            reached.add(inputs[x])
        elif x in made:
            eqn, i = made[x]
            bodies, operands = called(eqn)
            for body in bodies:
                more, ends = _arithmetic(body, i, shape)
                steps += more
                rest += [operands[end] for end in ends]
            if not bodies:
                steps[eqn.primitive.name] += eqn.primitive.name not in _MOVES
                if len(eqn.outvars) == 1:  # a loop over many weights leads to all of them
                    rest += eqn.invars
    return +steps, reached


def trace_update(
    optimizer: optax.GradientTransformationExtraArgs,
    params: PyTree,
    extra: Mapping[str, PyTree],
    weights: LayerPaths,
) -> UpdateTrace:
    """Returns the trace of an update.

    Args:
      optimizer: takes any extras.
      params: abstract weights, in the view that is tried.
      extra: what else a step gives.
      weights: path in the view -> path of the weight, and its layer.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = abstract(jax.eval_shape(optimizer.init, params))
    args = (params, state, params, extra)

    def update(
        grads: Grads, state: PyTree, params: Params, extra: Mapping[str, PyTree]
    ) -> tuple[Grads, PyTree]:
        return optimizer.update(grads, state, params, **extra)

    closed, out = traced(update, *args)
    names = ("grads", "state", "params", "extra")
    kinds = [n for n, x in zip(names, args, strict=True) for _ in jax.tree.leaves(x)]
    outputs = owners_of(out[0], weights) + owners_of(out[1], weights)
    inputs = [owner for x in args for owner in owners_of(x, weights)]
    reads = inputs_of(closed.jaxpr, [frozenset((i,)) for i in range(len(inputs))])
    return UpdateTrace(state, closed.jaxpr, inputs, outputs, kinds, reads)


def sees_no_shapes(
    layer: UpdateTrace, whole: UpdateTrace, where: Mapping[Path, int], shapes: PyTree
) -> bool:
    """Returns whether the optimizer does with a stack what it does with each of its layers."""
    if structure_of(layer.state) != structure_of(whole.state):
        return False
    index = {owner: i for i, owner in enumerate(own_paths(shapes))}
    sizes = [x.shape for x in jax.tree.leaves(shapes)]
    owners = owners_of(whole.state, own_paths(shapes))
    states = zip(jax.tree.leaves(layer.state), jax.tree.leaves(whole.state), owners, strict=True)
    kinds = []
    for x, y, owner in states:
        stack = owner and stack_of(owner.weight, where)
        if y.shape != ((where[stack], *x.shape) if stack else x.shape) or x.dtype != y.dtype:
            return False
        own = owner is not None and y.shape == sizes[index[owner.weight]]
        if own:
            kinds.append(element(index[owner.weight]))  # type: ignore[union-attr]
        elif stack:
            return False
        else:
            kinds.append(without_leaf(y.shape))
    if len(whole.outputs) != len(sizes) + len(kinds):  # its state changes its structure
        return False
    if not alike(layer.jaxpr, whole.jaxpr):
        return False
    elements = [element(i) for i in range(len(sizes))]
    count = len(whole.jaxpr.invars) - 2 * len(sizes) - len(kinds)
    tail = whole.inputs[len(whole.inputs) - count :]
    extras = [without_leaf(()) if o is None else element(index[o.weight]) for o in tail]
    kinds_in = [*elements, *kinds, *elements, *extras]
    return is_elementwise(whole.jaxpr, kinds_in, [*elements, *kinds])
