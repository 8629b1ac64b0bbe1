"""What a sweep varies: `NAME=VALUE,VALUE` as values of a setting's own type, and their products."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mpjax.errors import ConfigError
from mpjax.formats.checks import did_you_mean

Value = str | float | bool | None
Changes = tuple[tuple[str, Value], ...]  # name and value of each setting


def parse_grid(
    texts: Sequence[str], config: Any, fixed: Collection[str]
) -> dict[str, tuple[Value, ...]]:
    """Returns name -> values of what is to be varied.

    Args:
      texts: such as `layers=2,4`; values that hold commas are separated by `|`.
      config: settings, a dataclass.
      fixed: settings that cannot be varied.

    Raises:
      ConfigError: another form, an unknown setting, a value that is not of its type, or a setting
        or value that stands twice.
    """
    kinds = typing.get_type_hints(type(config))
    known = [f.name for f in dataclasses.fields(config) if f.name not in fixed]
    found: dict[str, tuple[Value, ...]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not listed:
            raise ConfigError(f"sweep: {text!r}; write NAME=VALUE,VALUE, such as layers=2,4")
        if name not in known:
            raise ConfigError(
                f"sweep: unknown setting {name!r}; {did_you_mean(name, known)}known:"
                f" {' '.join(known)}"
            )
        if name in found:
            raise ConfigError(f"sweep: {name} stands twice; name it once, with all its values")
        parts = listed.split("|" if "|" in listed else ",")
        values = tuple(_value(name, part.strip(), kinds[name]) for part in parts)
        if len(set(values)) < len(values):
            raise ConfigError(f"sweep: {text!r} holds a value twice; name each once")
        found[name] = values
    return found


def products(grid: Mapping[str, Sequence[Value]]) -> list[Changes]:
    """Returns all combinations, the last setting varying fastest.

    Example:
      >>> products({"layers": (2, 4)})
      [(('layers', 2),), (('layers', 4),)]
    """
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def words(changes: Changes) -> str:
    """Returns changes as the end of a label, which also names a folder."""
    return "".join(
        f" {name}={value:g}" if isinstance(value, float) else f" {name}={value}".replace("/", "-")
        for name, value in changes
    )


def _value(name: str, text: str, kind: Any) -> Value:
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind  # one of several
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # `int | None`
        kind = typing.get_args(kind)[0]
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"sweep: {name}={text!r}; write true or false")
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"sweep: {name}={text!r} is not {what}; give one") from None
