"""Mixed- and low-precision training of Transformers on JAX.

Say in one object in which format each tensor is stored, computed, updated and communicated
(`get_precision`), train with it, and see what that did.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mpjax.errors import ConfigError, TrainingStopped
from mpjax.formats import Format
from mpjax.optim import (
    DynamicLossScale,
    NoOpLossScale,
    StaticLossScale,
    scaled_value_and_grad,
)
from mpjax.precision import Precision, get_precision, register_preset

if TYPE_CHECKING:
    from mpjax import data, models, optim, precision, report, train

# Imported at first use, so that someone who takes only the loss scale pays for nothing else.
_PARTS = ("data", "models", "optim", "precision", "report", "train")

__all__ = [
    "ConfigError",
    "DynamicLossScale",
    "Format",
    "NoOpLossScale",
    "Precision",
    "StaticLossScale",
    "TrainingStopped",
    "data",
    "get_precision",
    "models",
    "optim",
    "precision",
    "register_preset",
    "report",
    "scaled_value_and_grad",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"mpjax.{name}")
    raise AttributeError(f"module 'mpjax' has no attribute {name!r}")
