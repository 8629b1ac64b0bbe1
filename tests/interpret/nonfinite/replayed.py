"""Faults with what NumPy says of them: what each operation gives in float32 on the same operands.

A case is a kind of fault, in a dtype, in a place, alone or with a second fault. Each program breaks
first at one known operation; `Case.exact` is what NumPy makes of its operands in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

STEPS, BROKEN_STEP = 3, 1

DTYPES = {
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "float32": jnp.float32,
    "float8": jnp.float8_e4m3fn,  # stored so; computed in float16
}
# Two numbers whose product, and two whose sum, is too large for the dtype. In bfloat16 float32
# holds them: 181^2 / 2^14 and 255.5 / 128 are just below 2, and round to 2.
FACTORS = {
    "float16": (300.0, 300.0),
    "bfloat16": (181 / 128 * 2.0**63, 181 / 128 * 2.0**64),
    "float32": (1e20, 2e20),
    "float8": (288.0, 256.0),
}
TERMS = {
    "float16": (60000.0, 10000.0),
    "bfloat16": (255 / 128 * 2.0**127, 2.0**119),
    "float32": (3.4e38, 1e38),
    "float8": (448.0, 448.0),  # a sum of them is stored in float8 again
}
TOO_LARGE = {"float16": 1e5, "bfloat16": 3.4e38, "float8": 1000.0}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
      primitive: which operation breaks first.
      fn: makes it of two numbers.
      operands: of a dtype, by name.
      exact: the operation in NumPy, of float32 operands.
      gradient: whether it breaks in the gradient.
    """

    primitive: str
    fn: Callable[[Any, Any], Any]
    operands: Callable[[str], tuple[float, float]]
    exact: Callable[[Any, Any], Any]
    gradient: bool = False


def _f32(x: Any) -> Any:
    return x.astype(jnp.float32)


KINDS: dict[str, Kind] = {
    "operation": Kind("mul", lambda x, y: x * y, FACTORS.__getitem__, np.multiply),
    "carry": Kind("add", lambda x, y: x + y, TERMS.__getitem__, np.add),
    "inf - inf": Kind("sub", lambda x, y: x - y, lambda _: (np.inf, np.inf), np.subtract),
    "0 / 0": Kind("div", lambda x, y: x / y, lambda _: (0.0, 0.0), np.divide),
    "sqrt(-1)": Kind("sqrt", lambda x, _: jnp.sqrt(x), lambda _: (-1.0, 1.0),
                     lambda x, _: np.sqrt(x)),
    "log(0)": Kind("log", lambda x, _: jnp.log(x), lambda _: (0.0, 1.0), lambda x, _: np.log(x)),
    "cast": Kind("convert_element_type", lambda x, y: x, lambda d: (TOO_LARGE[d], 1.0),
                 lambda x, _: x),
    "gradient": Kind("convert_element_type", lambda x, y: x, lambda d: (1.0, TOO_LARGE[d]),
                     lambda _, y: y, gradient=True),
}  # fmt: skip
SECONDS = ("alone", "beside another", "followed by another", "joined by another")
PLACES = ("flat", "scan", "jit", "custom_vjp")


