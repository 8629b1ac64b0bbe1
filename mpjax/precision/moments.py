"""Settings of the optimizer state's storage dtypes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.precision.dtypes import dtype_name, parse_dtype


@dataclasses.dataclass(frozen=True)
class Moments:
    """In which dtype the optimizer's moments are stored; they are always updated in float32.

    Args:
      first: dtype of the gradient's running mean (Adam's m, momentum).
      second: dtype of its running square (Adam's v).

    Example:
      >>> str(Moments.parse("first=bf16")), str(Moments.parse("bf16"))
      ('first=bf16,second=f32', 'bf16')
    """

    first: Any = jnp.float32
    second: Any = jnp.float32

    @classmethod
    def parse(cls, text: str) -> Moments:
        """Reads a dtype for both, or `first=DTYPE`, `second=DTYPE`, or both with a comma."""
        if "=" not in text:
            dtype = parse_dtype(text, "moments")
            return cls(dtype, dtype)
        found = {}
        for part in text.split(","):
            key, _, value = part.partition("=")
            if key not in ("first", "second") or key in found:
                raise ConfigError(
                    f"moments: bad field {part!r} in {text!r}; write DTYPE or"
                    " first=DTYPE,second=DTYPE"
                )
            found[key] = parse_dtype(value, f"moments: {key}")
        return cls(**found)

    def __str__(self) -> str:
        first, second = dtype_name(self.first), dtype_name(self.second)
        return first if first == second else f"first={first},second={second}"
