"""Mixed- and low-precision training of Transformers on JAX.

Say in one object in which format each tensor is stored, computed, updated and communicated
(`get_precision`), train with it, and see what that did; or cast, audit and watch any JAX function
(`autocast`, `audit`, `monitor`, `trace_nonfinite`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mpjax.errors import ConfigError, TrainingStopped
from mpjax.formats import Format, Quantized, fake_quantize, quantize, round_to, sqnr
from mpjax.interpret import (
    assert_low_precision,
    assert_wire,
    audit,
    autocast,
    monitor,
    named,
    no_autocast,
    trace_nonfinite,
)
from mpjax.ops import conv_general_dilated, dot_general
from mpjax.optim import (
    DynamicLossScale,
    LeafLossScale,
    LogMaxLossScale,
    MultiLossScale,
    NoOpLossScale,
    StaticLossScale,
    scaled_value_and_grad,
    scaled_value_and_grads,
)
from mpjax.precision import (
    Operand,
    Precision,
    Recipe,
    get_precision,
    get_recipe,
    register_preset,
    register_recipe,
)

if TYPE_CHECKING:
    from mpjax import (
        data,
        finetuning,
        formats,
        interpret,
        models,
        ops,
        optim,
        precision,
        report,
        targets,
        tasks,
        train,
    )
    from mpjax.finetuning import finetune, from_pretrained, load_run
    from mpjax.targets import preflight

# Imported at first use, so that someone who takes only the loss scale pays for nothing else.
_PARTS = (
    "data", "finetuning", "formats", "interpret", "models", "ops", "optim", "precision", "report",
    "targets", "tasks", "train",
)  # fmt: skip
_LATER = {
    "finetune": "finetuning", "from_pretrained": "finetuning", "load_run": "finetuning",
    "preflight": "targets",
}  # fmt: skip

__all__ = [
    "ConfigError",
    "DynamicLossScale",
    "Format",
    "LeafLossScale",
    "LogMaxLossScale",
    "MultiLossScale",
    "NoOpLossScale",
    "Operand",
    "Precision",
    "Quantized",
    "Recipe",
    "StaticLossScale",
    "TrainingStopped",
    "assert_low_precision",
    "assert_wire",
    "audit",
    "autocast",
    "conv_general_dilated",
    "data",
    "dot_general",
    "fake_quantize",
    "finetune",
    "finetuning",
    "formats",
    "from_pretrained",
    "get_precision",
    "get_recipe",
    "interpret",
    "load_run",
    "models",
    "monitor",
    "named",
    "no_autocast",
    "ops",
    "optim",
    "precision",
    "preflight",
    "quantize",
    "register_preset",
    "register_recipe",
    "report",
    "round_to",
    "scaled_value_and_grad",
    "scaled_value_and_grads",
    "sqnr",
    "targets",
    "tasks",
    "trace_nonfinite",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"mpjax.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(f"mpjax.{_LATER[name]}"), name)
    raise AttributeError(f"module 'mpjax' has no attribute {name!r}")
