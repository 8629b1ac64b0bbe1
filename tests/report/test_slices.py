"""Slices: an average that hides a loss, and intervals that hold."""

import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.report.slices import length_slices, slice_cells, slice_gaps


def test_a_slice_that_is_hurt_is_seen_where_the_average_hides_it():
    draw = np.random.default_rng(0)
    reference = draw.random((3, 1000)) < 0.9
    arm = reference.copy()
    arm[:, 950:] &= draw.random((3, 50)) < 0.7
    slices = ["common"] * 950 + ["rare"] * 50
    found = {gap.name: gap for gap in slice_gaps(arm, reference, slices)}
    assert list(found) == ["all", "common", "rare"]
    assert found["rare"].hurt and found["rare"].gap < -0.15 and found["rare"].count == 50
    assert not found["common"].hurt and found["common"].gap == 0
    assert abs(found["all"].gap) < 0.03
    cells = slice_cells(found.values())
    assert cells[2][4].endswith("*") and not cells[1][4].endswith("*")


def test_the_interval_covers_as_often_as_it_says():
    draw, inside = np.random.default_rng(1), 0
    for _ in range(300):
        both = draw.random((2, 1, 80)) < 0.8
        (found, _) = slice_gaps(*both, ["a"] * 80)
        inside += abs(found.gap) <= found.half
    assert 0.90 < inside / 300 < 0.99


def test_lengths_are_cut_into_even_parts():
    slices = length_slices(range(1, 101))
    assert sorted({(s, slices.count(s)) for s in slices}) == [
        ("1-25 tokens", 25), ("26-50 tokens", 25), ("51-75 tokens", 25), ("76-100 tokens", 25)
    ]  # fmt: skip
    assert set(length_slices([7] * 9)) == {"7-7 tokens"}


def test_outcomes_that_do_not_pair_are_one_line():
    with pytest.raises(ConfigError, match=r"\(1, 3\) and \(2, 3\) outcomes of 3 examples"):
        slice_gaps([True] * 3, [[True] * 3] * 2, list("abc"))
