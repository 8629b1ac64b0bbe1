"""The table of number formats: floating point, integer, fixed point and power of two."""

from __future__ import annotations

import dataclasses
import re
from typing import TypeAlias

import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.typing import DType, DTypeLike

# name -> exponent bits, mantissa bits, bias, which patterns are not numbers.
# "ieee": the all-ones exponent is inf and NaN; "nan": one NaN per sign, no inf; "none": every
# pattern is a number; "fnuz": one NaN in place of -0, no inf.
# Source: OCP 8-bit Floating Point 1.0 (e4m3, e5m2), OCP Microscaling 1.0 (e3m2, e2m3, e2m1),
# Noune et al. 2022 (fnuz).
_FLOATS = {
    "float64": (11, 52, 1023, "ieee"),
    "float32": (8, 23, 127, "ieee"),
    "tf32": (8, 10, 127, "ieee"),
    "bfloat16": (8, 7, 127, "ieee"),
    "float16": (5, 10, 15, "ieee"),
    "e5m2": (5, 2, 15, "ieee"),
    "e5m2fnuz": (5, 2, 16, "fnuz"),
    "e4m3": (4, 3, 7, "nan"),
    "e4m3fnuz": (4, 3, 8, "fnuz"),
    "e4m3b11fnuz": (4, 3, 11, "fnuz"),
    "e4m3ieee": (4, 3, 7, "ieee"),
    "e3m2": (3, 2, 3, "none"),
    "e2m3": (2, 3, 1, "none"),
    "e2m1": (2, 1, 1, "none"),
}
_INTEGERS = {"int16": 16, "int8": 8, "int4": 4, "int2": 2}
# float64 holds every number of these: no e11m..none, no more than 53 bits of fixed point
_GENERIC = re.compile(r"(?!e11.*none)e([2-9]|1[01])m([1-9]|[1-4][0-9]|5[0-2])(none)?")
_FIXED = re.compile(r"q([1-9]|[12][0-9]|3[0-2])\.([0-9]|[12][0-9]|30)")
# What JAX can hold in an array; float6 exists as values only.
_DTYPES = {
    **{name: name for name in ("float64", "float32", "bfloat16", "float16", *_INTEGERS)},
    "e5m2": "float8_e5m2",
    "e5m2fnuz": "float8_e5m2fnuz",
    "e4m3": "float8_e4m3fn",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e4m3b11fnuz": "float8_e4m3b11fnuz",
    "e4m3ieee": "float8_e4m3",
    "e3m4": "float8_e3m4",
    "e2m1": "float4_e2m1fn",
    "e8m0": "float8_e8m0fnu",
}
_KNOWN = (*_FLOATS, "e8m0", *_INTEGERS)


def _name_of(dtype: DTypeLike) -> str:
    """The name of the format that a dtype holds."""
    try:
        held = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        held = None
    name = next((name for name, known in _DTYPES.items() if known == held), None)
    if name is None:
        raise ConfigError(
            f"format: {brief(dtype)} is neither a name nor a dtype of numbers; write one of"
            f" {' '.join(_KNOWN)}, eXmY, qI.F"
        )
    return name


