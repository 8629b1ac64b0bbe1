"""Settings of the optimizer state: the storage format of each moment, and the exceptions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.formats.checks import did_you_mean
from mpjax.precision.policy import dtype_name, parse_dtype
from mpjax.typing import DTypeLike

# name -> the block that it has when none is given; 0 is the whole tensor.
_BLOCKS = {"int8": 256, "int4": 128, "e4m3": 256, "e5m2": 256, "int8-linear": 0}
# One name for both moments: the second needs range more than mantissa bits.
_PAIRS = {"fp8": ("e4m3", "e5m2")}
_DTYPES = ("f32", "bf16", "f16", "fp32", "fp16", "float32", "bfloat16", "float16", "f64", "float64")
_HELP = (
    "write FORMAT for both or first=FORMAT,second=FORMAT, then keep=PATTERN, min=NUMBER,"
    " rounding=nearest, with FORMAT a dtype (bf16) or int8@256 int4@128 fp8@256 e4m3@256 e5m2@256"
    " int8-linear"
)


@dataclasses.dataclass(frozen=True)
class MomentFormat:
    """How one moment is stored: a dtype, or codes with a float32 absmax for each block.

    Args:
      name: `float32 bfloat16 float16 float64`; `int8` (Dettmers' dynamic tree code book), `int4`
        (Li's: dynamic exponent for the first moment, linear without zero for the second),
        `e4m3`, `e5m2`, or `int8-linear` (equal steps: the negative control).
      block: numbers that share an absmax; 0 is the whole tensor. A dtype has none, codes have the
        usual one where none is given.

    Raises:
      ConfigError: unknown name, a block that is none, or one for a dtype.

    Example:
      >>> MomentFormat.parse("int8"), str(MomentFormat.parse("bfloat16"))
      (MomentFormat(name='int8', block=256), 'bf16')
    """

    name: str = "float32"
    block: int | None = None

    def __post_init__(self) -> None:
        name, block = self.name, self.block
        if not isinstance(name, str) or name not in _BLOCKS:
            object.__setattr__(self, "name", np.dtype(parse_dtype(name, "moments")).name)
            if block is not None:
                raise ConfigError(
                    f"moments: block={brief(block)} is given to {self.name}, a dtype, which needs"
                    " none; drop it, or name a format of codes, such as int8"
                )
        elif block is None:
            object.__setattr__(self, "block", _BLOCKS[name])
        elif not is_whole(block, 0):
            raise ConfigError(
                f"moments: block={brief(block)} is not a number of elements; write"
                f" {_BLOCKS[name] or 256}, or 0 for the whole tensor"
            )

    @classmethod
    def parse(
        cls, value: DTypeLike | MomentFormat, where: str = "moments", second: bool = False
    ) -> MomentFormat:
        """Reads a format's name, `NAME@BLOCK` or `NAME@tensor`; `second` decides what fp8 is.

        Raises:
          ConfigError: unknown name, a block that is not a positive number, or one for a dtype.
        """
        if isinstance(value, MomentFormat):
            return value
        if not isinstance(value, str):
            return cls(np.dtype(parse_dtype(value, where)).name)
        name, at, block = value.partition("@")
        name = _PAIRS[name][second] if name in _PAIRS else name
        if name not in _BLOCKS:
            known = (*_BLOCKS, *_PAIRS, *_DTYPES)
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"{where}: unknown format {name!r}; {hint}{_HELP}")
            if at:
                raise ConfigError(
                    f"{where}: {value!r} gives a block to a dtype, which needs none; write {name}"
                )
            return cls(np.dtype(parse_dtype(name, where)).name)
        if not at:
            return cls(name, _BLOCKS[name])
        if block != "tensor" and not (block.isascii() and block.isdigit() and int(block) > 0):
            raise ConfigError(
                f"{where}: the block {block!r} of {value!r} is not a positive whole number; write"
                f" {name}@{_BLOCKS[name] or 256}, or {name}@tensor for one block"
            )
        return cls(name, 0 if block == "tensor" else int(block))

    @property
    def dtype(self) -> DTypeLike | None:
        """The dtype of a moment that is stored as it is, None of one stored as codes."""
        return None if self.block is not None else parse_dtype(self.name)

    def __str__(self) -> str:
        if self.block is None:
            return dtype_name(self.name)
        return f"{self.name}@{self.block or 'tensor'}"


@dataclasses.dataclass(frozen=True)
class Moments:
    """In which format the optimizer's moments are stored; they are always updated in float32.

    Args:
      first: of the gradient's running mean (Adam's m, momentum): a MomentFormat, its text or a
        dtype.
      second: of its running square (Adam's v).
      keep: path patterns of weights whose moments stay float32, such as `**/embed`. Nothing is
        kept by default; Dettmers et al. keep embeddings.
      min_size: moments of fewer numbers stay float32. 0 by default: small leaves cost little
        either way; bitsandbytes has 4096.
      rounding: `stochastic`, whose mean is the moment, or `nearest`, as bitsandbytes rounds: with
        it a running square with a decay of .999 cannot fall.
      user: a user's pattern of `keep` must match something, a preset's need not.

    Raises:
      ConfigError: unknown formats, or exclusions where nothing is stored low.

    Example:
      >>> str(Moments.parse("first=bf16")), str(Moments.parse("int8,keep=**/embed,min=4096"))
      ('first=bf16,second=f32', 'int8@256,keep=**/embed,min=4096')
      >>> str(Moments.parse("fp8"))
      'first=e4m3@256,second=e5m2@256'

    References:
      Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, sections 2 and 3.
      Li et al. 2023, Memory Efficient Optimizers with 4-bit States, section 4.
    """

    first: MomentFormat = MomentFormat()
    second: MomentFormat = MomentFormat()
    keep: tuple[str, ...] = ()
    min_size: int = 0
    rounding: str = "stochastic"
    user: bool = dataclasses.field(default=True, compare=False)

    def __post_init__(self) -> None:
        first = MomentFormat.parse(self.first, "moments: first")
        second = MomentFormat.parse(self.second, "moments: second", second=True)
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "second", second)
        if not isinstance(self.keep, list | tuple | set | frozenset):
            one = f"{self.keep!r} is one text" if isinstance(self.keep, str) else brief(self.keep)
            raise ConfigError(f"moments: keep={one}; give a tuple of patterns")
        object.__setattr__(self, "keep", tuple(self.keep))
        for pattern in self.keep:
            if not isinstance(pattern, str) or not pattern or set(pattern) & set(" ,=\t\n"):
                raise ConfigError(
                    f"moments: keep={pattern!r} is empty or holds a blank, ',' or '='; write a path"
                    " pattern such as keep=**/embed"
                )
        size = self.min_size
        if not is_whole(size, 0):
            raise ConfigError(
                f"moments: min={brief(size)} is not a number of elements; write min=4096"
            )
        if self.rounding not in ("stochastic", "nearest"):
            raise ConfigError(
                f"moments: rounding={brief(self.rounding)} is unknown; write stochastic or nearest"
            )
        plain = first.dtype == second.dtype == jnp.float32
        if plain and self.rounding == "nearest":
            raise ConfigError(
                "moments: rounding= rounds low moments, but both are float32; give a format, such"
                " as int8@256, or drop it"
            )
        if plain and (self.keep or self.min_size):
            raise ConfigError(
                "moments: keep= and min= exclude leaves from a low format, but both moments are"
                " float32; give a format, such as int8@256, or drop them"
            )

    @classmethod
    def parse(cls, text: str) -> Moments:
        """Reads a format for both or `first=FORMAT,second=FORMAT`, then `keep= min= rounding=`."""
        found: dict[str, Any] = {}
        keep: list[str] = []
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals and not {"first", "second"} & set(found):
                found["first"] = MomentFormat.parse(part)
                found["second"] = MomentFormat.parse(part, second=True)
            elif equals and key in ("first", "second") and key not in found:
                found[key] = MomentFormat.parse(value, f"moments: {key}", key == "second")
            elif equals and key == "keep":
                keep.append(value)
            elif equals and key == "rounding" and key not in found:
                found[key] = value
            elif key == "min" and "min_size" not in found and value.isascii() and value.isdigit():
                found["min_size"] = int(value)
            else:
                raise ConfigError(f"moments: bad field {part!r} in {text!r}; {_HELP}")
        return cls(**found, keep=tuple(keep))

    def __str__(self) -> str:
        first, second = str(self.first), str(self.second)
        words = [first if first == second else f"first={first},second={second}"]
        words += [f"keep={pattern}" for pattern in self.keep]
        words += [f"min={self.min_size}"] * (self.min_size > 0)
        return ",".join(words + ["rounding=nearest"] * (self.rounding == "nearest"))
