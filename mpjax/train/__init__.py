"""How a model is trained: state, step, sharding, loop, checkpoints, reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpjax.lazy import lazy_names
from mpjax.train.build import build, build_abstract
from mpjax.train.diloco import DiLoCo
from mpjax.train.schedule.switch import SwitchingStep
from mpjax.train.sharding import ShardActivations, parse_mesh, partition, state_shardings
from mpjax.train.step import (
    TrainState,
    TrainStep,
    check_batch,
    init_state,
    make_train_step,
    with_weights,
)

if TYPE_CHECKING:
    from mpjax.train.checkpoint.checkpointer import Checkpointer
    from mpjax.train.checkpoint.reader import CheckpointReader
    from mpjax.train.checkpoint.restore import restore_into
    from mpjax.train.loop import fit
    from mpjax.train.report.environment import environment
    from mpjax.train.report.interrupt import Interrupt
    from mpjax.train.report.manifest import manifest, read_manifest, write_manifest
    from mpjax.train.report.memory import bytes_per_parameter, state_bytes
    from mpjax.train.report.metrics_writer import MetricsWriter, read_metrics
    from mpjax.train.report.progress import ProgressBar
    from mpjax.train.report.tensor_monitor import TensorWriter
    from mpjax.train.schedule.switch_state import joined

# Imported at first use: a train step needs neither orbax nor progress bars nor writers.
_LAZY = {
    "fit": "loop",
    "Checkpointer": "checkpoint.checkpointer",
    "CheckpointReader": "checkpoint.reader",
    "restore_into": "checkpoint.restore",
    "environment": "report.environment",
    "MetricsWriter": "report.metrics_writer",
    "read_metrics": "report.metrics_writer",
    "ProgressBar": "report.progress",
    "Interrupt": "report.interrupt",
    "manifest": "report.manifest",
    "read_manifest": "report.manifest",
    "write_manifest": "report.manifest",
    "bytes_per_parameter": "report.memory",
    "state_bytes": "report.memory",
    "TensorWriter": "report.tensor_monitor",
    "joined": "schedule.switch_state",
}

__all__ = [
    "CheckpointReader",
    "Checkpointer",
    "DiLoCo",
    "Interrupt",
    "MetricsWriter",
    "ProgressBar",
    "ShardActivations",
    "SwitchingStep",
    "TensorWriter",
    "TrainState",
    "TrainStep",
    "build",
    "build_abstract",
    "bytes_per_parameter",
    "check_batch",
    "environment",
    "fit",
    "init_state",
    "joined",
    "make_train_step",
    "manifest",
    "parse_mesh",
    "partition",
    "read_manifest",
    "read_metrics",
    "restore_into",
    "state_bytes",
    "state_shardings",
    "with_weights",
    "write_manifest",
]


def __getattr__(name: str) -> object:
    return lazy_names(__name__, _LAZY)(name)
