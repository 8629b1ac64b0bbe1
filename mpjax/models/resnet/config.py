"""Sizes and choices of the residual network, by name."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mpjax.errors import ConfigError
from mpjax.models.core.sizes import FieldValue, ModelConfig, named_config
from mpjax.typing import Settings


@dataclasses.dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """Shape of a residual network for images.

    Args:
      inputs: channels of an image.
      classes: number of classes.
      widths: channels of each stage; every stage but the first halves height and width.
      blocks: residual blocks a stage.
      groups: of channels that GroupNorm normalises together; 1 is LayerNorm over a whole image.
      stride: of the first convolution.
      epsilon: of the norms.

    Raises:
      ConfigError: a value outside its range.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("inputs", "blocks", "groups", "stride")
    POSITIVE: ClassVar[tuple[str, ...]] = ("epsilon",)

    inputs: int = 1
    classes: int = 10
    widths: tuple[int, ...] = (16, 32)
    blocks: int = 1
    groups: int = 4
    stride: int = 1
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ConfigError(f"model: classes={self.classes} must be at least 2; raise it")
        if not self.widths:
            raise ConfigError("model: widths is empty; give the channels of each stage")
        for width in self.widths:
            if width < 1 or width % self.groups:
                raise ConfigError(
                    f"model: width {width} is no positive multiple of groups={self.groups};"
                    " change one"
                )

    @property
    def depth(self) -> int:
        """Residual blocks of all stages."""
        return self.blocks * len(self.widths)


_SIZES: dict[str, Settings] = {
    "tiny": {},
    "small": dict(widths=(16, 32, 64), groups=8, stride=2),
    "cifar20": dict(inputs=3, widths=(16, 32, 64), blocks=3, groups=8),
}


def resnet_config(size: str | ResNetConfig, **changes: FieldValue) -> ResNetConfig:
    """Returns the configuration of a named size with some fields changed.

    Args:
      size: `tiny`, `small`, `cifar20` (He et al.'s network of 20 layers for 32 x 32 pixels), or a
        ResNetConfig.
      changes: fields of ResNetConfig.

    Raises:
      ConfigError: unknown size or field.

    Example:
      >>> resnet_config("small", classes=5).widths
      (16, 32, 64)

    References:
      He et al. 2016, Deep Residual Learning, section 4.2.
    """
    return named_config(ResNetConfig, _SIZES, size, changes)
