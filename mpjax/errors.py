"""Errors that the user can mend: one line that says what, where and the remedy."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import numbers
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_SHOWN = 64  # characters or entries of a value; `brief` shows fewer
_LONGEST = 2000  # characters of a message; what a file or a user said may be of any length


class ConfigError(ValueError):
    """A setting, path or file that cannot be used as given.

    The message is one line: where, what was expected, what was found, what to do.
    Command line entry points print it without a traceback and exit with status 2. A message may
    quote what a file says, so it is made `printable` here, whoever wrote it.

    Args:
      message: lines of it are joined; an array in it is printed on several.

    Example:
      >>> str(ConfigError("key: [1\\n 2] is no key"))
      'key: [1 2] is no key'
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(str(message)))


class TrainingStopped(RuntimeError):
    """Training cannot go on: the loss scale is at its minimum and gradients stay non-finite."""


def printable(text: str, longest: int = _LONGEST) -> str:
    """Returns text as one short line that a terminal shows and does nothing else with.

    Lines are joined; control characters, marks that turn the direction of writing and half
    surrogate pairs are escaped; of a longer text the middle is left out, for a message begins with
    where and ends with the remedy.

    Args:
      text: of any length.
      longest: characters of the result.

    Example:
      >>> printable("a\\x1b[2Jb\\nc"), printable("begin" * 9 + "end", 20)
      ('a\\\\x1b[2Jb c', 'beginbegi ... ginend')
    """
    text = " ".join(map(str.strip, _middle_out(text, 2 * longest).splitlines()))
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _middle_out(text, longest)


def _middle_out(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 5]} ... {text[-tail:]}"


def brief(value: Any) -> str:
    """Returns what a value is in a few words, for messages; of a large one only the beginning.

    Example:
      >>> import numpy as np
      >>> brief(None), brief([1, 2]), brief(np.zeros((2, 3), np.int8))
      ('None', '[1, 2]', 'an array of int8, shape (2, 3)')
      >>> brief({"w": np.zeros(2), "b": 0.0}), brief(10**400)
      ('a dict of 2', 'an integer of 1329 bits')
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"an array of {dtype}, shape {shape}"
    if isinstance(value, dict | list | tuple):
        inside = value.values() if isinstance(value, dict) else value
        if any(hasattr(one, "dtype") or isinstance(one, dict | list | tuple) for one in inside):
            return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, types.FunctionType):
        return f"the function {value.__qualname__}"
    if type(value) is int and value.bit_length() > 256:  # its digits cost time, or cannot be had
        return f"an integer of {value.bit_length()} bits"
    name = getattr(value, "name", None)
    if type(value) is dict:  # of what is long, what is not shown need not be spelled
        value = dict(itertools.islice(value.items(), _SHOWN))
    elif type(value) in (str, bytes, list, tuple):
        value = value[:_SHOWN]
    text = " ".join(repr(value).split())
    if len(text) > 60 and isinstance(name, str):  # a Precision's, and not how its rules begin
        return f"the {type(value).__name__} {name}"
    return text if len(text) <= 60 else f"{text[:56]} ..."


def is_whole(value: object, least: float = -math.inf) -> TypeGuard[int]:
    """Returns whether a setting is a whole number, and not below another; True and False are none.

    Args:
      value: of a setting; integers of NumPy are whole numbers too.
      least: the smallest that it may be.

    Example:
      >>> is_whole(1, 1), is_whole(0, 1), is_whole(True, 1), is_whole(1.0, 1)
      (True, False, False, False)
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= least  # type: ignore[call-overload]  # Integral, so it has int()


