"""Where an equation of a jaxpr stands: module path, direction and the user's source line."""

from __future__ import annotations

import functools
import re
import sys
import sysconfig
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.extend import source_info_util
from jax.extend.core import JaxprEqn

from mpjax.precision.policy import CARRIED
from mpjax.precision.rule import nearest

# A scope that `einsum` opens is named by its specification: no module.
_EINSUM = re.compile(r"^[\w.]*(,[\w.]*)*->[\w.]*$|^[\w.]*(,[\w.]*)+$")
# Equinox names its modules by their classes, which are no paths.
_CLASS = re.compile(r"^eqx\.nn\.\w+$")
_FRAME = re.compile(r"^(?P<file>.*?):(?P<line>\d+)(?::\d+)? \((?P<function>.*)\)$")
_LIBRARY = tuple(
    {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
)
_ROOT = Path(__file__).parents[2]
# `errors.py` has a frame around functions that explain wrong calls.
_OWN = (str(_ROOT / "interpret"), str(_ROOT / "errors.py"))
# Frames of these are within a product; the user's line is outside of them.
_PARTS = (*_OWN, *(str(_ROOT / part) for part in ("ops", "formats")))
_MANY_FRAMES = 60  # deep enough to leave any library

# Scopes that mark a region instead of naming a module.
RECOMPUTED = "rematted_computation"
NO_AUTOCAST = "mpjax.no_autocast"
OPAQUE = "mpjax.opaque."  # and the name of a primitive
_MARKS = frozenset({RECOMPUTED, NO_AUTOCAST, CARRIED})


class Location(NamedTuple):
    """Where an equation stands.

    Args:
      path: the module path, joined by `/`; empty outside every module.
      backward: it came from a transposition.
      tangent: it came from a differentiation; neither makes it part of the plain forward pass.
      recomputed: `jax.checkpoint` runs it a second time.
      no_autocast: it is in a function of `no_autocast`.
      carried: it belongs to a model that takes its policies by path already.
      opaque: the primitive that holds it, which autocast left as it was traced; empty elsewhere.
      line: the user's source line, `file.py:12 (function)`, in a notebook `Cell In[3]:12
        (function)`; of the enclosing equation where the traceback was cut.
      loops: how often it runs in one call: the lengths of the scans around it, multiplied.
    """

    path: str = ""
    backward: bool = False
    tangent: bool = False
    recomputed: bool = False
    no_autocast: bool = False
    carried: bool = False
    opaque: str = ""
    line: str = ""
    loops: int = 1

    @property
    def direction(self) -> str:
        """`backward`, or `forward` for everything that is not."""
        return "backward" if self.backward else "forward"


NOWHERE = Location()


@functools.lru_cache(maxsize=65536)
def _read(stack: tuple[Any, ...]) -> tuple[tuple[str, ...], Location]:
    """Module names of a name stack's elements, and a Location of what else they say."""
    names: list[str] = []
    before, again, opaque = "", 0, ""
    transforms: set[str] = set()
    marks: set[str] = set()
    for element in stack:
        name = element.name
        if type(element).__name__ == "Transform":
            transforms.add(name)
            again = len(names) if name == "transpose" else again
        elif name in _MARKS:
            marks.add(name)
        elif name.startswith(OPAQUE):
            opaque = opaque or name.removeprefix(OPAQUE)
        elif not _EINSUM.match(name) and not (before and name.startswith(f"{before}.")):
            names += [part for part in name.split("/") if part]
            before = name  # Linen names a module's method `module.method`, inside `module`
    if names[again : 2 * again] == names[:again]:
        names = names[again:]  # a rule within the gradient of a rule names its scopes from the root
    names = [name for name in names if not _CLASS.match(name)] or names
    return tuple(names), Location(
        backward="transpose" in transforms,
        tangent="jvp" in transforms,
        recomputed=RECOMPUTED in marks,
        no_autocast=NO_AUTOCAST in marks,
        carried=CARRIED in marks,
        opaque=opaque,
    )


def _root(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names without the class of the root module, which says nothing about where."""
    if not names or not names[0][:1].isupper() or "_" in names[0]:
        return names
    # What `jax.checkpoint` runs again stands in the root's scope twice.
    return names[2:] if names[1:2] == names[:1] else names[1:]


@functools.lru_cache(maxsize=65536)
def _line(traceback: Any, outer: str) -> str:
    info = source_info_util.SourceInfo(traceback, source_info_util.NameStack())
    text = source_info_util.summarize(info, num_frames=_MANY_FRAMES)
    frames = [_FRAME.match(line) for line in reversed(text.splitlines())]  # innermost first
    known = [frame for frame in frames if frame and not frame["file"].startswith(_PARTS)]
    users = [f for f in known if not f["file"].startswith(_LIBRARY) or "/mpjax/" in f["file"]]
    best = next(iter(users or ([] if outer else known)), None)
    if best is None:
        return outer
    function = best["function"].split(".<locals>.")[-1]
    return f"{_shown(best['file'])}:{best['line']} ({function})"


def _shown(file: str) -> str:
    """A file's path; for a temporary file of a notebook, its cell's number."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = shell.compile.format_code_name(file) if shell else None
    return " ".join(cell) if cell else file


def location_of(eqn: JaxprEqn, outer: Location, *, line: bool = True) -> Location:
    """Returns where an equation stands.

    Args:
      eqn: the equation; its name stack is relative to the jaxpr that holds it.
      outer: where the equation that holds this jaxpr stands.
      line: whether to look the source line up, which costs more than the rest.
    """
    names, own = _read(eqn.source_info.name_stack.stack)
    if not outer.path:
        names = _root(names)
    elif names and _CLASS.match(names[0]):
        names = ()
    path = "/".join(names)
    if outer.path and path:
        path = f"{outer.path}/{path}"
    return Location(
        path or outer.path,
        own.backward or outer.backward,
        own.tangent or outer.tangent,
        own.recomputed or outer.recomputed,
        own.no_autocast or outer.no_autocast,
        own.carried or outer.carried,
        own.opaque or outer.opaque,
        _line(eqn.source_info.traceback, outer.line) if line else outer.line,
        outer.loops,
    )


def unmatched(pattern: str, paths: Iterable[str], weights: Sequence[str] = ()) -> str:
    """Returns what an error should say after `matches no path of the function`.

    Args:
      pattern: matches none of the paths.
      paths: of the function. Those of an Equinox model without names are its modules' classes.
      weights: paths of arrays, which it could have matched too.
    """
    parts = [path.split("/") for path in paths if path]
    named = ["/".join(names) for names in parts if not all(map(_CLASS.match, names))]
    known = [*named, *weights]
    advice = "wrap the model with mpjax.named(model), or parts of it in jax.named_scope('name')"
    if not known:
        return f"it has no module paths; {advice}"
    if not named:
        return f"{nearest(pattern, known)}; it has no module paths: {advice}"
    if any(_CLASS.match(name) for names in parts for name in names):
        return f"{nearest(pattern, known)}; Equinox modules have paths in mpjax.named(model)"
    return nearest(pattern, known)


def called(eqn: JaxprEqn) -> tuple[str, ...]:
    """Returns the names of the library functions that made an equation, innermost first.

    `astype` among them is a cast that stands in the source, `_operator_mul` a product that promoted
    its operands.
    """
    return _frames(eqn.source_info.traceback)[0]


def written(eqn: JaxprEqn) -> Hashable:
    """Returns what equations that come from one expression share, its gradients' ones too."""
    return _frames(eqn.source_info.traceback)[1]


@functools.lru_cache(maxsize=65536)
def _frames(traceback: Any) -> tuple[tuple[str, ...], Hashable]:
    """Names of the library's functions up to the user's line, and what identifies that line."""
    names: list[str] = []
    user: list[Hashable] = []
    # Two products on one line differ in the instruction of the code that called them.
    for code, instruction in zip(*traceback.raw_frames(), strict=True) if traceback else ():
        if not code.co_filename.startswith((*_LIBRARY, *_OWN, "<")):
            user.append((code.co_filename, code.co_name, code.co_firstlineno, instruction))
        elif not user:
            names.append(code.co_name)
    return tuple(names), tuple(user) or id(traceback)
