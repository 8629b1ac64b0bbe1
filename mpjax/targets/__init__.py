"""Training steps compiled for chips that are not here: what they need, take and send."""

from __future__ import annotations

from mpjax.targets.chips import Chip, chips, read_chip
from mpjax.targets.devices import Target, parse_target, target_devices_of
from mpjax.targets.figures import Forecast, page
from mpjax.targets.forecasting import forecast
from mpjax.targets.parent import preflight

__all__ = [
    "Chip",
    "Forecast",
    "Target",
    "chips",
    "forecast",
    "page",
    "parse_target",
    "preflight",
    "read_chip",
    "target_devices_of",
]
