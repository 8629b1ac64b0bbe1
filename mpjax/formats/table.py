"""The table of floating-point formats: range and resolution from exponent and mantissa bits."""

from __future__ import annotations

import dataclasses
import difflib
import re

from mpjax.errors import ConfigError

# name -> exponent bits, mantissa bits, what the all-ones exponent means.
# "ieee": inf and NaN; "nan": one NaN per sign, no inf; "none": every pattern is a number.
# Source: OCP 8-bit Floating Point 1.0 (e4m3, e5m2), OCP Microscaling 1.0 (e3m2, e2m3, e2m1).
_NAMED = {
    "float64": (11, 52, "ieee"),
    "float32": (8, 23, "ieee"),
    "tf32": (8, 10, "ieee"),
    "bfloat16": (8, 7, "ieee"),
    "float16": (5, 10, "ieee"),
    "e5m2": (5, 2, "ieee"),
    "e4m3": (4, 3, "nan"),
    "e3m2": (3, 2, "none"),
    "e2m3": (2, 3, "none"),
    "e2m1": (2, 1, "none"),
}
_GENERIC = re.compile(r"e([2-9]|1[01])m([1-9]|[1-4][0-9]|5[0-2])")


@dataclasses.dataclass(frozen=True, init=False)
class Format:
    r"""A binary floating-point format with sign, exponent and mantissa.

    A normal number is $\pm 2^{e - b}(1 + f 2^{-M})$ with bias $b = 2^{E-1} - 1$, mantissa bits
    $M$ and $0 \le f < 2^M$; a subnormal one is $\pm 2^{1-b} f 2^{-M}$.

    Args:
      name: `float64 float32 tf32 bfloat16 float16`, the OCP formats `e5m2 e4m3 e3m2 e2m3 e2m1`,
        or any other `eXmY`, which is read as IEEE-like (all-ones exponent: inf and NaN).

    Raises:
      ConfigError: the name is none of these.

    Example:
      >>> Format("e4m3").max, Format("float16").min_subnormal == 2.0**-24
      (448.0, True)
      >>> Format("e4m4").max
      248.0

    References:
      Open Compute Project, OFP8 1.0, table 1; Microscaling Formats (MX) 1.0, section 5.3.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: str

    def __init__(self, name: str) -> None:
        if name in _NAMED:
            exponent_bits, mantissa_bits, specials = _NAMED[name]
        elif match := _GENERIC.fullmatch(name):
            exponent_bits, mantissa_bits, specials = int(match[1]), int(match[2]), "ieee"
        else:
            near = difflib.get_close_matches(name, _NAMED, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"format: unknown name {name!r}; {hint}known: {' '.join(_NAMED)} and any eXmY"
                " with X in 2..11 and Y in 1..52"
            )
        for field, value in zip(
            ("name", "exponent_bits", "mantissa_bits", "specials"),
            (name, exponent_bits, mantissa_bits, specials),
            strict=True,
        ):
            object.__setattr__(self, field, value)

    @property
    def bits(self) -> int:
        """Width in bits, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias, $2^{E-1} - 1$."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number, $2^{-M}$."""
        return 2.0**-self.mantissa_bits

    @property
    def max(self) -> float:
        """Largest finite number."""
        top = 2**self.exponent_bits - (2 if self.specials == "ieee" else 1) - self.bias
        lost = 2 if self.specials == "nan" else 1  # the all-ones pattern is NaN
        return (2.0 - lost * self.epsilon) * 2.0**top

    @property
    def min_normal(self) -> float:
        """Smallest positive number with the full mantissa."""
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)
