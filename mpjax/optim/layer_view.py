"""An optimizer sees layers, though our trees stack them in one array.

Shapes mean something to some optimizers: Muon wants matrices, LAMB a norm for each of them, a mask
may ask for `ndim`. To these a stack of L matrices must look like L matrices. Others compute number
by number, to them the stack is as good, and they keep its program and its bits.

  whole    number by number, sums over all weights included: the optimizer sees the stacks.
  each     no weight's update depends on another weight: `vmap` over the layers, so that masks and
           labels see the tree as it is, with the shapes of a layer.
  leaves   anything else: each layer is a leaf, at `layers/0/mlp/up` or, where the optimizer holds
           trees of the stacks' structure, at `layers/mlp/up/0`.

The state is stacked in every case: a moment of a layer has one more axis in front.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax.errors import ConfigError, brief
from mpjax.optim.dependence import (
    RANDOM,
    alike,
    element,
    inputs_of,
    is_elementwise,
    traced,
    without_leaf,
)
from mpjax.precision import matches

log = logging.getLogger("mpjax.optim")

Path = tuple[str, ...]
LAYERS = ("**/layers",)


@jax.tree_util.register_pytree_with_keys_class
class Layers:
    """The layers of a stack, each a tree of its own."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)

    def tree_flatten_with_keys(self) -> Any:
        """Keys are those of a dict, which a user's path functions know."""
        named = ((jax.tree_util.DictKey(str(i)), x) for i, x in enumerate(self.layers))
        return tuple(named), None

    @classmethod
    def tree_unflatten(cls, aux: None, layers: Sequence[Any]) -> Layers:
        """See `jax.tree_util`."""
        return cls(layers)


def _is_layers(x: Any) -> bool:
    return isinstance(x, Layers)


def _parts(path: Any) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def stacks(params: Any, stacked: str | Sequence[str] = LAYERS) -> dict[Path, int]:
    """Returns where layers are stacked, and how many they are.

    Args:
      params: weights, or any tree of their structure.
      stacked: path patterns of subtrees. One counts if its children are not numbered and all its
        leaves have a first axis of one size.

    Example:
      >>> stacks({"decoder": {"layers": {"up": jnp.ones((3, 4, 4)), "norm": jnp.ones((3, 4))}}})
      {('decoder', 'layers'): 3}
    """
    patterns = (stacked,) if isinstance(stacked, str) else tuple(stacked)
    below: dict[Path, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parts = _parts(path)
        for end in range(1, len(parts)):
            # The whole prefix, and none of its ancestors, is what a pattern is to name.
            if any(_names(pattern, parts[:end]) for pattern in patterns):
                below.setdefault(parts[:end], []).append((parts[end], leaf))
                break
    found = {}
    for prefix, leaves in below.items():
        sizes = {leaf.shape[0] if getattr(leaf, "ndim", 0) else None for _, leaf in leaves}
        if len(sizes) == 1 and None not in sizes and not any(n.isdigit() for n, _ in leaves):
            found[prefix] = sizes.pop()
    return found


def _names(pattern: str, parts: Path) -> bool:
    if not matches(pattern, "/".join(parts)):
        return False
    return len(parts) == 1 or not matches(pattern, "/".join(parts[:-1]))


def _split(tree: Any, where: Mapping[Path, int], deep: bool, at_most: int | None = None) -> Any:
    """A tree in which each layer has leaves of its own.

    Args:
      tree: of the structure of the weights.
      where: from `stacks`.
      deep: whether the layers stand below each weight's path, not below the stack's.
      at_most: how many layers of a stack to show; all by default.
    """

    def depth(path: Any) -> int | None:
        parts = _parts(path)
        found = [n for prefix, n in where.items() if parts[: len(prefix)] == prefix]
        return found[0] if found else None

    def is_leaf(path: Any, x: Any) -> bool:
        return not deep and _parts(path) in where

    def split(path: Any, x: Any) -> Any:
        n = depth(path)
        if n is None:
            return x
        count = n if at_most is None else min(n, at_most)
        return Layers([jax.tree.map(lambda a, i=i: _layer(a, i), x) for i in range(count)])

    if deep:
        return jax.tree_util.tree_map_with_path(split, tree)
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=is_leaf, is_leaf_takes_path=True
    )
    return jax.tree.unflatten(structure, [split(path, x) for path, x in leaves])


