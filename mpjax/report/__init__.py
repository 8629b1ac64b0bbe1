"""What a comparison of runs shows: a table and plots."""

from mpjax.report.canvas import save_plot
from mpjax.report.comparison_table import markdown_table, rich_table, write_report
from mpjax.report.formats import (
    plot_distinct,
    plot_errors,
    plot_number_lines,
    plot_rounding,
    plot_sqnr,
)
from mpjax.report.heatmap import plot_heatmap
from mpjax.report.plots import plot_gradients, plot_loss, plot_loss_scale
from mpjax.report.results import Outcome, gap, gaps, interval
from mpjax.report.slices import length_slices, slice_cells, slice_gaps

__all__ = [
    "Outcome",
    "gap",
    "gaps",
    "interval",
    "length_slices",
    "markdown_table",
    "plot_distinct",
    "plot_errors",
    "plot_gradients",
    "plot_heatmap",
    "plot_loss",
    "plot_loss_scale",
    "plot_number_lines",
    "plot_rounding",
    "plot_sqnr",
    "rich_table",
    "save_plot",
    "slice_cells",
    "slice_gaps",
    "write_report",
]
