"""Each function of JAX under autocast: the dtype of PyTorch's reference, the bits of hand casts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.interpret.autocast import autocast
from tests.interpret.autocast_table import (
    DEVIATES,
    FOLLOWS,
    FULL,
    INSIDE,
    LOW,
    OPERANDS,
    ROWS,
    WIDEST,
    Row,
)

pytestmark = pytest.mark.usefixtures("fast_compile")

# What the operands are: autocast's own low values, float32 ones, one of each, or arguments that
# were low before autocast saw them.
PATTERNS = ("low", "float32", "mixed", "arguments")


def _operand(letter: str, number: int, low: Any) -> jax.Array:
    """An operand whose values a low dtype holds exactly."""
    rng = np.random.default_rng([ord(letter), number])
    shape = OPERANDS[letter]
    if letter == "i":
        return jnp.asarray(rng.integers(0, 4, shape), jnp.int32)
    if letter == "m":
        return jnp.asarray(rng.random(shape) < 0.5)
    span = {"u": (0.05, 0.95), "b": (1.1, 3.0)}.get(letter)
    x = rng.uniform(*span, shape) if span else rng.standard_normal(shape)
    return jnp.asarray(x, low).astype(jnp.float32)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _made_low(x: jax.Array) -> jax.Array:
    """The same values, as a product that autocast runs low leaves them."""
    return x @ jnp.eye(x.shape[-1], dtype=x.dtype)


def _which(row: Row, pattern: str) -> list[bool]:
    """Which operands are low."""
    floats = [letter not in "im" for letter in row.takes]
    first = floats.index(True)
    return [f and pattern != "float32" and (pattern != "mixed" or i == first)
            for i, f in enumerate(floats)]  # fmt: skip


def _kind(row: Row) -> str:
    return DEVIATES[row.name][0] if row.name in DEVIATES else row.kind


def _wanted(row: Row, pattern: str, low: Any) -> Any:
    """The dtype of the result."""
    followed = low if pattern in ("low", "arguments") else jnp.float32
    return {LOW: low, FULL: jnp.float32}.get(_kind(row), followed)


def _cast(row: Row, pattern: str, low: Any, operands: list[jax.Array]) -> Any:
    """The function as autocast runs it."""
    are_low = _which(row, pattern)
    if pattern == "arguments":
        operands = [x.astype(low) if mine else x for x, mine in zip(operands, are_low, strict=True)]

    def fn(*xs: Any) -> Any:
        if pattern in ("low", "mixed"):
            xs = tuple(_made_low(x) if mine else x for x, mine in zip(xs, are_low, strict=True))
        return row.fn(*xs)

    return autocast(fn, low, restore_dtypes=False)(*operands)


def _by_hand(row: Row, pattern: str, low: Any, operands: list[jax.Array]) -> Any:
    """The same function with hand-written casts."""
    wanted = _wanted(row, pattern, low)
    inside = jnp.float32 if _kind(row) == INSIDE else wanted
    return row.fn(*[x.astype(inside) if _is_float(x) else x for x in operands]).astype(wanted)


def _rows(pattern: str) -> list[Row]:
    return [row for row in ROWS
            if pattern != "mixed" or sum(letter not in "im" for letter in row.takes) > 1]  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[Any, Any]:
    """Every row's two results; one program for all of them, or compiling would take minutes."""
    found: dict[Any, Any] = {}

    def both(operands: dict[str, list[jax.Array]], pattern: str, low: Any) -> Any:
        return {
            row.name: (
                _cast(row, pattern, low, operands[row.name]),
                _by_hand(row, pattern, low, operands[row.name]),
            )
            for row in _rows(pattern)
        }

    for low in (jnp.bfloat16, jnp.float16):
        operands = {
            row.name: [_operand(letter, n, low) for n, letter in enumerate(row.takes)]
            for row in ROWS
        }
        for pattern in PATTERNS if low == jnp.bfloat16 else PATTERNS[:1]:
            run = jax.jit(both, static_argnums=(1, 2))
            for name, pair in run(operands, pattern, low).items():
                found[jnp.dtype(low).name, pattern, name] = pair
    return found


CASES = [("bfloat16", pattern, row) for pattern in PATTERNS for row in _rows(pattern)]
CASES += [("float16", "low", row) for row in ROWS]


@pytest.mark.parametrize(
    ("low", "pattern", "row"), [pytest.param(*c, id=f"{c[0]}-{c[1]}-{c[2].name}") for c in CASES]
)
def test_function_runs_in_the_dtype_of_the_reference(results, low, pattern, row):
    got, by_hand = results[low, pattern, row.name]
    assert got.dtype == _wanted(row, pattern, jnp.dtype(low)), (row.torch, row.kind)
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(by_hand, np.float32), strict=True
    )
