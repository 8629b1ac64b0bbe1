"""One function on the device and on the CPU of the same process, compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Row = dict[str, Any]


def sides() -> dict[str, Any]:
    """The device and the CPU."""
    return {"device": jax.devices()[0], "cpu": jax.devices("cpu")[0]}


def compiled(function: Callable[..., Any], side: str) -> Callable[..., Any]:
    """Returns a function that runs on one side, on arrays of numpy, compiled for it."""
    where = sides()[side]
    # A new function object, so that no program of the other side is taken for it.
    program = jax.jit(lambda *xs: function(*xs))

    def run(*args: Any) -> Any:
        with jax.default_device(where):
            return jax.device_get(program(*jax.device_put(args, where)))

    return run


def bits(x: Any) -> Any:
    """An array's bits, so that -0, subnormals and NaN count."""
    x = np.ascontiguousarray(x)
    return x.view(np.uint8).reshape(*x.shape, -1) if x.size else x


def differ(a: Any, b: Any) -> int:
    """How many numbers of two trees have other bits; a NaN equals any NaN."""
    total = 0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        other = np.any(bits(x) != bits(y), axis=-1)
        if x.dtype.kind == "f" or x.dtype.name.startswith(("bfloat", "float")):
            other &= ~(np.isnan(x.astype(np.float32)) & np.isnan(y.astype(np.float32)))
        total += int(other.sum())
    return total


def distance(a: Any, b: Any) -> float:
    """The norm of the difference of two arrays over that of the second."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))


def on_cpu() -> bool:
    """Whether the device is itself a CPU, where both sides are one program."""
    return bool(sides()["device"].platform == "cpu")


def row(name: str, *, differ: int | None = None, error: float | None = None,
        bound: float = 0.0, exact: bool = True, why: str = "") -> Row:  # fmt: skip
    """One line of a result: what was compared and whether it holds.

    Args:
      name: what was compared.
      differ: numbers that have other bits than the CPU's; None where that was not compared.
      error: distance from what it should be; None where that was not compared.
      bound: of the error.
      exact: whether bits must agree on every device; on a CPU they must anyway.
      why: why the bound is what it is.
    """
    bad = bool(differ) and (exact or on_cpu())
    bad |= error is not None and not error <= bound
    if error is not None and not np.isfinite(error):
        name, error = f"{name}: {error}", None  # JSON has no such numbers
    found = {"name": name, "differ": differ, "error": error, "bound": bound, "why": why}
    return found | {"exact": exact, "ok": not bad}


def both(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Returns a function that gives what the device and what the CPU makes of its arguments."""
    device, cpu = compiled(function, "device"), compiled(function, "cpu")
    return lambda *args: (device(*args), cpu(*args))
