"""The loss scale that settings describe."""

from __future__ import annotations

import dataclasses

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
from mpjax.typing import PyTree

_KINDS: dict[str, type[LossScale]] = {
    "none": NoOpLossScale,
    "static": StaticLossScale,
    "dynamic": DynamicLossScale,
    "logmax": LogMaxLossScale,
    "leaf": LeafLossScale,
}


def make_loss_scale(settings: str | LossScaleSettings, params: PyTree = None) -> LossScale:
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
    kind = _KINDS[settings.kind]
    if kind is LeafLossScale:
        if params is None:
            raise ConfigError(
                "loss scale: leaf has a scale for each group of weights; write"
                " make_loss_scale(settings, params)"
            )
        groups = settings.groups or tuple(leaf_paths(params))
        settings = dataclasses.replace(settings, groups=groups)
    scale = kind.from_settings(settings)
    if isinstance(scale, LeafLossScale):
        scale.group_of(params)  # raises here, not at the first step
    return scale
