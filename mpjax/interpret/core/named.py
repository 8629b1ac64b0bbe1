"""Module paths for models whose library leaves none: Flax NNX, Equinox, pytrees of one's own."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util

from mpjax.errors import ConfigError
from mpjax.typing import Tree

# Libraries whose modules have paths by themselves.
_WITH_PATHS = {"flax.linen": "Flax Linen", "haiku": "Haiku"}
# Bases of modules; their methods compute nothing.
_BASES = frozenset(
    {
        *(("flax", "Module"), ("flax", "Pytree"), ("flax", "Object"), ("equinox", "Module")),
        *(("typing", "Generic"), ("builtins", "object")),
    }
)


class _Here(NamedTuple):
    """The module whose call is running, and the scopes opened for it and for those around it."""

    path: str = ""
    scopes: tuple[str, ...] = ()


_NOWHERE = _Here()
_HERE = contextvars.ContextVar("named", default=_NOWHERE)


@contextlib.contextmanager
def _inside(path: str) -> Iterator[None]:
    """A scope in which the module path is `path`, wherever it is opened."""
    here = _HERE.get()
    if path == here.path:  # one method of a module calls another
        yield
        return
    below = not here.path or path.startswith(f"{here.path}/")
    rest = path.removeprefix(f"{here.path}/") if here.path and below else path
    token = _HERE.set(_Here(path, (*(here.scopes if below else ()), rest)))
    try:
        with contextlib.nullcontext() if below else _outside(here.scopes), jax.named_scope(rest):
            yield
    finally:
        _HERE.reset(token)


@contextlib.contextmanager
def _outside(scopes: tuple[str, ...]) -> Iterator[None]:
    """The name stack as it was before these scopes, with the transforms that came since."""
    stack = source_info_util.current_name_stack().stack
    ours = (i for i, e in enumerate(stack) if type(e).__name__ == "Scope" and e.name in scopes)
    start = next(ours, len(stack))
    since = [e for e in stack[start:] if type(e).__name__ == "Transform"]
    with source_info_util.set_name_stack(source_info_util.NameStack((*stack[:start], *since))):
        yield


def _methods(cls: type) -> list[str]:
    """Names of the methods of a module's class that may compute something."""
    names: dict[str, None] = {}
    for kind in cls.__mro__:
        if (kind.__module__.split(".")[0], kind.__name__) not in _BASES:
            names |= dict.fromkeys(vars(kind))
    for field in getattr(cls, "__dataclass_fields__", ()):
        names.pop(field, None)  # the default of a field, such as an activation
    found = []
    for name in names:
        held = inspect.getattr_static(cls, name)
        plain = callable(held) and hasattr(held, "__get__")
        if plain and not isinstance(held, type | staticmethod | classmethod | property):
            found += [name] if name == "__call__" or not name.startswith("_") else []
    return found


def _is_module(node: Any) -> bool:
    """Whether a node of a pytree is a module, and no container and no labelled array."""
    cls = type(node)
    # An array with a label (NNX) is callable too.
    if not hasattr(node, "__dict__") or hasattr(node, "get_metadata"):
        return False
    if isinstance(node, functools.partial | dict | list | tuple):  # not laid out as plain objects
        return False
    if callable(node):
        return True
    # Modules of Equinox and NNX need not be callable; lists and dicts of NNX are no modules.
    return type(cls) is not type and not hasattr(cls, "__iter__") and bool(_methods(cls))


