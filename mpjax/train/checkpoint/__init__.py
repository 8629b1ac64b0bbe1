"""Checkpoints: written whole, read with care, restored into other settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpjax.lazy import lazy_names

if TYPE_CHECKING:
    from mpjax.train.checkpoint.bundle import explain, save_bundle
    from mpjax.train.checkpoint.checkpointer import Checkpointer
    from mpjax.train.checkpoint.lock import hold_folder
    from mpjax.train.checkpoint.reader import CheckpointReader
    from mpjax.train.checkpoint.restore import compare_settings, differences, restore_into

# Imported at first use: a train step needs neither orbax nor progress bars nor writers.
_LAZY = {
    "Checkpointer": "checkpointer",
    "CheckpointReader": "reader",
    "compare_settings": "restore",
    "differences": "restore",
    "restore_into": "restore",
    "hold_folder": "lock",
    "explain": "bundle",
    "save_bundle": "bundle",
}

__all__ = [
    "CheckpointReader",
    "Checkpointer",
    "compare_settings",
    "differences",
    "explain",
    "hold_folder",
    "restore_into",
    "save_bundle",
]


def __getattr__(name: str) -> object:
    return lazy_names(__name__, _LAZY)(name)
