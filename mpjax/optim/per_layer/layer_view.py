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
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax.errors import ConfigError, brief
from mpjax.optim.checks import check_updates, settled
from mpjax.optim.per_layer.layer_stacks import (
    LAYERS,
    LayerPaths,
    Path,
    joined,
    layer_paths,
    one_layer,
    own_paths,
    split,
    split_like,
    stack_of,
    stacks,
    structure_of,
)
from mpjax.optim.per_layer.layer_trace import (
    UpdateTrace,
    abstract,
    owners_of,
    sees_no_shapes,
    trace_update,
)
from mpjax.typing import Grads, Params, PyTree

log = logging.getLogger("mpjax.optim")


class _Plan(NamedTuple):
    """How an optimizer sees a tree: `whole`, `each` or `leaves`; see the module's docstring."""

    mode: str
    where: dict[Path, int]
    deep: bool = False


class LayerView:
    """An optimizer, and how it is to see trees with stacked layers; `each_layer` makes it."""

    def __init__(
        self, optimizer: optax.GradientTransformation, stacked: str | Sequence[str]
    ) -> None:
        self._optimizer = settled(_with_extras(optimizer))
        self.stacked = stacked
        self._plans: dict[Hashable, _Plan] = {}

    def init(self, params: Params) -> PyTree:
        """See `optax.GradientTransformation`."""
        plan = self.plan(params, {})
        if plan.mode == "whole":
            return self._optimizer.init(params)
        if plan.mode == "leaves":
            return joined(self._optimizer.init(split(params, plan.where, plan.deep)))
        shapes = jax.eval_shape(self._optimizer.init, one_layer(params, plan.where))
        return _over_layers(self._optimizer.init, plan.where, (params,), shapes)

    def update(
        self, grads: Grads, state: PyTree, params: Params = None, **extra: Any
    ) -> tuple[Grads, PyTree]:
        """See `optax.GradientTransformationExtraArgs`."""
        weights = grads if params is None else params
        plan = self.plan(weights, extra)
        if plan.mode == "whole":
            return self._optimizer.update(grads, state, params, **extra)
        if plan.mode == "leaves":
            apart = functools.partial(split, where=plan.where, deep=plan.deep)
            structure, shown = structure_of(grads), structure_of(apart(grads))

            def viewed(x: Any) -> Any:
                if not callable(x):
                    return apart(x) if structure_of(x) == structure else x

                def function(*args: Any, **rest: Any) -> Any:  # such as the loss of a line search
                    whole = (joined(a) if structure_of(a) == shown else a for a in args)
                    return x(*whole, **rest)

                return function

            like = jax.eval_shape(self._optimizer.init, apart(abstract(weights)))
            shown_params = None if params is None else apart(params)
            shown_extra = {name: viewed(x) for name, x in extra.items()}
            updates, state = self._optimizer.update(
                apart(grads), split_like(state, like), shown_params, **shown_extra
            )
            check_updates(updates, apart(grads))
            return joined(updates), joined(state)
        functions = {name: x for name, x in extra.items() if callable(x)}
        arrays = {name: x for name, x in extra.items() if not callable(x)}

        def update(grads: Grads, state: PyTree, params: Params, arrays: PyTree) -> PyTree:
            updates, state = self._optimizer.update(grads, state, params, **arrays, **functions)
            check_updates(updates, grads)
            return updates, state

        return _over_layers(update, plan.where, (grads, state, params, arrays), (grads, state))

    def plan(self, params: PyTree, extra: Mapping[str, Any]) -> _Plan:
        """Returns how the optimizer sees these weights; found once for each tree of shapes."""
        shapes = abstract(params)
        leaves, structure = jax.tree.flatten(shapes)
        key = (structure, tuple((x.shape, str(x.dtype)) for x in leaves))
        if key not in self._plans:
            where = stacks(shapes, self.stacked)
            plan = self._found(shapes, where, extra) if where else _Plan("whole", where)
            if plan.mode != "whole":
                log.info(
                    "optimizer: its update reads shapes; it sees each layer of %s as weights of"
                    " its own", ", ".join("/".join(prefix) for prefix in where),
                )  # fmt: skip
            self._plans[key] = plan
        return self._plans[key]

    def _found(self, shapes: PyTree, where: dict[Path, int], extra: Mapping[str, Any]) -> _Plan:
        number = jax.ShapeDtypeStruct((), jnp.float32)
        # Without functions: an optimizer that needs one (a line search) sees leaves.
        named = {name: abstract(x) for name, x in extra.items() if not callable(x)}
        extra = {"value": number, "grad": shapes} | named
        structure, own = structure_of(shapes), own_paths(shapes)

        def attempt(view: Callable[[PyTree], PyTree], weights: LayerPaths) -> UpdateTrace | None:
            params = view(shapes)
            viewed = {n: view(x) if structure_of(x) == structure else x for n, x in extra.items()}
            try:
                return trace_update(self._optimizer, params, viewed, weights)
            except Exception as error:  # of any third party: it does not take this view
                log.debug("optimizer: a view of the layers does not fit it: %s", error)
                return None

        layer = attempt(lambda x: one_layer(x, where), own)
        whole = attempt(lambda x: x, own) if layer else None
        if layer and whole and sees_no_shapes(layer, whole, where, shapes):
            return _Plan("whole", where)
        views = {}
        for deep in (False, True):
            apart = functools.partial(split, where=where, deep=deep, at_most=2)
            views[deep] = attempt(apart, layer_paths(shapes, where, deep))
        fits = [
            deep
            for deep, view in views.items()
            if view and (layer is None or view.own_inputs() == layer.own_inputs())
        ]
        if layer and not layer.crossing and not layer.random:
            # A sum over a group of one weight looks like a norm of that weight; the layers differ.
            if not fits or not views[fits[0]].crossing:  # type: ignore[union-attr]
                return _Plan("each", where)
        if fits:
            return _Plan("leaves", where, fits[0])
        if layer is None:  # it needs more arguments than are known here, or takes no tree
            return _Plan("leaves", where, self._takes_deep(shapes, where))
        raise ConfigError(
            "optimizer: a mask or label by path means other weights when each layer has a path of"
            " its own, decoder/layers/0/mlp for decoder/layers/mlp; let it read the end of a path,"
            " or call mpjax.precision.matches(pattern, path)"
        )

    def _takes_deep(self, shapes: PyTree, where: dict[Path, int]) -> bool:
        """Whether only a view with the layers below each weight fits the optimizer's init."""
        try:
            jax.eval_shape(self._optimizer.init, split(shapes, where, False))
        except Exception:  # it holds a tree of the stacks' structure; the other view says the rest
            return True
        return False


