"""A cure is tried on the value that broke: NumPy says what float32 makes of its operands."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpjax.interpret.nonfinite import nonfinite
from mpjax.interpret.nonfinite.nonfinite import trace_nonfinite
from tests.interpret.nonfinite.replayed import Case, misses

pytestmark = pytest.mark.usefixtures("fast_compile")

# One for each kind, dtype, company and place; all pairs of them are evidence.
CASES = (
    Case("operation", "float16", "beside another", "scan"),
    Case("operation", "bfloat16", "followed by another", "jit"),
    Case("operation", "float8", "alone", "flat"),
    Case("operation", "float32", "joined by another", "flat"),
    Case("carry", "float16", "joined by another", "scan"),
    Case("cast", "float8", "joined by another", "custom_vjp"),
    Case("gradient", "bfloat16", "beside another", "custom_vjp"),
    Case("inf - inf", "float16", "alone", "custom_vjp"),
    Case("0 / 0", "bfloat16", "beside another", "flat"),
    Case("log(0)", "float8", "joined by another", "jit"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_value_in_float32_is_that_of_numpy(case: Case) -> None:
    assert misses(case, trace_nonfinite(case.program, *case.arguments())) == []


def test_300_squared_is_finite_in_float32_though_its_output_is_not() -> None:
    report = trace_nonfinite(lambda x: x * x, jnp.float16(300))
    assert (report.kind, report.exact) == ("inf", 90000.0)
    assert report.cure.endswith("in float32: float16 cannot hold 90000")
    assert "value  90000 in float32" in str(report)


def test_what_breaks_next_is_named() -> None:
    def fn(x: Any) -> Any:
        with jax.named_scope("square"):
            y = (x * x).astype(jnp.float32)
        return jnp.sqrt(1 - y)

    report = trace_nonfinite(fn, jnp.float16(300))
    assert (report.primitive, report.exact) == ("mul", 90000.0)
    assert report.cure.startswith("square in float32; then sqrt breaks at ")
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.sqrt(np.float32(1) - np.float32(300) ** 2))


def test_two_faults_of_one_operation_are_told_apart_by_iteration() -> None:
    """exp(16) is too large for float16, exp(400) for float32 as well."""
    xs = jnp.asarray([1, 16, 400], jnp.float16)
    report = trace_nonfinite(lambda xs: lax.scan(lambda c, x: (c, jnp.exp(x)), 0.0, xs)[1], xs)
    assert (report.primitive, report.layer) == ("exp", 1)
    np.testing.assert_allclose(report.exact, np.exp(np.float32(16)), rtol=1e-6)
    assert not report.cure.startswith("none")
    second = trace_nonfinite(lambda xs: lax.scan(lambda c, x: (c, jnp.exp(x)), 0.0, xs)[1], xs[::2])
    assert (second.layer, second.exact, second.cure) == (1, np.inf, nonfinite.NONE)


def test_a_later_fault_that_has_a_cure_lends_it_to_no_other() -> None:
    def fn(x: Any, y: Any) -> Any:
        first = jnp.log(x)
        with jax.named_scope("square"):
            return first, (y * y).astype(jnp.float32)

    report = trace_nonfinite(fn, jnp.float32(0), jnp.float16(300))
    assert (report.primitive, report.exact) == ("log", -np.inf)
    assert report.cure == nonfinite.NONE


def test_the_fault_is_logged_before_its_cure_is_looked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def find_cure(*_: Any) -> str:
        said.extend(caplog.messages)
        return "a cure"

    monkeypatch.setattr(nonfinite, "find_cure", find_cure)
    with caplog.at_level(logging.WARNING, logger="mpjax.interpret"):
        assert trace_nonfinite(jnp.log, jnp.zeros(2)).cure == "a cure"
        assert len(said) == 1
        assert "first inf: log" in said[0] and "log of 0" in said[0]
        caplog.clear()
        report = trace_nonfinite(jnp.log, jnp.zeros(2), cure=False)
    assert (report.primitive, report.cure, caplog.messages) == ("log", "", [])
    assert "cure" not in str(report)


def test_branches_of_other_platforms_are_not_run() -> None:
    def fn(x: Any) -> Any:
        return lax.platform_dependent(
            x, cuda=lambda x: jnp.log(x - 2), cpu=lambda x: jnp.sqrt(x), default=lambda x: x
        )

    assert trace_nonfinite(fn, jnp.ones(2)) is None
    report = trace_nonfinite(fn, -jnp.ones(2), cure=False)
    assert (report.primitive, report.kind) == ("sqrt", "nan")
