"""Errors that the user can mend: one line that says what, where and the remedy."""

from __future__ import annotations

import importlib
from typing import Any


class ConfigError(ValueError):
    """A setting, path or file that cannot be used as given.

    The message is one line: where, what was expected, what was found, what to do.
    Command line entry points print it without a traceback and exit with status 2.
    """


class TrainingStopped(RuntimeError):
    """Training cannot go on: the loss scale is at its minimum and gradients stay non-finite."""


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
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what}: needs the package {module.split('.')[0]}, which is not installed; pip install"
            f" 'mpjax[{extra}]'{instead}"
        ) from error
