"""What runs and comparisons of runs show: tables, plots, and a page of all of it."""

from mpjax.report.canvas import save_plot
from mpjax.report.comparison_table import csv_table, latex_table, markdown_table, rich_table
from mpjax.report.formats import (
    plot_distinct,
    plot_errors,
    plot_number_lines,
    plot_rounding,
    plot_sqnr,
)
from mpjax.report.heatmap import plot_heatmap
from mpjax.report.html.page import html_report
from mpjax.report.plots import plot_gradients, plot_loss, plot_loss_scale, plot_sent
from mpjax.report.report import page_of_runs, write_report
from mpjax.report.results import Outcome, gap, gaps, interval
from mpjax.report.slices import length_slices, slice_cells, slice_gaps
from mpjax.report.tabular import csv_text, latex_text

__all__ = [
    "Outcome",
    "csv_table",
    "csv_text",
    "gap",
    "gaps",
    "html_report",
    "interval",
    "latex_table",
    "latex_text",
    "length_slices",
    "markdown_table",
    "page_of_runs",
    "plot_distinct",
    "plot_errors",
    "plot_gradients",
    "plot_heatmap",
    "plot_loss",
    "plot_loss_scale",
    "plot_sent",
    "plot_number_lines",
    "plot_rounding",
    "plot_sqnr",
    "rich_table",
    "save_plot",
    "slice_cells",
    "slice_gaps",
    "write_report",
]