@dataclasses.dataclass(frozen=True)
class Case:
    """A program that breaks, and what must be said of it."""

    kind: str
    dtype: str
    second: str
    place: str

    @property
    def name(self) -> str:
        return "-".join(dataclasses.astuple(self)).replace(" ", "")

    @property
    def computed(self) -> Any:
        """The dtype in which it computes."""
        return jnp.float16 if self.dtype == "float8" else DTYPES[self.dtype]

    @property
    def primitive(self) -> str:
        # a sum of float8 numbers breaks where it is stored
        stored = self.dtype == "float8" and self.kind == "carry"
        return "convert_element_type" if stored else KINDS[self.kind].primitive

    def arguments(self) -> tuple[Any, Any]:
        """The operands, in each step of a loop; healthy ones but in the broken step."""
        kind = KINDS[self.kind]
        pair = np.asarray(kind.operands(self.dtype), np.float32)
        both = np.ones((2, STEPS), np.float32)
        both[:, BROKEN_STEP] = pair
        if self.kind == "carry":  # what is carried is near the end from the beginning
            both[0], both[1] = pair[0], 0
            both[1, BROKEN_STEP] = pair[1]
        if self.kind in ("cast", "gradient"):
            return jnp.asarray(both[0]), jnp.asarray(both[1])
        return tuple(jnp.asarray(row).astype(DTYPES[self.dtype]) for row in both)  # type: ignore[return-value]

    def exact(self) -> float:
        """What the operation gives in float32 on its operands, by NumPy."""
        kind = KINDS[self.kind]
        x, y = (np.asarray(row[BROKEN_STEP].astype(jnp.float32)) for row in self.arguments())
        with np.errstate(all="ignore"):
            return float(kind.exact(x, y))

    def _operation(self, x: Any, y: Any) -> Any:
        """The operation, its result stored where the kind or the dtype asks for it; in float32."""
        kind, stored = KINDS[self.kind], DTYPES[self.dtype]
        if self.kind == "cast":
            return _f32(x.astype(stored))
        if self.kind == "gradient":
            low = x.astype(stored)
            return _f32(low) * y  # the cotangent y is cast to the dtype of `low`
        out = kind.fn(x.astype(self.computed), y.astype(self.computed))
        return out.astype(stored) if self.dtype == "float8" and self.kind == "carry" else out

    def _placed(self, x: Any, y: Any) -> Any:
        if self.place == "scan":
            if self.kind == "carry":
                step = lambda c, y: (self._operation(c, y), None)  # noqa: E731
                return lax.scan(step, x[0], y)[0]
            return lax.scan(lambda c, xy: (c, self._operation(*xy)), 0.0, (x, y))[1][BROKEN_STEP]
        x, y = x[BROKEN_STEP], y[BROKEN_STEP]
        if self.place == "jit":
            return jax.jit(self._operation)(x, y)
        if self.place == "custom_vjp":
            rule = jax.custom_vjp(self._operation)
            rule.defvjp(
                lambda x, y: jax.vjp(self._operation, x, y),
                lambda pull, ct: pull(ct),
            )
            return rule(x, y)
        return self._operation(x, y)

    def program(self, x: Any, y: Any) -> Any:
        """What is traced."""
        zero = _f32(x[0]) * 0
        if KINDS[self.kind].gradient:
            first = _f32(jax.grad(lambda x: jnp.sum(self._placed(x, y)))(x)[BROKEN_STEP])
        else:
            first = self._placed(x, y)
        if self.second == "beside another":
            return first, jnp.log(zero)
        if self.second == "joined by another":
            return _f32(first) + jnp.log(zero)
        if self.second == "followed by another":
            return jnp.sqrt(-1 - jnp.abs(_f32(first)))
        return first


def cases() -> Iterator[Case]:
    """Every second one, as on a chessboard: so that each kind stands in each place and company."""
    parts = (KINDS, DTYPES, SECONDS, PLACES)
    for kind, dtype, second, place in itertools.product(*parts):
        if dtype == "float32" and kind in ("cast", "gradient"):
            continue  # there is no cast of float32 to itself
        if kind == "inf - inf" and dtype == "float8":
            continue  # e4m3 has no infinity
        names = (kind, dtype, second, place)
        if sum(list(part).index(name) for part, name in zip(parts, names, strict=True)) % 2 == 0:
            yield Case(*names)


def misses(case: Case, report: Any) -> list[str]:
    """What of a report is wrong."""
    if report is None:
        return ["nothing reported"]
    exact = case.exact()
    same = report.exact is not None and np.allclose(report.exact, exact, rtol=1e-6, equal_nan=True)
    wrong = [] if same else [f"{report.exact} in float32, not {exact}"]
    if report.primitive != case.primitive:
        wrong.append(f"{report.primitive}, not {case.primitive}")
    layer = BROKEN_STEP if case.place == "scan" else None
    if report.layer != layer:
        wrong.append(f"iteration {report.layer}, not {layer}")
    if report.cure.startswith("none") == bool(np.isfinite(exact)):
        wrong.append(f"cure {report.cure!r} of {exact}")
    return wrong
