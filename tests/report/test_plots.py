"""Plots of a comparison: what they draw, and what they leave out."""

from __future__ import annotations

import numpy as np
import pytest

from mpjax.report import Outcome, plot_loss, plot_loss_scale


def outcome(label: str, reference: str, losses: list[list[float]]) -> Outcome:
    records = tuple(
        [
            {"step": k + 1, "loss": loss, "loss_scale": 2.0**k, "skipped": 0}
            for k, loss in enumerate(run)
        ]
        for run in losses
    )
    return Outcome(label, reference, (1.0,), 1.0, 12.0, (0,), (1.0,), records)


def test_gaps_are_of_means_over_seeds_and_steps():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, (2, 3, 12))
    figure = plot_loss([outcome("a", "a", a.tolist()), outcome("b", "a", b.tolist())], window=4)
    top, bottom = figure.axes
    assert [line.get_label() for line in top.lines] == ["a", "b"]
    widths = [line.get_linewidth() for line in top.lines]
    assert widths[0] > widths[1]  # a later curve does not hide an equal one
    steps, gaps = bottom.lines[0].get_data()
    assert list(steps) == [k - 1.5 for k in range(4, 13)]  # the middle of steps k - 3 to k
    ends = range(4, 13)
    want = [100 * (b[:, k - 4 : k].mean() / a[:, k - 4 : k].mean() - 1) for k in ends]
    np.testing.assert_allclose(gaps, want, rtol=1e-9)


@pytest.mark.parametrize("lost", [(), (0, 1), (7, 8, 9), range(4, 20)], ids=str)
def test_a_straight_line_stays_where_it_is(lost):
    line = np.where(np.isin(np.arange(40), list(lost)), np.nan, 5.0 - 0.1 * np.arange(1, 41))
    figure = plot_loss(
        [outcome("a", "a", [line.tolist()]), outcome("b", "a", [(2 * line).tolist()])]
    )
    steps, means = figure.axes[0].lines[0].get_data()
    drawn = np.isfinite(means)
    np.testing.assert_allclose(means[drawn], 5.0 - 0.1 * steps[drawn], rtol=1e-12)
    assert drawn.sum() > 5
    gaps = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(gaps[np.isfinite(gaps)], 100.0, rtol=1e-9)


def test_steps_that_only_one_run_has_are_no_gap():
    a = np.linspace(5.0, 1.0, 40)
    b = np.where(np.arange(40) % 3 == 0, np.nan, a)
    figure = plot_loss([outcome("a", "a", [a.tolist()]), outcome("b", "a", [b.tolist()])])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 0.0, atol=1e-9)


def test_a_gap_ends_with_the_shorter_arm() -> None:
    arms = [outcome("a", "a", [[2.0] * 40]), outcome("b", "a", [[3.0] * 60])]
    for one, last in ((arms, 40), ([arms[1], arms[0]], 40)):
        upper, lower = plot_loss(one, window=1).axes
        assert {line.get_xdata()[-1] for line in upper.get_lines()} == {40, 60}
        steps, gap = lower.get_lines()[0].get_data()
        assert steps[-1] == last and set(gap) == {50.0}


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_run_shorter_than_the_window_has_gaps(steps: int):
    a, b = [[1.0] * steps], [[2.0] * steps]
    bottom = plot_loss([outcome("a", "a", a), outcome("b", "a", b)]).axes[1]
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), 100.0)
    assert len(bottom.lines[0].get_ydata()) == steps + 1 - max(1, steps // 2)


def test_without_a_comparison_there_is_no_panel_of_gaps():
    figure = plot_loss([outcome("a", "a", [[3.0, 2.0]])], unit="nats/image")
    (only,) = figure.axes
    assert "nats/image" in only.get_ylabel()
    assert only.get_xlabel() == "step"


@pytest.mark.parametrize("gap", [0.05, 4.0, 40.0, -3.0])
def test_the_axis_of_gaps_has_a_number_near_the_largest(gap: float):
    b = [[1 + gap / 100] * 4]
    figure = plot_loss([outcome("a", "a", [[1.0] * 4]), outcome("b", "a", b)])
    low, high = figure.axes[1].get_ylim()
    ticks = [t for t in figure.axes[1].get_yticks() if low <= t <= high]
    assert any(abs(t) >= abs(gap) / 2.5 for t in ticks if t * gap > 0), ticks


def test_the_path_of_a_loss_scale_has_an_axis_an_arm():
    arms = [outcome("a", "a", [[1.0] * 4, [1.0] * 4]), outcome("b", "a", [[1.0] * 4] * 2)]
    figure = plot_loss_scale(arms)
    assert [len(ax.lines) for ax in figure.axes] == [4, 4]  # path and skips of two seeds
