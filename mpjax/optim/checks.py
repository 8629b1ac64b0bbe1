"""Checks of what is passed to an optimizer: weights, gradients, states, numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.formats import is_quantized
from mpjax.paths import leaves_with_names
from mpjax.typing import Grads, Params, PyTree, Shape


def is_number(x: object) -> bool:
    """Returns whether x is a number, of Python or numpy, or a JAX scalar."""
    if isinstance(x, jax.Array):
        return x.shape == () and jnp.issubdtype(x.dtype, jnp.floating)
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)


def as_transformation(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformation:
    """Returns an optax transformation; `optax.MultiSteps` and its like have its two methods.

    Raises:
      ConfigError: it is no optax optimizer.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    made = not isinstance(optimizer, type)  # a class is not called yet
    if not made or not all(callable(getattr(optimizer, n, None)) for n in ("init", "update")):
        raise ConfigError(
            f"optimizer: {brief(optimizer)} is no optax optimizer; call it with its learning rate,"
            " such as optax.adam(1e-3)"
        )
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)


def check_weights(params: Params) -> None:
    """Checks that an update rule can write every weight.

    Raises:
      ConfigError: a leaf that is no array of floating-point numbers, or fp8 without scales.
    """
    for path, p in leaves_with_names(params, is_quantized):
        if is_quantized(p):
            continue
        where = path or "params"
        dtype = getattr(p, "dtype", None)
        if dtype is None:
            raise ConfigError(f"update: {where} is {brief(p)}, not an array; take jnp.asarray")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ConfigError(
                f"update: {where} holds {dtype}, and an optimizer moves floating-point numbers;"
                " keep it out of params"
            )
        if jnp.dtype(dtype).itemsize < 2:
            raise ConfigError(
                f"update: {where} holds {dtype} without scales, in which updates are lost; store"
                " it by mpjax.optim.store_weights"
            )


def check_like(name: str, candidate: PyTree, params: Params) -> None:
    """Checks that a tree has an array of each weight's shape in its place.

    Args:
      name: what to call the tree in an error.
      candidate: the tree.
      params: the weights as stored.

    Raises:
      ConfigError: another structure or shape.
    """
    shapes = [getattr(p, "shape", None) for p in jax.tree.leaves(params, is_leaf=is_quantized)]
    structure: Any = jax.tree.structure(jax.tree.map(lambda _: 0, params, is_leaf=is_quantized))
    same = structure == jax.tree.structure(candidate)
    if same and shapes == [getattr(x, "shape", None) for x in jax.tree.leaves(candidate)]:
        return
    if difference := _difference(candidate, params):
        path, theirs, ours = difference
        if theirs is None or ours is None:
            who = f"params and not in {name}" if theirs is None else f"{name} and not in params"
            raise ConfigError(
                f"update: {path or 'an array'} is in {who}; give {name} of the structure of params"
            )
        shape = getattr(theirs, "shape", None)
        what = brief(theirs) if shape is None else f"of shape {shape}"
        raise ConfigError(
            f"update: {name} of {path or 'params'} are {what}, the weight has shape"
            f" {getattr(ours, 'shape', None)}; give {name} of these params"
        )
    raise ConfigError(
        f"update: {name} stand in other containers than params ({jax.tree.structure(candidate)});"
        " give both in the same, such as dicts"
    )


def _difference(candidate: PyTree, params: Params) -> tuple[str, Any, Any] | None:
    """The first path at which a tree is not like the weights, and both leaves, None if absent."""
    theirs = dict(leaves_with_names(candidate))
    wanted = dict(leaves_with_names(params, is_quantized))
    for path in (*wanted, *theirs):
        pair = theirs.get(path), wanted.get(path)
        shapes = [getattr(x, "shape", None) for x in pair]
        if any(x is None for x in pair) or shapes[0] != shapes[1]:
            return path, *pair
    return None


