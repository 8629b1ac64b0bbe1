"""The loss scale that settings describe."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from mpjax.errors import ConfigError
from mpjax.optim.loss_scale.leaf_scale import LeafLossScale, leaf_paths
from mpjax.optim.loss_scale.logmax import LogMaxLossScale
from mpjax.optim.loss_scale.scalers import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
)
from mpjax.precision import LossScaleSettings

_KINDS: dict[str, type] = {
    "dynamic": DynamicLossScale,
    "logmax": LogMaxLossScale,
    "leaf": LeafLossScale,
}


def make_loss_scale(settings: str | LossScaleSettings, params: Any = None) -> LossScale:
    """Returns the loss scale that settings describe.

    Args:
      settings: of any kind, or their text, such as `dynamic:init=1024`.
      params: the weights, or any tree of their structure; `leaf` needs them.

    Raises:
      ConfigError: what cannot be read; `leaf` without params, or with groups that do not fit them.

    Example:
      >>> make_loss_scale("static:128").value.item()
      128.0
    """
    settings = LossScaleSettings.parse(settings)
    if settings.kind == "none":
        return NoOpLossScale()
    if settings.kind == "static":
        return StaticLossScale(settings.init)
    kind = _KINDS[settings.kind]
    fields = dataclasses.asdict(settings)
    if kind is LeafLossScale:
        if params is None:
            raise ConfigError(
                "loss scale: leaf has a scale for each group of weights; write"
                " make_loss_scale(settings, params)"
            )
        fields["groups"] = settings.groups or tuple(leaf_paths(params))
    scale = kind(**{name: fields[name] for name in inspect.signature(kind).parameters})
    if kind is LeafLossScale:
        scale.group_of(params)  # raises here, not at the first step
    return scale
