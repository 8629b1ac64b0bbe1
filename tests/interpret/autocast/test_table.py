"""Each function of JAX under autocast: the dtype of PyTorch's reference, the bits of hand casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.interpret.autocast.autocast import autocast
from tests.interpret.autocast import autocast_table as table
from tests.interpret.autocast.autocast_table import FIRST, FOLLOWS, FULL, LOW, OPERANDS, ROWS, Row

pytestmark = pytest.mark.usefixtures("unoptimized")

# What the operands are: autocast's own low values, float32 ones, one of each, or arguments that
# were low before autocast saw them.
PATTERNS = ("low", "float32", "mixed", "arguments")


# XLA on CPUs otherwise leaves out a cast to bfloat16 and back, and nothing could fail here.
_EXACT = {"xla_allow_excess_precision": False}


def _operand(letter: str, number: int, low: Any) -> jax.Array:
    """An operand whose values a low dtype holds exactly."""
    rng = np.random.default_rng([ord(letter), number])
    shape = OPERANDS[letter]
    if letter == "i":
        return jnp.asarray(rng.integers(0, 4, shape), jnp.int32)
    if letter == "m":
        return jnp.asarray(rng.random(shape) < 0.5)
    if letter == "p":
        x = rng.standard_normal(shape)
        return jnp.asarray(x @ x.T + 4 * np.eye(4), low).astype(jnp.float32)
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
    return table.DEVIATES[row.name].kind if row.name in table.DEVIATES else row.kind


def _wanted(row: Row, pattern: str, low: Any) -> Any:
    """The dtype of the result."""
    first = low if _which(row, pattern)[0] else jnp.float32
    followed = low if pattern in ("low", "arguments") else jnp.float32
    return {LOW: low, FULL: jnp.float32, FIRST: first}.get(_kind(row), followed)


def _cast(row: Row, pattern: str, low: Any, operands: list[jax.Array], lists: str = "cuda") -> Any:
    """The function as autocast runs it."""
    are_low = _which(row, pattern)
    if pattern == "arguments":
        operands = [x.astype(low) if mine else x for x, mine in zip(operands, are_low, strict=True)]

    def fn(*xs: Any) -> Any:
        if pattern in ("low", "mixed"):
            xs = tuple(_made_low(x) if mine else x for x, mine in zip(xs, are_low, strict=True))
        return row.fn(*xs)

    return autocast(fn, low, lists=lists, restore_dtypes=False)(*operands)


def _by_hand(row: Row, pattern: str, low: Any, operands: list[jax.Array]) -> Any:
    """The same function with hand-written casts."""
    wanted = _wanted(row, pattern, low)
    deviation = table.DEVIATES.get(row.name)
    if deviation is not None and deviation.by_hand is not None:
        are_low = _which(row, pattern)
        mine = [x.astype(low) if yes else x for x, yes in zip(operands, are_low, strict=True)]
        return deviation.by_hand(*mine, low)
    inside = jnp.float32 if row.name in table.FLOAT32_INSIDE else wanted
    if deviation is not None and not deviation.same_bits:
        inside = jnp.float32
    return row.fn(*[x.astype(inside) if _is_float(x) else x for x in operands]).astype(wanted)


def rows_of(pattern: str) -> list[Row]:
    """The rows that a pattern makes sense for."""
    several = [row for row in ROWS if sum(letter not in "im" for letter in row.takes) > 1]
    # JAX's sums and norms cast low arguments up and their results back, and those casts stand
    apart = (*table.DEVIATES, *table.FLOAT32_INSIDE)
    plain = [row for row in ROWS if row.kind != FULL and row.name not in apart]
    return {"mixed": several, "arguments": plain}.get(pattern, ROWS)


@jax.numpy_dtype_promotion("standard")  # dot_product_attention on low arguments needs it
def compare(rows: Sequence[Row], pattern: str, low: Any) -> dict[str, tuple[Any, Any]]:
    """Results of autocast and of hand-written casts; one program, which compiles sooner."""
    operands = [[_operand(x, n, low) for n, x in enumerate(row.takes)] for row in rows]

    def both(operands: list[list[jax.Array]]) -> dict[str, tuple[Any, Any]]:
        return {
            row.name: (_cast(row, pattern, low, mine), _by_hand(row, pattern, low, mine))
            for row, mine in zip(rows, operands, strict=True)
        }

    return jax.jit(both, compiler_options=_EXACT)(operands)


def is_same(row: Row, pattern: str, low: Any, got: Any, by_hand: Any) -> bool:
    """Whether dtype and bits are as they have to be."""
    if got.dtype != _wanted(row, pattern, low) or got.shape != by_hand.shape:
        return False
    comparable = row.name not in table.DEVIATES or table.DEVIATES[row.name].same_bits
    return not comparable or np.asarray(got).tobytes() == np.asarray(by_hand).tobytes()


@pytest.mark.parametrize(
    ("pattern", "row"),
    [pytest.param(p, row, id=f"{p}-{row.name}") for p in PATTERNS for row in rows_of(p)],
)
def test_function_runs_in_the_dtype_of_the_reference(pattern, row):
    low = jnp.dtype(jnp.bfloat16)
    operands = [_operand(letter, n, low) for n, letter in enumerate(row.takes)]
    with jax.numpy_dtype_promotion("standard" if pattern == "arguments" else "strict"):
        got = jax.eval_shape(lambda *xs: _cast(row, pattern, low, list(xs)), *operands)
    assert got.dtype == _wanted(row, pattern, low), (row.torch, row.kind)


@pytest.mark.parametrize(
    ("low", "pattern", "every"),
    [("bfloat16", "low", 5), ("bfloat16", "mixed", 6), ("float16", "low", 20)],
)
def test_function_gives_the_bits_of_hand_casts(low, pattern, every):
    """A part of the rows: benchmarks/tools/autocast_table.py compares all of them."""
    rows, low = rows_of(pattern)[::every], jnp.dtype(low)
    found = compare(rows, pattern, low)
    wrong = [row.name for row in rows if not is_same(row, pattern, low, *found[row.name])]
    assert not wrong


def test_bits_of_hand_casts_tell_a_wrong_cast():
    """The comparison fails where a product or an exp runs in another dtype than its list's."""
    moved = {"x @ y": FULL, "jnp.exp": FOLLOWS, "jnp.tanh": FULL}
    rows = [row._replace(kind=moved[row.name]) for row in ROWS if row.name in moved]
    low = jnp.dtype(jnp.bfloat16)
    found = compare(rows, "low", low)
    assert not any(is_same(row, "low", low, *found[row.name]) for row in rows)


