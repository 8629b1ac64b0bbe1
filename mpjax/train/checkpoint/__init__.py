"""Checkpoints: written whole, read with care, restored into other settings."""
