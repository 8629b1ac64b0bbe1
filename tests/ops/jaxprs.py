"""What a traced function does: its equations, those of inner functions included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def _inner(value: Any) -> Iterator[Any]:
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from _inner(value.jaxpr)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _inner(part)


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in _inner(value):
                yield from _walk(inner)


def equations(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """All equations of fn's jaxpr and of the jaxprs inside it."""
    return list(_walk(jax.make_jaxpr(fn)(*args).jaxpr))


def dtypes(name: str, fn: Callable[..., Any], *args: Any) -> set[str]:
    """Result dtypes of every equation of one primitive; it must occur."""
    found = {
        np.dtype(e.outvars[0].aval.dtype).name
        for e in equations(fn, *args)
        if e.primitive.name == name
    }
    assert found, f"no {name} in the jaxpr"
    return found


def sizes(fn: Callable[..., Any], *args: Any) -> set[int]:
    """Number of elements of every array that fn makes."""
    return {
        int(np.prod(v.aval.shape))
        for e in equations(fn, *args)
        for v in e.outvars
        if hasattr(v.aval, "shape")
    }
