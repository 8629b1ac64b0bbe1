"""Transforms of any JAX function, on one walk over its jaxpr."""

from mpjax.interpret.audit.audit import assert_low_precision, audit
from mpjax.interpret.audit.collectives import Collective
from mpjax.interpret.audit.report import Audit
from mpjax.interpret.audit.wire import assert_wire
from mpjax.interpret.autocast.autocast import autocast, no_autocast
from mpjax.interpret.core.named import named
from mpjax.interpret.monitor.monitor import monitor
from mpjax.interpret.monitor.report import Monitored
from mpjax.interpret.nonfinite.nonfinite import Nonfinite, trace_nonfinite

__all__ = [
    "Audit",
    "Collective",
    "Monitored",
    "Nonfinite",
    "assert_low_precision",
    "assert_wire",
    "audit",
    "autocast",
    "monitor",
    "named",
    "no_autocast",
    "trace_nonfinite",
]