def _layer(a: Any, index: int) -> Any:
    if isinstance(a, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
    return a[index]


def _joined(tree: Any) -> Any:
    """A tree with its layers stacked again."""

    def stack(x: Any) -> Any:
        if not _is_layers(x):
            return x
        structures = {jax.tree.structure(layer) for layer in x.layers}
        if len(structures) > 1:
            raise ConfigError(
                "optimizer: it keeps other states for some layers than for others, and layers are"
                " stacked in one array; give all layers of a stack the same mask or label"
            )
        return jax.tree.map(lambda *layers: jnp.stack(layers), *x.layers)

    return jax.tree.map(stack, tree, is_leaf=_is_layers)


def _as_split(tree: Any, like: Any) -> Any:
    """A stacked state with its layers apart, as in `like`."""

    def split(shown: Any, x: Any) -> Any:
        if not _is_layers(shown):
            return x
        return Layers(
            [jax.tree.map(lambda a, i=i: a[i], x) for i in range(len(shown.layers))]
        )

    return jax.tree.map(split, like, tree, is_leaf=_is_layers)


class _Owner(NamedTuple):
    """The weight, and the layer of it, that a leaf belongs to; what is left of the leaf's path."""

    weight: Path
    layer: int | None
    rest: str


def _owners(tree: Any, weights: Mapping[Path, tuple[Path, int | None]]) -> list[_Owner | None]:
    """For each leaf of a state, the weight whose path its own path holds."""
    found: list[_Owner | None] = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        parts = _parts(path)
        spans = (
            (start, end)
            for size in range(len(parts), 0, -1)
            for start in range(len(parts) - size + 1)
            for end in (start + size,)
        )
        span = next((s for s in spans if parts[slice(*s)] in weights), None)
        if span is None:
            # A tree of one array has no path: nothing in a state tells that it is its own.
            found.append(None)
        else:
            weight, layer = weights[parts[slice(*span)]]
            rest = "/".join((*parts[: span[0]], "*", *parts[span[1] :]))
            found.append(_Owner(weight, layer, rest))
    return found


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


class _Trace(NamedTuple):
    """An optimizer's update on abstract weights.

    Args:
      state: abstract.
      jaxpr: of the update, without the closure; its inputs are gradients, state, weights, extras.
      inputs: the owner of each input.
      outputs: of each output: updates, state.
      kinds: `grads`, `state`, `params` or `extra`, for each input.
    """

    state: Any
    jaxpr: Any
    inputs: list[_Owner | None]
    outputs: list[_Owner | None]
    kinds: list[str]

    @property
    def crossing(self) -> bool:
        """Whether a weight's update, or a number of no weight, depends on another weight's."""
        for owner, inputs in zip(self.outputs, self._inputs, strict=True):
            for i in inputs - {RANDOM}:
                other = self.inputs[i]
                if other is not None and (owner is None or owner[:2] != other[:2]):
                    return True
        return False

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn."""
        return any(RANDOM in inputs for inputs in self._inputs)

    @property
    def _inputs(self) -> list[frozenset[int]]:
        count = len(self.jaxpr.invars)
        return inputs_of(self.jaxpr, [frozenset((i,)) for i in range(count)])

    def own_inputs(self) -> list[frozenset[tuple[Path, str, frozenset[str]]]]:
        """What enters each weight's update and state of the weight's own, layer by layer."""
        found: dict[int | None, set[Any]] = {}
        for owner, inputs in zip(self.outputs, self._inputs, strict=True):
            if owner is not None:
                known = [(self.kinds[i], self.inputs[i]) for i in inputs - {RANDOM}]
                own = {f"{kind}:{o.rest}" for kind, o in known if o and o[:2] == owner[:2]}
                entry = (owner.weight, owner.rest, frozenset(own))
                found.setdefault(owner.layer, set()).add(entry)
        rest = found.pop(None, set())
        return [frozenset(each | rest) for each in (found or {None: set()}).values()]


def _trace(
    optimizer: Any, params: Any, extra: dict[str, Any],
    weights: Mapping[Path, tuple[Path, int | None]],
) -> _Trace:  # fmt: skip
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = _abstract(jax.eval_shape(optimizer.init, params))
    arrays = {name: x for name, x in extra.items() if not callable(x)}
    rest = {name: x for name, x in extra.items() if callable(x)}
    args = (params, state, params, arrays)

    def update(grads: Any, state: Any, params: Any, arrays: Any) -> Any:
        return optimizer.update(grads, state, params, **arrays, **rest)

    closed, out = traced(update, *args)
    names = ("grads", "state", "params", "extra")
    kinds = [n for n, x in zip(names, args, strict=True) for _ in jax.tree.leaves(x)]
    outputs = _owners(out[0], weights) + _owners(out[1], weights)
    inputs = [owner for x in args for owner in _owners(x, weights)]
    return _Trace(state, closed.jaxpr, inputs, outputs, kinds)


class _Plan(NamedTuple):
    """How an optimizer sees a tree: `whole`, `each` or `leaves`; see the module's docstring."""

    mode: str
    where: dict[Path, int]
    deep: bool = False
    owned: tuple[Path, ...] = ()


class LayerView:
    """An optimizer, and how it is to see trees with stacked layers; `each_layer` makes it."""

    def __init__(self, optimizer: Any, stacked: str | Sequence[str]) -> None:
        self._optimizer = _with_extras(optimizer)
        self._stacked = stacked
        self._plans: dict[Any, _Plan] = {}

    def init(self, params: Any) -> Any:
        """See `optax.GradientTransformation`."""
        plan = self.plan(params, {})
        if plan.mode == "whole":
            return self._optimizer.init(params)
        if plan.mode == "leaves":
            return _joined(self._optimizer.init(_split(params, plan.where, plan.deep)))
        shapes = jax.eval_shape(self._optimizer.init, _one_layer(params, plan.where))

        def axis(owner: _Owner | None) -> tuple[str, ...] | None:
            return None if owner is None else self._stack(owner.weight, plan.where)

        outs = [axis(o) for o in _owners(shapes, _own(params))]
        return self._vmapped(self._optimizer.init, plan.where, (params,), outs)

    def update(self, grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        """See `optax.GradientTransformationExtraArgs`."""
        plan = self.plan(grads if params is None else params, extra)
        if plan.mode == "whole":
            return self._optimizer.update(grads, state, params, **extra)
        structure = jax.tree.structure(grads)

        def is_tree(x: Any) -> bool:
            return not callable(x) and jax.tree.structure(x) == structure

        if plan.mode == "leaves":
            split = functools.partial(_split, where=plan.where, deep=plan.deep)
            shown = jax.tree.structure(_abstract(split(grads)))

            def seen(x: Any) -> Any:
                if not callable(x):
                    return split(x) if is_tree(x) else x

                def function(*args: Any, **rest: Any) -> Any:  # such as the loss of a line search
                    whole = (_joined(a) if jax.tree.structure(a) == shown else a for a in args)
                    return x(*whole, **rest)

                return function

            like = jax.eval_shape(self._optimizer.init, _abstract(split(grads)))
            updates, state = self._optimizer.update(
                split(grads), _as_split(state, like), None if params is None else split(params),
                **{name: seen(x) for name, x in extra.items()},
            )  # fmt: skip
            return _joined(updates), _joined(state)
        arrays = {name: x for name, x in extra.items() if not callable(x)}
        rest = {name: x for name, x in extra.items() if callable(x)}

        def update(grads: Any, state: Any, params: Any, arrays: Any) -> Any:
            return self._optimizer.update(grads, state, params, **arrays, **rest)

        own = _own(grads)
        outs = [
            None if o is None else self._stack(o.weight, plan.where)
            for x in (grads, state)
            for o in _owners(x, own)
        ]
        return self._vmapped(update, plan.where, (grads, state, params, arrays), outs, own)

    @staticmethod
    def _stack(weight: Path, where: Mapping[Path, int]) -> Path | None:
        return next((p for p in where if weight[: len(p)] == p), None)

    def _vmapped(
        self, function: Any, where: Mapping[Path, int], args: Any, outs: Sequence[Path | None],
        own: Any = None,
    ) -> Any:  # fmt: skip
        """Runs a function of one layer on all, a stack of layers after the other."""
        leaves, structure = jax.tree.flatten(args)
        own = _own(args[0]) if own is None else own
        owners = _owners(args, own)
        ins = [None if o is None else self._stack(o.weight, where) for o in owners]
        shape: list[Any] = []

        def flat(*leaves: Any) -> list[Any]:
            out, tree = jax.tree.flatten(function(*jax.tree.unflatten(structure, leaves)))
            shape[:] = [tree]
            return out

        run: Callable[..., Any] = flat
        for stack in where:
            axes = tuple(0 if s == stack else None for s in ins)
            run = jax.vmap(run, axes, [0 if s == stack else None for s in outs])
        out = run(*leaves)
        return jax.tree.unflatten(shape[0], out)

    def plan(self, params: Any, extra: dict[str, Any]) -> _Plan:
        """Returns how the optimizer sees these weights; found once for each tree of shapes."""
        shapes = _abstract(params)
        leaves, structure = jax.tree.flatten(shapes)
        key = (structure, tuple((x.shape, str(x.dtype)) for x in leaves))
        if key not in self._plans:
            where = stacks(shapes, self._stacked)
            plan = self._found(shapes, where, extra) if where else _Plan("whole", where)
            if plan.mode != "whole":
                log.info(
                    "optimizer: its update reads shapes; it sees each layer of %s as weights of"
                    " its own", ", ".join("/".join(prefix) for prefix in where),
                )  # fmt: skip
            self._plans[key] = plan
        return self._plans[key]

    def _found(self, shapes: Any, where: dict[Path, int], extra: dict[str, Any]) -> _Plan:
        number = jax.ShapeDtypeStruct((), jnp.float32)
        extra = {"value": number, "grad": shapes} | {
            name: x if callable(x) else _abstract(x) for name, x in extra.items()
        }
        one, own = _one_layer(shapes, where), _own(shapes)

        def given(view: Callable[[Any], Any]) -> dict[str, Any]:
            structure = jax.tree.structure(shapes)
            return {
                name: view(x) if not callable(x) and jax.tree.structure(x) == structure else x
                for name, x in extra.items()
            }

        def attempt(params: Any, view: Any, weights: Any) -> _Trace | None:
            try:
                return _trace(self._optimizer, params, given(view), weights)
            except Exception as error:  # whatever a third party raises, a view that it cannot take
                log.debug("optimizer: a view of the layers does not fit it: %s", error)
                return None

        layer = attempt(one, lambda x: _one_layer(x, where), own)
        whole = attempt(shapes, lambda x: x, own) if layer else None
        if layer and whole and _is_whole(layer, whole, where, shapes):
            return _Plan("whole", where)
        views = {
            deep: attempt(
                _split(shapes, where, deep, at_most=2),
                functools.partial(_split, where=where, deep=deep, at_most=2),
                _labels(shapes, where, deep),
            )
            for deep in (False, True)
        }
        fits = [
            deep
            for deep, view in views.items()
            if view and (layer is None or set(view.own_inputs()) == set(layer.own_inputs()))
        ]
        if layer and not layer.crossing and not layer.random:
            # A sum over the one weight of a group looks like a norm of its own: layers tell.
            if not fits or not views[fits[0]].crossing:  # type: ignore[union-attr]
                return _Plan("each", where)
        if fits:
            return _Plan("leaves", where, fits[0])
        if layer is None:  # it wants more of a step than is known here, or it is no tree's
            return _Plan("leaves", where, self._takes_deep(shapes, where))
        raise ConfigError(
            "optimizer: a mask or label by path means other weights when each layer has a path of"
            " its own, decoder/layers/0/mlp for decoder/layers/mlp; let it read the end of a path,"
            " or use mpjax.precision.matches"
        )

    def _takes_deep(self, shapes: Any, where: dict[Path, int]) -> bool:
        """Whether only a view with the layers below each weight fits the optimizer's init."""
        try:
            jax.eval_shape(self._optimizer.init, _split(shapes, where, False))
        except Exception:  # it holds a tree of the stacks' structure; the other view says the rest
            return True
        return False


def _with_extras(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer that takes any extras of a step, and leaves those that it does not know."""
    optimizer = optax.with_extra_args_support(optimizer)
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return optimizer
    known = {p.name for p in parameters}

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        fitting = {name: x for name, x in extra.items() if name in known}
        return optimizer.update(grads, state, params, **fitting)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _own(params: Any) -> dict[Path, tuple[Path, int | None]]:
    paths = [_parts(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {path: (path, None) for path in paths}


def _labels(
    shapes: Any, where: Mapping[Path, int], deep: bool
) -> dict[Path, tuple[Path, int | None]]:
    """Path in a view -> path of the weight, and its layer."""
    found: dict[Path, tuple[Path, int | None]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(_split(shapes, where, deep, at_most=2)):
        parts = _parts(path)
        prefix = next((p for p in where if parts[: len(p)] == p), None)
        at = -1 if deep else len(prefix or ())
        if prefix is None:
            found[parts] = (parts, None)
        else:
            bare = parts[:-1] if deep else (*parts[:at], *parts[at + 1 :])
            found[parts] = (bare, int(parts[at]))
    return found


def _one_layer(tree: Any, where: Mapping[Path, int]) -> Any:
    """The tree with the shapes of one layer in the place of each stack; arrays as they are."""

    def leaf(path: Any, x: Any) -> Any:
        parts = _parts(path)
        inside = any(parts[: len(p)] == p for p in where)
        return jax.ShapeDtypeStruct(x.shape[1:] if inside else x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _is_whole(layer: _Trace, whole: _Trace, where: Mapping[Path, int], shapes: Any) -> bool:
    """Whether the optimizer does with a stack what it does with each of its layers."""
    if jax.tree.structure(layer.state) != jax.tree.structure(whole.state):
        return False
    index = {owner: i for i, owner in enumerate(_own(shapes))}
    sizes = [x.shape for x in jax.tree.leaves(shapes)]
    owners = _owners(whole.state, _own(shapes))
    states = zip(jax.tree.leaves(layer.state), jax.tree.leaves(whole.state), owners, strict=True)
    kinds = []
    for x, y, owner in states:
        stack = owner and next((p for p in where if owner.weight[: len(p)] == p), None)
        if y.shape != ((where[stack], *x.shape) if stack else x.shape) or x.dtype != y.dtype:
            return False
        own = owner is not None and y.shape == sizes[index[owner.weight]]
        if own:
            kinds.append(element(index[owner.weight]))  # type: ignore[union-attr]
        elif stack:
            return False
        else:
            kinds.append(without_leaf(y.shape))
    if not alike(layer.jaxpr, whole.jaxpr):
        return False
    elements = [element(i) for i in range(len(sizes))]
    count = len(whole.jaxpr.invars) - 2 * len(sizes) - len(kinds)
    tail = whole.inputs[len(whole.inputs) - count :]
    extras = [without_leaf(()) if o is None else element(index[o.weight]) for o in tail]
    given = [*elements, *kinds, *elements, *extras]
    return is_elementwise(whole.jaxpr, given, [*elements, *kinds])


def each_layer(
    optimizer: optax.GradientTransformation, stacked: str | Sequence[str] = LAYERS
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer to which every layer of a stack is a weight of its own.

    What it does is what `optimizer` does with a tree of unstacked layers; its updates and state are
    stacked. Optimizers that compute number by number, sums over all weights included, run on the
    stacks as they are, bit for bit.

    Args:
      optimizer: a raw optax optimizer.
      stacked: path patterns of subtrees whose arrays have a leading axis of layers.

    Raises:
      ConfigError: no patterns; at init, masks that mean other weights when layers have paths.

    Example:
      >>> params = {"layers": {"norm": jnp.ones((3, 4)), "up": jnp.ones((3, 4, 4))}}
      >>> decay = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
      >>> tx = each_layer(optax.add_decayed_weights(0.5, mask=decay))
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(zeros, tx.init(params), params)
      >>> float(updates["layers"]["norm"].max()), float(updates["layers"]["up"].max())
      (0.0, 0.5)
    """
    patterns = (stacked,) if isinstance(stacked, str) else stacked
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(
            f"stacked: {brief(stacked)} are no path patterns; write stacked='**/layers', or () where"
            " no layers are stacked"
        )
    view = LayerView(optimizer, patterns)
    return optax.GradientTransformationExtraArgs(view.init, view.update)
