"""A function of any pytrees as a jaxpr: the one way into every transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from mpjax.errors import ConfigError, brief
from mpjax.typing import Array, PyTree

P = ParamSpec("P")  # the arguments of a function that a transform is given
R = TypeVar("R")  # what it returns

# Raised where a function asks for the value of a tracer.
_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def is_array(leaf: object) -> bool:
    """Returns whether a leaf is traced; what is not (a flag, a function, a name) stays as it is."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


class Program(NamedTuple):
    """A function, traced.

    Args:
      closed: its jaxpr.
      args: the arrays among its arguments, flat; `jax.ShapeDtypeStruct` stays what it is.
      names: of these arrays, such as `args[0]['w']`.
      rebuild: puts flat outputs back into the structure that the function returned.
    """

    closed: ClosedJaxpr
    args: list[Array]
    names: list[str]
    rebuild: Callable[[Sequence[object]], PyTree]


def check_function(what: str, fn: object) -> None:
    """Checks that a transform is given a function.

    Raises:
      ConfigError: it is none.
    """
    if not callable(fn):
        raise ConfigError(
            f"{what}: {brief(fn)} is not a function; pass the function to transform first,"
            f" {what}(fn, ...)"
        )


def trace(
    what: str,
    fn: Callable[..., PyTree],
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
    *,
    runs: bool = False,
) -> Program:
    """Returns a function's jaxpr at given arguments.

    Args:
      what: name of the transform, for errors.
      fn: the function; it is traced anew at every call, so what it closes over may change.
      args: its arguments: any pytrees. Leaves that are not arrays stay what they are.
      kwargs: its arguments by name.
      runs: whether the program runs in the function's place, so that what a call changes in its
        arguments would be lost.

    Raises:
      ConfigError: the function is none, cannot be traced, or changes an argument that is lost; an
        argument was donated before.
    """
    check_function(what, fn)
    paths, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    by_name = [(_spell(path), leaf) for path, leaf in paths if is_array(leaf)]
    for name, leaf in by_name:
        is_concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if is_concrete and leaf.is_deleted():
            raise ConfigError(
                f"{what}: {name} was donated to an earlier call and is gone; pass a copy, or"
                " call that step without donate_argnums"
            )
    out: dict[str, Any] = {}

    def flat(*arrays: Array) -> list[Array]:
        left = iter(arrays)
        leaves = [next(left) if is_array(leaf) else leaf for _, leaf in paths]
        inner_args, inner_kwargs = jax.tree.unflatten(tree, leaves)
        found = fn(*inner_args, **inner_kwargs)
        if runs:
            _unchanged(what, (inner_args, inner_kwargs), leaves, found)
        leaves, out["tree"] = jax.tree.flatten(found)
        out["leaves"] = [None if is_array(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if is_array(leaf)]

    arrays = [leaf for _, leaf in by_name]
    try:
        closed = jax.make_jaxpr(flat)(*arrays)
    except ConfigError as error:
        raise error from None  # without the second traceback that JAX appends
    except _NOT_TRACEABLE as error:
        first = str(error).strip().splitlines()[0]
        called = getattr(fn, "__qualname__", None) or type(fn).__name__
        raise ConfigError(
            f"{what}: {called} cannot be traced, because it asks for the value of an array:"
            f" {first} Use jax.lax.cond, jnp.where or a Python number there."
        ) from error

    def rebuild(outs: Sequence[object]) -> PyTree:
        left = iter(outs)
        leaves = [next(left) if leaf is None else leaf for leaf in out["leaves"]]
        return jax.tree.unflatten(out["tree"], leaves)

    return Program(closed, arrays, [name for name, _ in by_name], rebuild)


def _unchanged(what: str, passed: PyTree, before: Sequence[object], found: PyTree) -> None:
    """Refuses a call that changed an object among its arguments, and does not return the change.

    Such as a module of Flax NNX, whose dropout counts and whose batch norm averages.
    """
    now = jax.tree_util.tree_leaves_with_path(passed)
    if len(now) != len(before):
        return  # a dict that was filled or emptied: what is in it is the function's own
    returned = {id(leaf) for leaf in jax.tree.leaves(found)}
    for (path, new), old in zip(now, before, strict=True):
        lost = new is not old and is_array(new) and id(new) not in returned
        if lost and _in_object(passed, path):
            raise ConfigError(
                f"{what}: the call changes {_spell(path)}, which would be lost, for the function is"
                " traced; return the changed state (Flax NNX: nnx.split outside, nnx.merge inside,"
                " nnx.state of it returned), or transform the function that is called in it"
            )


def _in_object(passed: PyTree, path: tuple[Any, ...]) -> bool:
    """Whether a leaf lies in an argument that is no plain container."""
    value = passed[path[0].idx][path[1].key if path[0].idx else path[1].idx]
    return not isinstance(value, dict | list | tuple) and len(path) > 2


def _spell(path: tuple[Any, ...]) -> str:
    """`args[0]['w']` of a path into `(args, kwargs)`."""
    if path[0].idx == 0:
        return "args" + jax.tree_util.keystr(path[1:])
    return f"{path[1].key}{jax.tree_util.keystr(path[2:])}"
