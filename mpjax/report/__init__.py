"""What a comparison of runs shows: a table and plots."""

from mpjax.report.canvas import save_plot
from mpjax.report.comparison_table import markdown_table, rich_table, write_report
from mpjax.report.plots import plot_gradients, plot_loss, plot_loss_scale
from mpjax.report.results import Outcome, gap, gaps, interval

__all__ = [
    "Outcome",
    "gap",
    "gaps",
    "interval",
    "markdown_table",
    "plot_gradients",
    "plot_loss",
    "plot_loss_scale",
    "rich_table",
    "save_plot",
    "write_report",
]
