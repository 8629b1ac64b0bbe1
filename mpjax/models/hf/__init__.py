"""Checkpoints in the formats of Hugging Face, torch and llama.cpp: import and export."""

from mpjax.models.core.metadata import Metadata
from mpjax.models.hf.checkpoint import Checkpoint, open_checkpoint
from mpjax.models.hf.load import load_checkpoint
from mpjax.models.hf.save import check_export, save_checkpoint

__all__ = [
    "Checkpoint",
    "Metadata",
    "check_export",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
