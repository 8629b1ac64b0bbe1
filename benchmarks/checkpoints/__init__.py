"""Checkpoints against the libraries that they come from."""
