"""Configurations by the name of a size, with some fields changed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from mpjax.errors import ConfigError

C = TypeVar("C")


def named_config(
    kind: type[C], sizes: Mapping[str, Mapping[str, Any]], size: str | C, changes: dict[str, Any]
) -> C:
    """Returns the configuration of a named size, or a given one, with some fields changed.

    Raises:
      ConfigError: unknown size or field.
    """
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if isinstance(size, kind):
        base: Mapping[str, Any] = {name: getattr(size, name) for name in fields}
    elif isinstance(size, str) and size in sizes:
        base = sizes[size]
    else:
        near = difflib.get_close_matches(str(size), sizes, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"model: unknown size {size!r}; {hint}known: {' '.join(sizes)}")
    if unknown := sorted(set(changes) - fields):
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"model: unknown field {unknown[0]!r}; {hint}known: {' '.join(sorted(fields))}"
        )
    return kind(**{**base, **changes})
