"""What a run reports: metrics, progress, tensors, its manifest, and requests to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpjax.lazy import lazy_names

if TYPE_CHECKING:
    from mpjax.train.report.environment import require_same_environment
    from mpjax.train.report.interrupt import Interrupt
    from mpjax.train.report.manifest import (
        MANIFEST,
        how_products_run,
        read_manifest,
        versions,
        write_manifest,
    )
    from mpjax.train.report.memory import bytes_per_parameter, formula, state_bytes
    from mpjax.train.report.metrics_writer import (
        METRICS,
        MetricsWriter,
        begin_wandb,
        import_wandb,
        read_metrics,
        to_line,
    )
    from mpjax.train.report.progress import ProgressBar
    from mpjax.train.report.tensor_monitor import TensorWriter, watched
    from mpjax.train.report.terminal import steady_terminal

# Imported at first use: a train step needs neither orbax nor progress bars nor writers.
_LAZY = {
    "require_same_environment": "environment",
    "Interrupt": "interrupt",
    "MANIFEST": "manifest",
    "how_products_run": "manifest",
    "read_manifest": "manifest",
    "versions": "manifest",
    "write_manifest": "manifest",
    "bytes_per_parameter": "memory",
    "formula": "memory",
    "state_bytes": "memory",
    "METRICS": "metrics_writer",
    "MetricsWriter": "metrics_writer",
    "begin_wandb": "metrics_writer",
    "import_wandb": "metrics_writer",
    "read_metrics": "metrics_writer",
    "to_line": "metrics_writer",
    "ProgressBar": "progress",
    "TensorWriter": "tensor_monitor",
    "watched": "tensor_monitor",
    "steady_terminal": "terminal",
}

__all__ = [
    "Interrupt",
    "MANIFEST",
    "METRICS",
    "MetricsWriter",
    "ProgressBar",
    "TensorWriter",
    "begin_wandb",
    "bytes_per_parameter",
    "formula",
    "how_products_run",
    "import_wandb",
    "read_manifest",
    "read_metrics",
    "require_same_environment",
    "state_bytes",
    "steady_terminal",
    "to_line",
    "versions",
    "watched",
    "write_manifest",
]


def __getattr__(name: str) -> object:
    return lazy_names(__name__, _LAZY)(name)
