"""Plots of formats draw the numbers that they are given, and refuse what cannot be drawn."""

from __future__ import annotations

import io
from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from matplotlib.figure import Figure

from mpjax.errors import ConfigError
from mpjax.formats import Format, quantize, round_to
from mpjax.report.formats import (
    plot_distinct,
    plot_errors,
    plot_number_lines,
    plot_rounding,
    plot_sqnr,
    positive_numbers,
)

pytestmark = pytest.mark.usefixtures("fast_compile")

ORACLE = {
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e3m4": ml_dtypes.float8_e3m4,
}


@pytest.mark.parametrize("name", ORACLE)
def test_a_number_line_holds_all_numbers(name: str) -> None:
    all_patterns = np.arange(256, dtype=np.uint8).view(ORACLE[name]).astype(np.float64)
    wanted = np.unique(all_patterns[np.isfinite(all_patterns) & (all_patterns > 0)])
    np.testing.assert_array_equal(positive_numbers(Format(name)), wanted)


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "int4", "int8", "q4.4", "e5m6"])
def test_the_numbers_are_those_that_rounding_keeps(name: str) -> None:
    found = positive_numbers(Format(name))
    assert found[0] == Format(name).min_subnormal and found[-1] == Format(name).max
    assert (np.diff(found) > 0).all()
    numbers = jnp.asarray(found, jnp.float32)
    np.testing.assert_array_equal(round_to(numbers, name), numbers)
    between = (numbers[1:] + numbers[:-1]) / 2
    assert (round_to(between, name) != between).all(), "no number is left out"


@pytest.mark.parametrize(("name", "told"), [("float16", "12 bits"), ("e8m0", "scales")])
def test_what_no_line_can_show_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plot_number_lines([name])


def _draws() -> dict[str, Callable[[], Figure]]:
    x = jnp.linspace(0.0, 6.0, 20)
    matrix = jnp.ones((4, 8)).at[0, 0].set(3.0)
    exact, lossy = quantize(matrix, "int8"), quantize(matrix, "e2m1", "tensor")
    return {
        "lines": lambda: plot_number_lines(["e4m3", "int4"]),
        "rounding": lambda: plot_rounding(x, {"a": x, "b": jnp.stack([x, x])}, [1.0]),
        "errors": lambda: plot_errors(matrix, {"int8": exact, "e2m1": lossy, "again": exact}),
        "sqnr": lambda: plot_sqnr({"p": [("a", 2, 20.0), ("a", 2, 22.0), ("b", 4, 3.0)]}, "k", 2),
        "distinct": lambda: plot_distinct([("r", "x", 200, 256), ("r", "W", 900, None)]),
    }


@pytest.mark.parametrize("name", ["lines", "rounding", "errors", "sqnr", "distinct"])
def test_every_axis_has_a_label(name: str) -> None:
    figure = _draws()[name]()
    file = io.BytesIO()
    figure.savefig(file)  # a layout that fails would warn
    assert len(file.getvalue()) > 5_000
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert shown and any(ax.get_xlabel() for ax in shown)
    assert all(ax.get_xlabel() or ax.get_title() or ax.get_ylabel() for ax in shown)


def test_sqnr_curves_are_means_of_what_was_given() -> None:
    (ax,) = _draws()["sqnr"]().axes
    a, b = (line.get_xydata().tolist() for line in ax.get_lines())
    assert a == [[2.0, 21.0]] and b == [[4.0, 3.0]]


def test_the_errors_title_says_what_was_lost_and_stored() -> None:
    figure = _draws()["errors"]()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "|x|" and "0.0352 KiB" in titles[1]  # 32 numbers, one float32 scale
