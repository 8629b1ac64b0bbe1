"""Names of a package that are imported from its modules at first use."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], renamed: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Returns what a package's `__getattr__` answers.

    Importing a part for a train step then loads neither orbax nor what draws progress bars.

    Args:
      package: its name.
      names: name -> the module below the package that defines it.
      renamed: old name -> the name that it has now; using an old one warns, in one line.

    Example:
      >>> lazy_names("mpjax.train", {"fit": "loop"})("fit").__name__
      'fit'
      >>> lazy_names("mpjax.train", {"fit": "loop"})("fitt")
      Traceback (most recent call last):
      AttributeError: module 'mpjax.train' has no attribute 'fitt'
    """

    def find(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(f"{package}.{names[name]}"), name)
        if renamed and name in renamed:
            now = renamed[name]
            text = f"{package}.{name} is called {package}.{now}; the old name goes with version 0.2"
            warnings.warn(text, FutureWarning, stacklevel=3)
            return getattr(importlib.import_module(package), now)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
