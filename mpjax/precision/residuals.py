"""Settings of residuals: the format in which modules keep what their backward pass reads."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.formats.checks import did_you_mean
from mpjax.typing import DType

_DTYPES = {"bf16": "bfloat16", "f16": "float16"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "fp16": "f16"}
_BLOCKS = {"e4m3": 128, "e5m2": 128, "int8": 128}
_KNOWN = ("none", *_DTYPES, *_BLOCKS)
_HELP = "write none, bf16, f16, e4m3, e5m2 or int8, the last three with a block such as e4m3@128"


@dataclasses.dataclass(frozen=True)
class Residuals:
    """How what the forward pass leaves for the backward pass is kept.

    The forward pass reads the numbers as computed; gradients are those at the rounded ones.

    Args:
      name: `none` (as computed), a dtype (`bf16`, `f16`) or an 8-bit format (`e4m3`, `e5m2`,
        `int8`).
      block: of 8-bit formats: at most so many numbers of the last axis share a float32 scale, by
        default 128: the largest divisor of the axis, of a device's part where a mesh cuts it, or
        all of it where that is below 16.

    Raises:
      ConfigError: an unknown name or block.

    Example:
      >>> str(Residuals.parse("e4m3")), str(Residuals.parse("bfloat16"))
      ('e4m3@128', 'bf16')

    References:
      Xi et al. 2024, COAT: Compressing Optimizer States and Activations for Memory-Efficient FP8
      Training, section 5.
      Chen et al. 2021, ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed
      Training.
    """

    name: str = "none"
    block: int | None = None

    def __post_init__(self) -> None:
        name = _SHORT.get(self.name, self.name) if isinstance(self.name, str) else self.name
        if not isinstance(name, str) or name not in _KNOWN:
            hint = did_you_mean(name, _KNOWN) if isinstance(name, str) else ""
            raise ConfigError(f"residuals: unknown format {brief(self.name)}; {hint}{_HELP}")
        object.__setattr__(self, "name", name)
        if name not in _BLOCKS and self.block is not None:
            raise ConfigError(f"residuals: {name} has no blocks; leave @{brief(self.block)} out")
        if name in _BLOCKS and self.block is None:
            object.__setattr__(self, "block", _BLOCKS[name])
        if name in _BLOCKS and not is_whole(self.block, 1):
            raise ConfigError(f"residuals: block {brief(self.block)} is no whole number; {_HELP}")

    def __bool__(self) -> bool:
        return self.name != "none"

    @property
    def dtype(self) -> DType | None:
        """Of a cast; None of an 8-bit format."""
        return jnp.dtype(_DTYPES[self.name]) if self.name in _DTYPES else None

    @classmethod
    def parse(cls, value: object) -> Residuals:
        """Reads a text such as `e4m3@128`.

        Raises:
          ConfigError: what cannot be read.
        """
        if isinstance(value, Residuals):
            return value
        if not isinstance(value, str):
            raise ConfigError(f"residuals: {brief(value)} is no text; {_HELP}")
        name, at, block = value.strip().partition("@")
        if not at:
            return cls(name)
        if not block.isdecimal():
            raise ConfigError(f"residuals: block {block!r} is no whole number; {_HELP}")
        return cls(name, int(block))

    def __str__(self) -> str:
        return self.name if self.block is None else f"{self.name}@{self.block}"