def listed(names: Iterable[str], count: int = 8) -> str:
    """Returns names in one line: all up to a count, else the first ones and how many more.

    Args:
      names: of any number and length.
      count: how many are shown; of a longer name only the beginning and the end.

    Example:
      >>> listed(["a", "b", "c", "d"], 2)
      'a, b and 2 more'
    """
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(printable(name, _LONGEST // 8) for name in names[:count]) + more


def explains_calls(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns a function whose call with wrong arguments is a ConfigError, one line.

    Python's own TypeError says neither what an unknown name may stand for nor what there is.

    Args:
      fn: a function or `__init__`; nothing else about it changes.

    Example:
      >>> @explains_calls
      ... def scaled(x, *, growth_factor=2.0):
      ...     return x * growth_factor
      >>> scaled(1.0, growth=3.0)
      Traceback (most recent call last):
      mpjax.errors.ConfigError: scaled: unknown argument 'growth'; did you mean growth_factor? ...
    """
    signature, misfit, error = inspect.signature(fn), _misfit, ConfigError  # in the closure

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except TypeError:
            if not (said := misfit(fn, signature, args, kwargs)):
                raise
        raise error(said)

    # With the globals of fn, by which doctest knows whose function it is.
    where: Any = fn
    own = types.FunctionType(call.__code__, where.__globals__, closure=call.__closure__)
    return functools.update_wrapper(own, fn)


def _misfit(
    fn: Callable[..., Any], signature: inspect.Signature, args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:  # fmt: skip
    """What does not fit the parameters of a function; empty if all does."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        where = fn.__qualname__.removesuffix(".__init__")
        names = [name for name in signature.parameters if name != "self"]
        unknown = [name for name in kwargs if name not in names]
        if not unknown:
            return f"{where}: {error}; it takes {', '.join(names)}"
        parts = set(unknown[0].split("_"))  # init_scale of another library is init here
        alike = [n for n in names if (own := set(n.split("_"))) <= parts or parts <= own]
        near = alike or difflib.get_close_matches(unknown[0], names)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"{where}: unknown argument {unknown[0]!r}; {hint}it takes {', '.join(names)}"
    return ""


def need(module: str, extra: str, what: str, instead: str = "") -> Any:
    """Returns a module of an optional package.

    Args:
      module: its full name, such as `sklearn.metrics`.
      extra: the extra of mpjax that brings the package.
      what: what needs it.
      instead: what else could be done.

    Raises:
      ConfigError: it is not installed.

    Example:
      >>> need("json", "none", "this line").loads("1")
      1
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or package).split(".")[0] != package:  # something of its own
            raise ConfigError(
                f"{what}: the package {package} cannot be imported ({error}); install it anew:"
                f" {install_command(extra)}{instead}"
            ) from error
        raise ConfigError(
            f"{what}: needs the package {package}, which is not installed;"
            f" {install_command(extra)}{instead}"
        ) from None


def install_command(extra: str) -> str:
    """Returns the command that adds an extra of mpjax, in the way in which mpjax was installed.

    From the folder of a clone, from the address that pip noted (a repository, a folder, a wheel),
    else from the package index.

    Args:
      extra: such as `hub`.

    Example:
      >>> install_command("hub").count("[hub]")
      1
    """
    folder = Path(__file__).resolve().parent.parent
    if (folder / "pyproject.toml").exists():  # a clone, installed with -e or on PYTHONPATH
        pip = ".venv/bin/pip" if Path(sys.prefix) == folder / ".venv" else "pip"
        tested = "-c constraints.txt " if (folder / "constraints.txt").exists() else ""
        there = "" if Path.cwd() == folder else f"cd {folder} && "
        return f"{there}{pip} install {tested}-e '.[{extra}]'"
    try:
        noted = importlib.metadata.distribution("mpjax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        noted = None
    if noted is None:
        return f"pip install 'mpjax[{extra}]'"
    source = json.loads(noted)
    where, vcs = source["url"], source.get("vcs_info")
    if vcs:
        where = f"{vcs['vcs']}+{where}@{vcs.get('requested_revision') or vcs['commit_id']}"
    return f"pip install 'mpjax[{extra}] @ {where}'"