@dataclasses.dataclass(frozen=True, init=False)
class Format:
    r"""A number format.

    Floating point (`kind` "float"): a normal number is $\pm 2^{e - b}(1 + f 2^{-M})$ with bias
    $b$, mantissa bits $M$ and $0 \le f < 2^M$; a subnormal one is $\pm 2^{1-b} f 2^{-M}$.
    Fixed point (`kind` "fixed", integers too): $k 2^{-F}$ with $-2^{I+F-1} \le k < 2^{I+F-1}$.
    `e8m0` (`kind` "power"): $2^{k}$ with $-127 \le k \le 127$, no sign and no zero.

    Args:
      name: `float64 float32 tf32 bfloat16 float16`; the OCP formats `e5m2 e4m3 e3m2 e2m3 e2m1
        e8m0`; `e5m2fnuz e4m3fnuz e4m3b11fnuz e4m3ieee`; any other `eXmY`, which is read as
        IEEE-like (all-ones exponent: inf and NaN), or `eXmYnone` where every pattern is a number;
        `int16 int8 int4 int2`; `qI.F`, fixed point with I integer bits (sign included) and F
        fraction bits. A dtype, such as `jnp.bfloat16`, means the format that it holds.

    Raises:
      ConfigError: the name is none of these.

    Example:
      >>> Format("e4m3").max, Format("float16").min_subnormal == 2.0**-24
      (448.0, True)
      >>> Format("e4m4").max, Format("q8.8").max, Format("int4").min
      (248.0, 127.99609375, -8.0)

    References:
      Open Compute Project, OFP8 1.0, table 1; Microscaling Formats (MX) 1.0, sections 5.3, 5.4.
    """

    name: str
    kind: str
    exponent_bits: int
    mantissa_bits: int  # of fixed point: fraction bits
    bias: int
    specials: str

    def __init__(self, name: str | DTypeLike) -> None:
        name = name if isinstance(name, str) else _name_of(name)
        found: tuple[str, int, int, int, str]  # the other fields
        if name in _FLOATS:
            found = ("float", *_FLOATS[name])
        elif name == "e8m0":
            found = ("power", 8, 0, 127, "nan")
        elif name in _INTEGERS:
            found = ("fixed", 0, 0, 0, "none")
        elif match := _GENERIC.fullmatch(name):
            exponent_bits = int(match[1])
            bias, specials = 2 ** (exponent_bits - 1) - 1, match[3] or "ieee"
            found = ("float", exponent_bits, int(match[2]), bias, specials)
        elif (match := _FIXED.fullmatch(name)) and int(match[1]) + int(match[2]) <= 53:
            found = ("fixed", 0, int(match[2]), 0, "none")
        else:
            held = next((key for key, dtype in _DTYPES.items() if dtype == name), None)
            hint = f"did you mean {held}? " if held else did_you_mean(name.lower(), _KNOWN, 2)
            raise ConfigError(
                f"format: unknown name {name!r}; {hint}known: {' '.join(_KNOWN)}, any eXmY"
                " with X in 2..11 and Y in 1..52, any eXmYnone with X in 2..10, any qI.F with I in"
                " 1..32, F in 0..30 and I + F <= 53"
            )
        for field, value in zip(dataclasses.fields(self), (name, *found), strict=True):
            object.__setattr__(self, field.name, value)

    @classmethod
    def of(cls, value: FormatLike) -> Format:
        """Returns a Format as it is, or that of a name or a dtype.

        Raises:
          ConfigError: it is none of these.
        """
        return value if isinstance(value, Format) else cls(value)

    @property
    def bits(self) -> int:
        """Width in bits, sign included."""
        if self.kind == "fixed":
            match = _FIXED.fullmatch(self.name)
            return _INTEGERS[self.name] if match is None else int(match[1]) + int(match[2])
        return (self.kind == "float") + self.exponent_bits + self.mantissa_bits

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number, $2^{-M}$."""
        return 2.0**-self.mantissa_bits

    @property
    def max(self) -> float:
        """Largest finite number."""
        if self.kind == "power":
            return 2.0**127
        if self.kind == "fixed":
            return 2.0 ** (self.bits - 1 - self.mantissa_bits) - self.epsilon
        top = 2**self.exponent_bits - (2 if self.specials == "ieee" else 1) - self.bias
        lost = 2 if self.specials == "nan" else 1  # the all-ones pattern is NaN
        return (2.0 - lost * self.epsilon) * 2.0**top

    @property
    def min(self) -> float:
        """Most negative finite number; the smallest one of `e8m0`."""
        if self.kind == "power":
            return 2.0**-127
        return -self.max - self.epsilon if self.kind == "fixed" else -self.max

    @property
    def min_normal(self) -> float:
        """Smallest positive number with the full mantissa; of fixed point, the step."""
        return self.min_subnormal if self.kind != "float" else 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number."""
        if self.kind == "power":
            return 2.0**-127
        if self.kind == "fixed":
            return self.epsilon
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def dtype(self) -> DType | None:
        """The JAX dtype that holds exactly this format, or None."""
        return jnp.dtype(_DTYPES[self.name]) if self.name in _DTYPES else None

    @property
    def is_integer(self) -> bool:
        """Whether it is `int16`, `int8`, `int4` or `int2`."""
        return self.name in _INTEGERS


FormatLike: TypeAlias = str | Format | DTypeLike  # what `Format.of` reads


def widest(*dtypes: DTypeLike) -> DType:
    """Returns the narrowest dtype that holds all of them; bfloat16 and float16 meet in float32.

    Example:
      >>> widest(jnp.bfloat16, jnp.float32).name, widest(jnp.bfloat16, jnp.float16).name
      ('float32', 'float32')
    """
    # not jnp.promote_types, which refuses under strict promotion
    several = {jnp.dtype(dtype) for dtype in dtypes}
    size = max(dtype.itemsize for dtype in several)
    top = [dtype for dtype in several if dtype.itemsize == size]
    return top[0] if len(top) == 1 else jnp.dtype(jnp.float32)