def check_state(state: object, kind: type) -> None:
    """Checks that a step gets a state as its second argument.

    Raises:
      ConfigError: it gets something else.
    """
    if not isinstance(state, kind):
        raise ConfigError(
            f"update: the state is {brief(state)}; write step(grads, state, params), with the state"
            " from init or the last step"
        )


def check_seed(seed: object) -> None:
    """Checks that a seed is a whole number.

    Raises:
      ConfigError: it is not.
    """
    dtype = getattr(seed, "dtype", None) or np.dtype(type(seed))
    if not jnp.issubdtype(dtype, np.integer) or getattr(seed, "shape", ()) != ():
        raise ConfigError(f"seed: {brief(seed)} is not a whole number; write seed=0")


def check_positive(where: str, name: str, value: float) -> None:
    """Checks a setting.

    Raises:
      ConfigError: it is not a finite number above 0.
    """
    if not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"{where}: {name}={brief(value)} is not a positive number; give one")


def check_whole(where: str, name: str, value: object, least: int) -> None:
    """Checks a setting.

    Raises:
      ConfigError: it is not a whole number of `least` or above.
    """
    if not is_whole(value, least):
        raise ConfigError(
            f"{where}: {name}={brief(value)} is not a whole number of {least} or above"
        )


def update(
    inner: optax.GradientTransformation,
    grads: Grads,
    state: PyTree,
    params: Params,
    extra: Mapping[str, object],
) -> tuple[Grads, PyTree]:
    """Returns (updates, state) of an optax optimizer; says what does not fit it.

    Args:
      inner: the optimizer.
      grads: float32, of the structure of params.
      state: of the optimizer.
      params: float32 view of the weights.
      extra: further arguments that it may ask for.

    Raises:
      ConfigError: an argument is missing, the state is another optimizer's or other params', or
        it returns something else than an update of each weight.
    """
    inner = optax.with_extra_args_support(inner)
    try:
        updates, state = inner.update(grads, state, params, **extra)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        if "missing" in str(error) and "argument" in str(error):
            raise ConfigError(
                f"update: the optimizer needs more of a step ({error}); write step(grads, state,"
                " params, value=loss)"
            ) from None
        if _layout(jax.eval_shape(inner.init, params)) == _layout(state):
            raise
        raise ConfigError(
            "update: the optimizer state is not one of this optimizer and these params; make it"
            " with init(params)"
        ) from None
    check_updates(updates, params)
    return updates, state


def settled(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with an initial state of the structure that a step leaves.

    A gate chooses between two states, which must be alike. `optax.monitor` begins with an empty
    dict, in which its measurements stand after a step: here they begin as zeros.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def grows(x: object) -> bool:
        return isinstance(x, dict) and not x

    def init(params: Params) -> PyTree:
        state = optimizer.init(params)
        if not any(map(grows, jax.tree.leaves(state, is_leaf=grows))):
            return state

        def step(params: Params, state: PyTree, value: jax.Array) -> PyTree:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return update(optimizer, params, state, params, {"value": value, "grad": params})[1]

        begun = dict(jax.tree_util.tree_leaves_with_path(state))
        after = jax.eval_shape(step, params, state, jax.ShapeDtypeStruct((), jnp.float32))
        return jax.tree_util.tree_map_with_path(
            lambda path, x: begun[path] if path in begun else jnp.zeros(x.shape, x.dtype), after
        )

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def check_updates(updates: Grads, params: Params) -> None:
    """Checks that an optimizer returned an array of each weight's shape; a sum would broadcast it.

    Raises:
      ConfigError: another structure or shape.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32), updates)
    if (difference := _difference(shapes, params)) is None:
        return
    path, found, weight = difference
    where = path or "params"
    what = "nothing" if found is None else f"an array of shape {found.shape}"
    own = "no weight there" if weight is None else f"a weight of shape {weight.shape}"
    raise ConfigError(
        f"update: the optimizer returns {what} for {where}, {own}; give one that returns an update"
        " for each weight"
    )


def _layout(tree: PyTree) -> list[tuple[jax.tree_util.KeyPath, Shape]]:
    """Path and shape of each leaf."""
    return [(path, np.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
