"""What a step will need and take on a device: the figures, as text, rows and JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mpjax.markdown import table

_SMALL = 1e-3  # of all that is sent: what is less is not listed
STATE = ("weights", "optimizer state", "other state", "batch")


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind and dtype in one step.

    Args:
      kind: such as `all-gather`.
      dtype: on the wire.
      axes: of the mesh.
      count: how many run.
      bytes: of the whole arrays, all together.
      moved: bytes that each device sends.
    """

    kind: str
    dtype: str
    axes: str
    count: int
    bytes: int
    moved: int


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What one step needs on each device; sizes in bytes, times in seconds.

    Args:
      precision: its name.
      target: as it was given.
      mesh: axis -> devices.
      batch: rows on each device; devices along `tensor` share theirs.
      tokens: of a row.
      memory: of a device; 0 if unknown.
      parts: `weights`, `optimizer state`, `other state` and `batch`, exactly, and `gradients` as
        they are summed, which are a part of the temporaries.
      arguments: what the program takes, by the compiler.
      temporaries: what it needs beside them; where the compiler refused, what it said.
      code: of the program itself.
      refused: the compiler's reason, when the program does not fit; else empty.
      flops: dtype of operands -> operations of products.
      accessed: bytes between the device and its memory, loops counted in full.
      sent: collectives.
      kernels: of attention.
      seconds: `compute`, `memory`, `network` and, of several slices, `slices`, at the published
        rates; empty without them.
      largest: arrays that the program makes: bytes, dtype and shape, where.
      compile_seconds: of tracing and compiling.
      most: the largest batch on each device that fits, where that was searched.
    """

    precision: str
    target: str
    mesh: dict[str, int]
    batch: int
    tokens: int
    memory: int
    parts: dict[str, int]
    arguments: int
    temporaries: int
    code: int
    refused: str
    flops: dict[str, float]
    accessed: int
    sent: tuple[Sent, ...]
    kernels: tuple[str, ...]
    seconds: dict[str, float]
    largest: tuple[tuple[int, str, str], ...]
    compile_seconds: float
    most: int | None = None

    @property
    def peak(self) -> int:
        """Arguments, temporaries and code."""
        return self.arguments + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether the compiler took it, and it is no more than the device has."""
        return not self.refused and (not self.memory or self.peak <= self.memory)

    @property
    def step_seconds(self) -> float:
        """The longest of these times, which run beside each other at best."""
        return max(self.seconds.values(), default=math.nan)

    @property
    def tokens_per_s(self) -> float:
        """Of a device, whose rows those of its `tensor` axis share, at most."""
        return self.batch * self.tokens / self.mesh.get("tensor", 1) / self.step_seconds

    @property
    def bound(self) -> str:
        """Which of them it is; empty without rates."""
        return max(self.seconds, key=lambda k: self.seconds[k]) if self.seconds else ""

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures, for JSON."""
        more = {"peak": self.peak, "fits": self.fits, "bound": self.bound}
        return dataclasses.asdict(self) | more

    @staticmethod
    def of(found: dict[str, Any]) -> Forecast:
        """Reads what `to_dict` gave."""
        fields = {f.name for f in dataclasses.fields(Forecast)}
        own = {k: v for k, v in found.items() if k in fields}
        own["sent"] = tuple(Sent(**one) for one in own["sent"])
        own["kernels"] = tuple(own["kernels"])
        own["largest"] = tuple((int(n), str(a), str(b)) for n, a, b in own["largest"])
        return Forecast(**own)

    def __str__(self) -> str:
        return page([self])


def mega(size: float) -> str:
    """Bytes in words: `5,681 MB`, `1.3 MB`, `12.0 kB`, `96 B`."""
    if size < 1e3:
        return f"{size:.0f} B"
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:,.0f} MB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _tera(operations: float | None) -> str:
    return "–" if operations is None else f"{operations / 1e12:,.4g} T"


def _time(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds * 1e3:,.4g} ms"


def page(found: list[Forecast]) -> str:
    """Returns forecasts as a page in Markdown, side by side."""
    names = [one.precision for one in found]

    def rows(*lines: tuple[str, Any]) -> list[list[str]]:
        said = [[what, *(say(one) for one in found)] for what, say in lines]
        return [line for line in said if set(line[1:]) != {"–"}]

    need = rows(
        *((name, lambda f, n=name: mega(f.parts[n])) for name in STATE),
        ("arguments, by the compiler", lambda f: "–" if f.refused else mega(f.arguments)),
        ("gradients", lambda f: mega(f.parts["gradients"])),
        ("temporaries (gradients, activations, work)",
         lambda f: mega(f.temporaries) + " at least" * bool(f.refused)),
        ("program", lambda f: mega(f.code) if not f.refused else "–"),
        ("peak", lambda f: mega(f.peak) + " at least" * bool(f.refused)),
        ("memory of a device", lambda f: mega(f.memory) if f.memory else "not known"),
        ("fits", lambda f: "yes" if f.fits else "**no**"),
    )  # fmt: skip
    if any(one.most is not None for one in found):
        searched = ["–" if one.most is None else str(one.most) for one in found]
        need.append(["largest batch on a device", *searched])
    dtypes = sorted({dtype for one in found for dtype in one.flops})
    work = rows(
        *((f"operations of products, {d}", lambda f, d=d: _tera(f.flops.get(d)))
          for d in dtypes),
        ("bytes to and from memory",
         lambda f: f"{f.accessed / 1e9:,.4g} GB" if f.accessed else "–"),
        ("collectives, small ones too",
         lambda f: f"{sum(one.count for one in f.sent):,}" if f.sent else "–"),
        ("attention", lambda f: ", ".join(f.kernels) or "–"),
        *((f"{part}, at the published rate", lambda f, p=part: _time(f.seconds.get(p, math.nan)))
          for part in ("compute", "memory", "network", "slices")),
        ("a step takes at least", lambda f: _time(f.step_seconds)),
        ("bound by", lambda f: f.bound or "–"),
        ("tokens/s on a device, at most",
         lambda f: f"{f.tokens_per_s:,.0f}" if f.seconds else "–"),
        ("compiled in", lambda f: f"{f.compile_seconds:.0f} s"),
    )  # fmt: skip
    head = ["on each device", *names]
    parts = ["## Memory", table(head, need), "## Work", table(head, work)]
    kinds = sorted({
        (s.kind, s.dtype, s.axes)
        for one in found
        for s in one.sent
        if s.moved > _SMALL * sum(x.moved for x in one.sent)
    })  # fmt: skip
    if kinds:
        sizes = [{(s.kind, s.dtype, s.axes): s for s in one.sent} for one in found]
        wire = [
            ["{}, {}, over {}".format(*key), *(_sent(own.get(key)) for own in sizes)]
            for key in kinds
        ]
        parts += ["## Sent between devices", table(["collectives", *names], wire)]
    for one in found:
        told = [f"- {line}" for line in advice(one)]
        big = [[mega(size), what, where] for size, what, where in one.largest]
        parts += [f"## {one.precision}", *(["\n".join(told)] if told else [])]
        if one.refused:
            parts.append(f"The compiler: {one.refused}")
        if big:
            parts.append(table(["largest arrays", "what", "where"], big))
    return "\n\n".join(parts)


def _sent(one: Sent | None) -> str:
    if one is None:
        return "–"
    times = f"{one.count} x, " if one.count > 1 else ""
    return f"{times}{mega(one.moved)}"


def advice(one: Forecast) -> list[str]:
    """Returns what to change where a step does not fit, or what it waits for, with figures."""
    said = []
    parts, free = one.parts, one.mesh.get("data", 1)
    if not one.fits:
        over = one.peak - one.memory
        said.append(f"{mega(over)} too much")
        if free > 1:
            cut = (parts["weights"] + parts["optimizer state"]) * (1 - 1 / free)
            said.append(
                f"fsdp={one.mesh.get('fsdp', 1) * free},data=1 cuts weights and optimizer state"
                f" over all of them: {mega(cut)} less"
            )
        if parts["optimizer state"] > parts["weights"]:
            said.append(
                "moments=int8@256 stores the optimizer's moments in 8 bits: about"
                f" {mega(parts['optimizer state'] * 0.74)} less"
            )
        if one.batch > 1:
            said.append(
                f"batch {one.batch // 2} on a device, with accumulate=2: up to"
                f" {mega((one.temporaries - parts['gradients']) / 2)} less"
            )
        said.append("remat=full keeps one activation a block; more devices cut the state further")
    elif one.seconds and one.bound != "compute":
        times = ", ".join(f"{k} {_time(v)}" for k, v in one.seconds.items())
        remedy = {
            "network": "more rows on a device, fewer devices under fsdp, or a recipe in 8 bits",
            "slices": "more rows on a device, accumulate, or gradient_dtype=bf16",
            "memory": "more rows on a device, or less remat",
        }[one.bound]
        said.append(f"it waits for {one.bound} ({times}): {remedy}")
    return said
