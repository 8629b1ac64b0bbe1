"""Scaling: which numbers share a scale, and how the scale is chosen.

A number x is stored as the format's nearest to x / s and read back as that times s, so s is about
amax / max: the largest magnitude of the group goes to the format's largest number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats.rounding import round_to
from mpjax.formats.table import Format

SCALE_ROUNDINGS = ("none", "down", "up")
_BLOCK = re.compile(r"(block|mx|nv)\((?:([1-9][0-9]*)x)?([1-9][0-9]*)\)")
_TINY = 2.0**-126  # smallest normal float32: jitted arithmetic has nothing below it


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Which numbers share a scale.

    Args:
      kind: `none`, `tensor`, `row`, `block`, `mx` or `nv`.
      rows: numbers of a block along the other axis (`block`, `mx`, `nv`).
      columns: numbers of a block along the contracted axis.

    Example:
      >>> str(Scaling.parse("block(1x128)")), str(Scaling.parse("nv(16)"))
      ('block(1x128)', 'nv(16)')
    """

    kind: str
    rows: int = 1
    columns: int = 0

    @classmethod
    def parse(cls, text: str | Scaling) -> Scaling:
        """Reads `none`, `tensor`, `row`, `block(RxC)`, `mx(N)`, `nv(N)` or `nv(RxN)`.

        Raises:
          ConfigError: anything else.
        """
        if isinstance(text, Scaling):
            return text
        if text in ("none", "tensor", "row"):
            return cls(text)
        match = _BLOCK.fullmatch(text)
        if match is None or (match[1] == "block" and match[2] is None):
            raise ConfigError(
                f"scaling: unknown {text!r}; write none, tensor, row, block(1x128),"
                " block(128x128), mx(32), nv(16) or nv(16x16)"
            )
        return cls(match[1], int(match[2] or 1), int(match[3]))

    def __str__(self) -> str:
        if not self.columns:
            return self.kind
        if self.kind != "block" and self.rows == 1:
            return f"{self.kind}({self.columns})"
        return f"{self.kind}({self.rows}x{self.columns})"

    @property
    def blocks(self) -> bool:
        """Whether the scale changes along the contracted axis."""
        return self.columns > 0

    @property
    def default_rounding(self) -> str:
        """How its scales are rounded unless told otherwise: `up` to a power of two for mx."""
        return "up" if self.kind == "mx" else "none"

    def tiles(self, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the size of a group along each axis of an array.

        Args:
          shape: of the array.
          axes: the contracted axes; blocks lie along the last of them, their rows along the last
            axis that is not contracted.
        """
        if self.kind in ("none", "tensor"):
            return shape
        if self.kind == "row":
            return tuple(n if d in axes else 1 for d, n in enumerate(shape))
        along = max(axes)
        others = [d for d in range(len(shape)) if d not in axes]
        tile = [1] * len(shape)
        tile[along] = min(self.columns, shape[along])
        if self.rows > 1 and others:
            tile[others[-1]] = min(self.rows, shape[others[-1]])
        return tuple(tile)


def check_scaling(format: Format, scaling: Scaling, scale_rounding: str, where: str = "") -> None:
    """Checks that a format, a scaling and the rounding of its scales fit each other.

    Raises:
      ConfigError: they do not.
    """
    where = where and f"{where}: "
    if scale_rounding not in SCALE_ROUNDINGS:
        raise ConfigError(
            f"{where}scale_rounding: unknown {scale_rounding!r}; known: {' '.join(SCALE_ROUNDINGS)}"
        )
    if format.kind == "power":
        raise ConfigError(
            f"{where}format e8m0 holds scales, not values; take e4m3, e2m1 or another"
        )
    if format.kind == "fixed" and not format.is_integer and scaling.kind != "none":
        raise ConfigError(
            f"{where}fixed point {format.name} has its point where it is and takes no scale, got"
            f" scaling={scaling}; set scaling=none, or take int8 for scaled integers"
        )
    if scaling.kind == "nv" and format.is_integer:
        raise ConfigError(
            f"{where}{scaling} has e4m3 scales, which integer format {format.name} does not take;"
            " use row or block scaling, whose scales are float32"
        )
    if scaling.kind == "mx" and scale_rounding == "none":
        raise ConfigError(
            f"{where}{scaling} has e8m0 scales, powers of two; set scale_rounding to up or down,"
            " or use block(1x32) for float32 scales"
        )
    if scaling.kind == "nv" and scale_rounding != "none":
        raise ConfigError(f"{where}{scaling} rounds its scales to e4m3; leave scale_rounding out")


def power_of_two(scale: Any, up: bool) -> Any:
    """Returns positive normal float32 scales rounded up or down to powers of two, on bits."""
    u = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    if up:
        u = u + jnp.uint32(0x7FFFFF)
    out = jnp.minimum(u & jnp.uint32(0x7F800000), jnp.uint32(0x7F000000))  # 2^127 at most
    finite = jax.lax.bitcast_convert_type(out, jnp.float32)
    return jnp.where(jnp.isfinite(scale), finite, scale)


def to_scale(amax: Any, format: Format, scale_rounding: str) -> Any:
    """Returns the scale of groups from their largest magnitudes, float32.

    1 where amax is 0, so that nothing is divided by zero; not finite where amax is not, so that
    every number of the group becomes NaN and the step is skipped.

    Args:
      amax: largest magnitudes, float32.
      format: of the values.
      scale_rounding: `none`; `up` to a power of two, so that nothing overflows; `down`, the OCP
        rule $2^{\\lfloor \\log_2 amax \\rfloor - e_{max}}$, under which the largest may saturate.
    """
    if scale_rounding == "down":
        amax = power_of_two(jnp.maximum(amax, _TINY), up=False) * jnp.float32(amax > 0)
        scale = amax / jnp.float32(2.0 ** math.floor(math.log2(format.max)))
    else:
        scale = amax / jnp.float32(format.max)
    scale = jnp.where(scale < _TINY, jnp.float32(_TINY), scale)  # NaN stays
    if scale_rounding == "up":
        scale = power_of_two(scale, up=True)
    return jnp.where(amax == 0, jnp.float32(1), scale)


def two_level(amax: Any, format: Format, tensor_amax: Any) -> tuple[Any, Any]:
    """Returns NVFP4's block scales, numbers of e4m3, and the tensor's float32 scale.

    $$s = amax / (448\\,max),\\qquad s_b = e4m3(amax_b / (max\\,s))$$

    References:
      NVIDIA 2025, Pretraining Large Language Models with NVFP4, appendix B.
    """
    e4m3 = Format("e4m3")
    whole = to_scale(tensor_amax / jnp.float32(e4m3.max), format, "none")
    block = round_to(amax / jnp.float32(format.max) / whole, e4m3)
    # a block whose scale rounds to zero would be 0 / 0
    return jnp.maximum(block, jnp.float32(e4m3.min_subnormal)), whole
