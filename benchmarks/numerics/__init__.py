"""Rounding, recipes and optimizers against exact arithmetic."""