def test_the_table_is_what_it_claims():
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) >= 120
    assert set(table.DEVIATES) | set(table.FLOAT32_INSIDE) <= set(names)
    assert len(table.DEVIATES) < 0.15 * len(names)
    for row in ROWS:  # a deviation deviates, in its dtype or in its bits
        deviation = table.DEVIATES.get(row.name)
        if deviation is not None and deviation.kind == row.kind:
            assert deviation.by_hand is not None or not deviation.same_bits


@pytest.mark.parametrize("name", table.CPU)
def test_function_runs_in_the_dtype_of_the_cpu_reference(name):
    row = next(row for row in ROWS if row.name == name)
    operands = [_operand(letter, n, jnp.bfloat16) for n, letter in enumerate(row.takes)]
    got = jax.eval_shape(lambda *xs: _cast(row, "low", jnp.bfloat16, list(xs), "cpu"), *operands)
    assert got.dtype == (jnp.float32 if table.CPU[name] == FULL else jnp.bfloat16)


def test_cpu_sums_keep_the_digits_inside():
    """The dtype of a sum follows its operand; what it adds up is float32."""
    row = next(row for row in ROWS if row.name == "jnp.sum")
    x = _operand("u", 0, jnp.bfloat16)
    got = _cast(row, "low", jnp.bfloat16, [x], "cpu")
    np.testing.assert_array_equal(got, jnp.sum(x).astype(jnp.bfloat16), strict=True)


LOW_ARGUMENTS = ("exp", "expm1", "log", "log1p", "sinh", "cosh", "tan", "arccos", "reciprocal")


@pytest.mark.parametrize("name", LOW_ARGUMENTS)
def test_low_arguments_of_listed_operations_are_widened(name):
    fn, x = getattr(jnp, name), _operand("u", 0, jnp.bfloat16)
    got = autocast(fn, "bf16", restore_dtypes=False)(x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(got, fn(x), strict=True)


@pytest.mark.parametrize("fn", [jnp.sum, jnp.mean, jnp.var, jnp.prod, jnp.linalg.norm])
def test_casts_of_jax_itself_stand(fn):
    """Of a low argument, JAX sums in float32 and casts back: a cast in the jaxpr like any other."""
    x = _operand("u", 0, jnp.bfloat16).astype(jnp.bfloat16)
    got = autocast(fn, "bf16", restore_dtypes=False)(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, fn(x), strict=True)
