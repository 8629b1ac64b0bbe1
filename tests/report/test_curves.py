"""Curves: means over a fixed window, bands that hold every seed, pairs of seeds and of steps."""

from __future__ import annotations

import numpy as np
import pytest

from mpjax.report import Outcome, plot_loss
from mpjax.report.curves import fitting, gap_curve, loss_curve, scale_path


def made(label: str, losses: list[np.ndarray], every: int = 1) -> Outcome:
    runs = [
        [{"step": every * n, "loss": float(loss)} for n, loss in enumerate(seed, 1)]
        for seed in losses
    ]
    return Outcome.from_records(label, runs, reference="a")


@pytest.mark.parametrize("every", [1, 10])
def test_a_straight_line_stays_straight_at_its_own_steps(every):
    line = 5.0 - 0.1 * np.arange(1, 41)
    curve = loss_curve(made("a", [line, 2 * line], every), 7)
    np.testing.assert_allclose(curve.mean, 1.5 * (5.0 - 0.1 * curve.steps / every), rtol=1e-12)
    np.testing.assert_allclose(curve.low, curve.mean / 1.5, rtol=1e-12)
    np.testing.assert_allclose(curve.high, curve.mean * 2 / 1.5, rtol=1e-12)
    assert len(curve.steps) == 34


def test_a_growing_window_would_bend_it():
    """What the fixed window is for: means over fewer records at an end leave the line."""
    line = 5.0 - 0.1 * np.arange(1, 41)
    grown = [line[max(0, n - 7) : n].mean() for n in range(1, 41)]
    assert np.abs(np.diff(grown, 2)).max() > 0.04
    curve = loss_curve(made("a", [line]), 7)
    assert np.abs(np.diff(curve.mean, 2)).max() < 1e-12


def test_bands_hold_all_seeds_and_gaps_are_of_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, (3, 30)), rng.uniform(1, 2, (2, 24))
    a[1, 4] = np.nan  # a step that one seed lost counts for none
    own, other = made("b", list(b)), made("a", list(a))
    curve = gap_curve(own, other, 5)
    fine = np.isfinite(a[:2, :24]).all(0)
    means = [
        [row[n - 5 : n][fine[n - 5 : n]].mean() for n in range(5, 25)]
        for row in (*b, *a[:2, :24])
    ]  # fmt: skip
    each = 100 * (np.array(means[:2]) / np.array(means[2:]) - 1)
    np.testing.assert_allclose(curve.low, each.min(0), rtol=1e-9)
    np.testing.assert_allclose(curve.high, each.max(0), rtol=1e-9)
    assert (curve.low <= curve.mean).all() and (curve.mean <= curve.high).all()
    assert curve.seeds == 2  # the reference's third seed has no pair
    all_seeds = 100 * (np.mean(means[:2], 0) / np.nanmean(a[:, :24], 0)[4:] - 1)
    assert not np.allclose(curve.mean, all_seeds)


def test_runs_of_other_lengths_are_drawn_and_have_bands():
    arms = [made("a", [np.ones(40), 2 * np.ones(40)]), made("b", [np.ones(25), np.ones(30)])]
    top, bottom = plot_loss(arms).axes
    assert len(top.collections) == 2 and len(bottom.collections) == 1
    band = top.collections[0].get_datalim(top.transData)
    assert (band.y0, band.y1) == (1.0, 2.0)
    assert not plot_loss([made("a", [np.ones(9)])]).axes[0].collections  # one seed has no band


def test_a_thinned_curve_leaves_no_record_out():
    outcome = made("a", [np.arange(1000.0)])
    assert fitting([outcome], 20) == 20
    curve = loss_curve(outcome, 100).thinned(100)
    assert len(curve.steps) == 10 and curve.mean.mean() == np.arange(1000.0).mean()
    assert curve.steps[-1] == loss_curve(outcome, 100).steps[-1]


def test_the_path_of_a_scale_holds_every_change():
    scales = [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0]
    skips = [0, 0, 1, 1, 1, 1, 1]
    run = [
        {"step": n, "loss_scale": scale, "skipped": skipped}
        for n, (scale, skipped) in enumerate(zip(scales, skips, strict=True), 1)
    ]
    want = [(1, 8.0, False), (3, 4.0, True), (6, 8.0, False), (7, 8.0, False)]
    assert scale_path(run) == want
