"""Transforms of any JAX function, on one walk over its jaxpr."""

from mpjax.interpret.autocast import autocast, no_autocast

__all__ = ["autocast", "no_autocast"]