@functools.cache  # one class for each, so that tree structures stay equal
def _named_class(cls: Any, path: str) -> Any:
    """A subclass whose methods run in the scope of `path`."""

    def in_scope(name: str) -> Any:
        @functools.wraps(getattr(cls, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _inside(path):
                return getattr(super(made, self), name)(*args, **kwargs)

        return method

    def reduce(self: Any, protocol: Any) -> Any:
        return _restore, (_plain(self, cls), path)

    body: dict[str, Any] = {name: in_scope(name) for name in _methods(cls)}
    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"_unnamed": cls, "__reduce_ex__": reduce}  # pickle would look for the class by name
    made = type(cls)(cls.__name__, (cls,), body)
    return made


def _plain(node: Any, parent: Any) -> Any:
    """A named module as an instance of the class that it had before."""
    plain = object.__new__(parent)
    vars(plain).update(vars(node))
    return plain


def _restore(plain: Any, path: str) -> Any:
    parent: Any = type(plain)
    return _as_kind(plain, _named_class(parent, path))


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """A node's children with their keys, and what puts them together again."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _is_leaf(children: list[tuple[Any, Any]]) -> bool:
    """Whether a node's one child is itself; a node without children is none."""
    return bool(children) and not children[0][0]


def _as_kind(node: Any, kind: Any) -> Any:
    object.__setattr__(node, "__class__", kind)  # some modules refuse an ordinary assignment
    return node


def _register(kind: Any, parent: Any) -> None:
    """Makes a class a pytree as its parent is, where subclassing does not."""

    def flatten(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, tree = _one_level(_plain(node, parent))
        return [(keys[0], child) for keys, child in children], tree

    jax.tree_util.register_pytree_with_keys(
        kind, flatten, lambda tree, children: _as_kind(tree.unflatten(children), kind)
    )


def _spell(key: Any) -> str:
    for name in ("name", "key", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


class _Naming:
    """One copy of a model; `found` says whether it holds any module."""

    def __init__(self) -> None:
        self.found = False
        self._known: dict[int, tuple[Any, Any]] = {}  # with the original, which keeps its id taken

    def copy(self, node: Any, path: str = "") -> Any:
        """Returns a copy of a node; what is shared in the original is shared in the copy."""
        if id(node) not in self._known:
            self._known[id(node)] = (node, self._copy(node, path))
        return self._known[id(node)][1]

    def _copy(self, node: Any, path: str) -> Any:
        children, tree = _one_level(node)
        if _is_leaf(children):
            if hasattr(node, "_graph_node_flatten"):
                raise ConfigError(
                    f"named: {path or 'the model'}: {type(node).__name__} is an NNX module with"
                    " pytree=False, which cannot be copied as a pytree; leave pytree=False out"
                )
            return node
        below = ["/".join(filter(None, (path, *map(_spell, keys)))) for keys, _ in children]
        made = tree.unflatten(
            [self.copy(child, at) for at, (_, child) in zip(below, children, strict=True)]
        )
        if not _is_module(made):
            return made
        self.found = True
        parent: Any = getattr(type(node), "_unnamed", type(node))
        kind = _named_class(parent, path) if path else parent
        _as_kind(made, kind)
        if _is_leaf(_one_level(made)[0]):
            _register(kind, parent)
        return made


def named(model: Tree) -> Tree:
    """Returns a copy of a model whose modules' calls stand in scopes, by their attribute path.

    Flax Linen and Haiku leave the path of each module in what they compute, Equinox only class
    names and Flax NNX nothing; autocast's rules, `audit` and profilers then cannot tell one layer
    from another. In the copy `model.layers[3].attention.query` computes as
    `layers/3/attention/query`, whoever calls it.

    Every module becomes an instance of a subclass of its class, with the same fields, the same
    arrays and the same order of leaves; outputs are the same bits. The original is not changed,
    and NNX variables are copied, so that training the copy leaves it alone. A module that is
    shared keeps its first path.

    Each path is a class of its own. So name a model before its optimizer state is made and after
    its layers are stacked for a scan: trees of modules from different paths do not match.

    Args:
      model: an Equinox or Flax NNX module, or any pytree of modules; classes of your own that are
        registered as pytrees and callable count too.

    Returns:
      The copy, which is used like the original: called, differentiated, split, merged, updated.

    Raises:
      ConfigError: a model without modules, a class in place of an instance, or one of a library
        that names its modules itself.

    Example:
      >>> from flax import nnx
      >>> class Block(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.down(nnx.relu(self.up(x)))
      >>> block = named(Block(nnx.Rngs(0)))
      >>> jaxpr = jax.make_jaxpr(block)(jax.numpy.ones((2, 4)))
      >>> [str(e.source_info.name_stack) for e in jaxpr.eqns if e.primitive.name == "dot_general"]
      ['up', 'down']
    """
    for kind in type(model).__mro__:
        for package, library in _WITH_PATHS.items():
            if f"{kind.__module__}.".startswith(f"{package}."):
                raise ConfigError(
                    f"named: {type(model).__name__} is of {library}, whose modules have paths"
                    " already; use it as it is"
                )
    if isinstance(model, type):
        raise ConfigError(f"named: {model.__name__} is a class; pass an instance of it")
    naming = _Naming()
    copy = naming.copy(model)
    if not naming.found:
        raise ConfigError(
            f"named: {type(model).__name__} holds no modules (callable pytrees, as those of Equinox"
            " and Flax NNX are); open jax.named_scope('name') in the function itself"
        )
    return copy
