"""Weights set to zero while training: masks, their schedule, and how many there are."""
