"""Transforms of any JAX function, on one walk over its jaxpr."""

from mpjax.interpret.audit import assert_low_precision, audit
from mpjax.interpret.autocast import autocast, no_autocast
from mpjax.interpret.monitor import monitor
from mpjax.interpret.named import named
from mpjax.interpret.nonfinite import trace_nonfinite

__all__ = [
    "assert_low_precision",
    "audit",
    "autocast",
    "monitor",
    "named",
    "no_autocast",
    "trace_nonfinite",
]
