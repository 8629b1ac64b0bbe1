"""Checkpoints in the formats of Hugging Face, torch and llama.cpp: import and export."""

from mpjax.models.hf.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
