"""The picture of what formats lose: its rows, columns, signs, and that nothing overlaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpjax.errors import ConfigError
from mpjax.report.heatmap import KINDS, plot_heatmap


def record(kind: str, name: str, layer: int | None, under: float, over: float = 0.0) -> Any:
    return {
        "kind": kind, "name": name, "layer": layer, "underflow/e4m3": under,
        "overflow/e4m3": over, "underflow/fp16": under / 10, "overflow/fp16": 0.0,
    }  # fmt: skip


RECORDS = [
    record("gradients", "decoder/layers/mlp/up/kernel", 0, 0.5),
    record("gradients", "decoder/layers/mlp/up/kernel", 1, 1.0),
    record("weights", "decoder/embed/table", None, 0.0),
    record("activations", "decoder/layers/0/mlp/up:product", None, 0.0, 0.25),
    record("activations", "decoder/layers/1/mlp/up:product", None, 0.001),
    {"kind": "logit_max", "name": "attention", "layer": 0, "logit_max": 3.0},
]


def drawn(figure: Figure) -> Any:
    FigureCanvasAgg(figure).draw()
    return figure


def test_rows_are_tensors_and_columns_layers() -> None:
    figure = drawn(plot_heatmap(RECORDS, ["e4m3", "fp16"]))
    first, second, bar = figure.axes
    assert [first.get_title(), second.get_title()] == ["e4m3", "fp16"]
    names = [t.get_text() for t in first.get_yticklabels()]
    up = "decoder/layers/*/mlp/up"
    assert names == ["decoder/embed/table", f"{up}:product", f"{up}/kernel"]
    assert [t.get_text() for t in first.get_xticklabels()] == ["—", "0", "1"]
    grid = np.ma.filled(first.images[0].get_array(), np.nan)
    # headings lie between the kinds, in KINDS' order
    assert np.isnan(grid[0]).all() and np.isnan(grid[2]).all() and np.isnan(grid[4]).all()
    assert grid[1][0] == 0 and np.isnan(grid[1][1:]).all()
    assert grid[3][1] == pytest.approx(1 + np.log10(0.25) / 4)  # overflow is red
    assert grid[3][2] == pytest.approx(-0.25)  # underflow is blue: 0.1 %, a quarter of the way
    assert grid[5][2] == -1
    texts = [t.get_text() for t in first.texts]
    assert texts == [
        "weights", "activations", "weight gradients", "25", "50", "100",
    ]  # fmt: skip
    assert "become zero" in bar.get_xlabel()
    half = np.ma.filled(second.images[0].get_array(), np.nan)
    assert half[5][2] == pytest.approx(-0.75)  # 10 %


@pytest.mark.parametrize("layers", [2, 12, 24])
def test_nothing_overlaps(layers: int) -> None:
    records = [
        record(kind, f"decoder/layers/attention/part{i}/kernel", layer, 10.0**-i)
        for kind in KINDS
        for i in range(4)
        for layer in range(layers)
    ]
    figure = drawn(plot_heatmap(records, ["e4m3", "fp16"], title="step 10"))
    whole = figure.bbox
    boxes = []
    for ax in figure.axes:
        labels = [*ax.get_xticklabels(), *(ax.get_yticklabels() if ax is figure.axes[0] else ())]
        boxes += [t.get_window_extent() for t in (*labels, *ax.texts, ax.title) if t.get_text()]
    assert len(boxes) > 40
    for i, a in enumerate(boxes):
        assert whole.x0 <= a.x0 and a.x1 <= whole.x1 and whole.y0 <= a.y0 and a.y1 <= whole.y1
        for b in boxes[i + 1 :]:
            # as long as the letters do not touch, boxes may, by a pixel
            apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
            assert apart


def test_wrong_records_are_refused() -> None:
    with pytest.raises(ConfigError, match="no record of a tensor"):
        plot_heatmap(RECORDS[-1:])
    with pytest.raises(ConfigError, match="decoder/layers/mlp/up/kernel was not measured in e5m2"):
        plot_heatmap(RECORDS, ["e4m3", "e5m2"])
    many = [record("weights", "w", layer, 0.0) for layer in range(65)]
    with pytest.raises(ConfigError, match="65 layers do not fit"):
        plot_heatmap(many, ["e4m3"])
