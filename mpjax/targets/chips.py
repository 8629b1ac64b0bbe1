"""What makers publish of their chips, and XLA's descriptions of GPUs: `data/`."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from importlib import resources

from mpjax.errors import ConfigError

PASSES = 6  # products of bfloat16 that make one of float32 on a TPU


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published rates; `data/chips.toml` names the source.

    Args:
      name: such as `v5e` or `h100`.
      platform: `tpu` or `gpu`.
      memory: bytes.
      bandwidth: bytes/s between the chip and its memory.
      link: bytes/s that it sends to other chips, one way.
      between: bytes/s between slices, a chip's share of its pod's; 0 where none is published.
      shape: axes of a topology: 2 for `16x16`, 1 for a number of devices.
      flops: dtype of operands -> operations/s of products.
      source: page of the maker.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float
    link: float
    between: float
    shape: int
    flops: dict[str, float]
    source: str

    def rate(self, dtype: str) -> float:
        """Returns operations/s of products whose operands have a dtype.

        Formats that the chip does not multiply run in bfloat16, float32 on a TPU in six products
        of bfloat16.

        Args:
          dtype: such as `bfloat16`, `int8` or `float8_e4m3fn`.

        Example:
          >>> read_chip("v5e").rate("int8") / read_chip("v5e").rate("float8_e4m3fn") > 1.9
          True
        """
        name = next((n for n in ("float8", "float4") if dtype.startswith(n)), dtype)
        if name in self.flops:
            return self.flops[name]
        if name in ("float32", "float64"):
            return self.flops["bfloat16"] / PASSES
        return self.flops["float8" if name == "float4" and "float8" in self.flops else "bfloat16"]

    @property
    def description(self) -> str:
        """A GPU's description for XLA; empty for a TPU."""
        if self.platform == "tpu":
            return ""
        return (resources.files("mpjax.targets") / "data" / f"{self.name}.txtpb").read_text()


@functools.cache
def chips() -> dict[str, Chip]:
    """Returns the chips that are known, by name.

    Example:
      >>> chips()["h100"].memory
      80000000000.0
    """
    text = (resources.files("mpjax.targets") / "data" / "chips.toml").read_text()
    return {
        name: Chip(
            name, found["platform"], float(found["memory"]), found["bandwidth"], found["link"],
            found.get("between", 0.0), found["shape"], found["flops"], found["source"],
        )
        for name, found in tomllib.loads(text).items()
    }  # fmt: skip


def read_chip(name: str) -> Chip:
    """Returns a chip.

    Raises:
      ConfigError: an unknown one.

    Example:
      >>> read_chip("v5e").platform
      'tpu'
    """
    if not isinstance(name, str) or name not in chips():
        raise ConfigError(f"target: unknown chip {name!r}; known: {' '.join(chips())}")
    return chips()[name]
