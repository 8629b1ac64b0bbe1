"""Settings of compressed gradients: what replicas send each other in place of float32."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.formats.checks import did_you_mean

_DTYPES = {"bf16": "bfloat16", "f16": "float16"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "fp16": "f16"}
# name -> the block that it has when none is given
_BLOCKS = {"int8": 256, "int4": 64, "e4m3": 256, "e5m2": 256, "sign": 1024}
_KNOWN = ("none", *_DTYPES, *_BLOCKS, "topk", "powersgd")
_READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "dtype": ("feedback", "least"),
    "block": ("block", "prune", "feedback", "least"),
    "sign": ("block", "momentum", "warmup", "feedback", "least"),
    "topk": ("share", "momentum", "warmup", "feedback", "least"),
    "powersgd": ("rank", "warmup", "least"),
}
_HELP = (
    "write none, bf16, int8@256, int4@64, e4m3@256, e5m2@256, sign@1024, topk:0.01 or powersgd:4,"
    " then prune=0.75, momentum=0.9, warmup=100, feedback=off, min=4096"
)
_TEXTS = {"least": "min"}


@dataclasses.dataclass(frozen=True)
class Compression:
    """How gradients are compressed on their way between the replicas of the axis `data`.

    Each replica adds what earlier steps could not send (`feedback`) to its gradient, sends that in
    a narrow form, and keeps the rest. Two exchanges, of parts and of their means, are narrow alike
    for a dtype, blocks and signs; the largest numbers (`topk`) are gathered, and of low-rank
    factors (`powersgd`) the means are taken in float32.

    Args:
      name: `none`, a dtype (`bf16`, `f16`), a format of blocks (`int8 int4 e4m3 e5m2`),
        `sign` (one bit a number), `topk` or `powersgd`.
      block: numbers that share a float32 scale, by default the usual ones of a format.
      share: of `topk`: of a weight's numbers, those that are sent.
      rank: of `powersgd`: of the factors.
      prune: of a format of blocks: of each block's numbers, the smallest that are not sent.
      momentum: `topk`: of momentum correction, with which the optimizer has none of its own;
        `sign`: of the running mean that is sent in place of the gradient, as in 1-bit Adam.
      warmup: steps that are sent in float32 before the first compressed one.
      feedback: whether what was not sent is kept and added to the next gradient.
      least: a weight of fewer numbers is sent in float32.

    Raises:
      ConfigError: an unknown name, a value out of its range, or one that this kind does not read.

    Example:
      >>> str(Compression.parse("int8")), str(Compression.parse("topk:0.01,momentum=0.9"))
      ('int8@256', 'topk:0.01,momentum=0.9')

    References:
      Seide et al. 2014, 1-Bit Stochastic Gradient Descent (error feedback, both exchanges).
      Karimireddy et al. 2019, Error Feedback Fixes SignSGD, algorithm 2.
      Lin et al. 2018, Deep Gradient Compression, sections 3.1 to 3.3.
      Vogels et al. 2019, PowerSGD, algorithm 1.
      Tang et al. 2021, 1-bit Adam, algorithm 1.
    """

    name: str = "none"
    block: int | None = None
    share: float = 0.0
    rank: int = 0
    prune: float = 0.0
    momentum: float = 0.0
    warmup: int = 0
    feedback: bool = True
    least: int = 4096

    def __post_init__(self) -> None:
        name = _SHORT.get(self.name, self.name) if isinstance(self.name, str) else self.name
        if not isinstance(name, str) or name not in _KNOWN:
            hint = did_you_mean(name, _KNOWN) if isinstance(name, str) else ""
            raise ConfigError(f"compression: unknown form {brief(self.name)}; {hint}{_HELP}")
        object.__setattr__(self, "name", name)
        if name in _BLOCKS and self.block is None:
            object.__setattr__(self, "block", _BLOCKS[name])
        reads = _READS[self.kind]
        for field in dataclasses.fields(self)[1:]:
            if field.name not in reads and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"compression: {name} does not read"
                    f" {_TEXTS.get(field.name, field.name)}={brief(getattr(self, field.name))};"
                    " leave it out"
                )
        for key, low in (("block", 1), ("rank", 1), ("warmup", 0), ("least", 0)):
            value = getattr(self, key)
            if key in reads and not is_whole(value, low):
                raise ConfigError(
                    f"compression: {_TEXTS.get(key, key)}={brief(value)} is no whole number of at"
                    f" least {low}; {_HELP}"
                )
        for key in ("share", "prune", "momentum"):
            self._check_share(key, key in reads)
        if not isinstance(self.feedback, bool):
            raise ConfigError(
                f"compression: feedback={brief(self.feedback)}; write feedback=on or feedback=off"
            )
        if self.block is not None and self.block % 8:
            raise ConfigError(
                f"compression: a block of {self.block} is no multiple of 8, by which bits are"
                f" packed; write {name}@{max(8, self.block // 8 * 8)}"
            )

    def _check_share(self, key: str, read: bool) -> None:
        value = getattr(self, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least_open = key == "share" and read
        if not number or not 0 <= value < 1 or (least_open and value == 0):
            raise ConfigError(
                f"compression: {key}={brief(value)} does not lie"
                f" {'between 0 and 1' if least_open else 'in 0 .. 1, 1 left out'}; {_HELP}"
            )

    @property
    def kind(self) -> str:
        """`none`, `dtype`, `block`, `sign`, `topk` or `powersgd`."""
        if self.name in _DTYPES:
            return "dtype"
        return "block" if self.name in _BLOCKS and self.name != "sign" else self.name

    @property
    def dtype(self) -> str:
        """The name of the dtype that is sent, of a kind `dtype`."""
        return _DTYPES[self.name]

    @property
    def sent(self) -> int:
        """How many numbers of a block are sent, in a format of blocks; an even number."""
        assert self.block is not None, self.name
        return max(2, 2 * round(self.block * (1 - self.prune) / 2))

    @classmethod
    def parse(cls, value: str | Compression) -> Compression:
        """Reads `FORM`, `FORM@BLOCK`, `topk:SHARE` or `powersgd:RANK`, then options.

        Raises:
          ConfigError: no such text.
        """
        if isinstance(value, Compression):
            return value
        if not isinstance(value, str):
            raise ConfigError(f"compression: {brief(value)} is no text; {_HELP}")
        head, *options = value.split(",")
        name, at, block = head.partition("@")
        name, colon, number = name.partition(":")
        found: dict[str, Any] = {"name": name}
        main = {"topk": "share", "powersgd": "rank"}.get(name)
        if bool(colon) != (main is not None) or (at and colon):
            raise ConfigError(f"compression: {head!r} is not complete or has too much; {_HELP}")
        if at:
            found["block"] = _number(block, f"{head!r}")
        if main is not None:
            found[main] = _number(number, f"{head!r}")
        for part in options:
            key, equals, text = part.partition("=")
            key = "least" if key == "min" else key
            allowed = _READS[cls(**found).kind] if name in _KNOWN else ()
            main_key = key in ("block", "share", "rank")
            if not equals or key in found or key not in allowed or main_key:
                raise ConfigError(f"compression: bad option {part!r} in {value!r}; {_HELP}")
            if key == "feedback":
                if text not in ("on", "off"):
                    raise ConfigError(f"compression: {part!r}; write feedback=on or feedback=off")
                found[key] = text == "on"
            else:
                found[key] = _number(text, f"{part!r}")
        return cls(**found)

    def __str__(self) -> str:
        head = self.name
        if self.block is not None:
            head += f"@{self.block}"
        if self.kind in ("topk", "powersgd"):
            head += f":{self.share or self.rank:g}"
        words = [head]
        for key in ("prune", "momentum", "warmup"):
            words += [f"{key}={getattr(self, key):g}"] * bool(getattr(self, key))
        words += ["feedback=off"] * (not self.feedback)
        default = type(self).__dataclass_fields__["least"].default
        return ",".join(words + [f"min={self.least}"] * (self.least != default))


def _number(text: str, where: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"compression: {where}: {text!r} is no number; {_HELP}") from None
    return int(value) if text.isascii() and text.isdigit() else value