def _over_layers(
    function: Callable[..., PyTree],
    where: Mapping[Path, int],
    args: tuple[PyTree, ...],
    outs: PyTree,
) -> PyTree:
    """Runs a function of one layer on all; it returns a tree of the structure of `outs`."""
    own = own_paths(args[0])
    stacks_in, stacks_out = (
        [owner and stack_of(owner.weight, where) for owner in owners_of(tree, own)]
        for tree in (args, outs)
    )
    leaves, structure = jax.tree.flatten(args)
    returned: list[Any] = []

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        out, tree = jax.tree.flatten(function(*jax.tree.unflatten(structure, leaves)))
        returned[:] = [tree]
        return out

    run: Callable[..., list[jax.Array]] = flat
    for stack in where:
        axes = tuple(0 if s == stack else None for s in stacks_in)
        run = jax.vmap(run, axes, [0 if s == stack else None for s in stacks_out])
    out = run(*leaves)
    return jax.tree.unflatten(returned[0], out)


def _with_extras(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer that takes any extras of a step, and leaves those that it does not know."""
    optimizer = optax.with_extra_args_support(optimizer)
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return optimizer
    known = {p.name for p in parameters}

    def update(
        grads: Grads, state: PyTree, params: Params = None, **extra: object
    ) -> tuple[Grads, PyTree]:
        fitting = {name: x for name, x in extra.items() if name in known}
        return optimizer.update(grads, state, params, **fitting)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


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
            f"stacked: {brief(stacked)} are no path patterns; write stacked='**/layers', or ()"
            " where no layers are stacked"
        )
    return _view(optimizer, tuple(patterns))


@functools.lru_cache(maxsize=64)
def _view(
    optimizer: optax.GradientTransformation, patterns: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
    """One view of an optimizer, so that it equals itself; and none of what is a view already."""
    owner = getattr(optimizer.init, "__self__", None)
    if isinstance(owner, LayerView) and owner.stacked == patterns:
        return optax.with_extra_args_support(optimizer)
    view = LayerView(optimizer, patterns)
    return optax.GradientTransformationExtraArgs(view.init, view.update)
