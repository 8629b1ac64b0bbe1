"""What an audit found, as values, a dictionary, a table and Markdown."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from mpjax import markdown
from mpjax.interpret.audit.casts import Finding
from mpjax.interpret.audit.collectives import Collective
from mpjax.interpret.audit.donation import Undonated
from mpjax.interpret.audit.hlo import Optimised
from mpjax.typing import Json

SHOWN = 20  # rows of a long table
WIDTH = 150


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Args:
      path: module path.
      direction: `forward`, `backward` or `recomputed` (by `jax.checkpoint`).
      line: the source line.
      kind: its primitive.
      operands: their dtypes.
      accumulation: dtype that the product emits; its sums are at least as wide.
      output: dtype in which the result goes on: that of a cast that is its only reader.
      flops: of one call of the program.
      times: how often it runs in one call.
    """

    path: str
    direction: str
    line: str
    kind: str
    operands: tuple[str, str]
    accumulation: str
    output: str
    flops: int
    times: int


@dataclasses.dataclass(frozen=True)
class Leak:
    """Products that run wide, with what made them so.

    Args:
      mechanism: how a low value became wide, see `mpjax.interpret.audit.leaks.Cause`.
      line: the source line of the cause.
      path: module path of the cause.
      direction: `backward` if only gradients run wide.
      dtype: the wide dtype.
      origin: what was wide from the beginning, or was made wide on purpose.
      remedy: what to do.
      products: that it reaches.
      flops: of these products.
      share: of the FLOPs of all products.
    """

    mechanism: str
    line: str
    path: str
    direction: str
    dtype: str
    origin: str
    remedy: str
    products: tuple[Product, ...]
    flops: int
    share: float

    def __str__(self) -> str:
        where = self.path or "(no path)"
        if not self.products:  # inside an operation that is not walked
            start = f"{self.line}: {where}: {self.mechanism}: {self.dtype}"
            return f"{start} in {self.origin}; {self.remedy}"
        reached = dict.fromkeys(f"{p.path or '(no path)'} {short(p.line)}" for p in self.products)
        return (
            f"{self.line}: {where}: {self.mechanism}: {self.dtype} from {self.origin} reaches"
            f" {len(self.products)} products, {self.share:.1%} of the FLOPs"
            f" ({'; '.join(list(reached)[:4])}{' ...' * (len(reached) > 4)}); {self.remedy}"
        )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What operations cost, before any fusion.

    Args:
      products: FLOPs of matrix products and convolutions.
      others: FLOPs of everything else.
      bytes: read and written if every operation went through memory.
    """

    products: int = 0
    others: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What a program runs; `str` gives a table.

    Args:
      low: the low dtype of most product FLOPs; empty in a program that has none.
      by_dtype: cost by dtype: products by their wider operand, bytes by each array.
      by_path: the same by module path; the empty path is outside every module.
      products: each product of the program.
      leaks: wide products in a low program, by cause, the largest first.
      minor: leaks too small to matter, listed apart.
      double_casts: casts of what was cast just before, or was cast so already.
      dead_casts: casts without readers, or that are only cast straight back.
      low_reductions: sums whose operand and result are low.
      missing_donation: large inputs that a jitted function could donate.
      notes: what the figures leave out.
      compiled: what the optimised HLO of this backend holds, if that was asked for.
    """

    low: str
    by_dtype: dict[str, Cost]
    by_path: dict[str, dict[str, Cost]]
    products: tuple[Product, ...]
    leaks: tuple[Leak, ...]
    minor: tuple[Leak, ...]
    double_casts: tuple[Finding, ...]
    dead_casts: tuple[Finding, ...]
    low_reductions: tuple[Finding, ...]
    missing_donation: tuple[Undonated, ...]
    notes: tuple[str, ...]
    compiled: Optimised | None = None

    @property
    def flops(self) -> int:
        """FLOPs of all products."""
        return sum(product.flops for product in self.products)

    def share(self, dtype: str) -> float:
        """Returns the share of the product FLOPs whose wider operand has a dtype; 0 if none."""
        return self.by_dtype.get(dtype, Cost()).products / max(self.flops, 1)

    def to_dict(self) -> dict[str, Json]:
        """Returns all of it as JSON-able values."""
        found: dict[str, Json] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    def to_markdown(self) -> str:
        """Returns the tables in Markdown."""
        return as_markdown(self._sections(), self._summary())

    def __str__(self) -> str:
        return as_text(self._sections(), self._summary())

    __repr__ = __str__  # of use at a prompt, where thousands of products are not

    def _summary(self) -> list[str]:
        costs = self._by_products()
        shares = ", ".join(f"{self.share(d):.1%} {d}" for d, c in costs if c.products)
        said = f"product FLOPs {shares}" if shares else "no product of floating-point arrays"
        said = said if self.low or not shares else f"no low product: {said}"
        counts = (
            f"{len(self.leaks)} leaks, {len(self.minor)} minor leaks,"
            f" {len(self.double_casts)} double casts, {len(self.dead_casts)} dead casts,"
            f" {len(self.low_reductions)} low reductions,"
            f" {len(self.missing_donation)} undonated inputs"
        )
        lines = [f"Audit: {said}; {counts}", *self.notes]
        if self.compiled is not None and self.compiled.backend == "cpu":
            lines.append(
                "optimised HLO of CPU is no oracle of dtype: bfloat16 runs as float32 there"
            )
        return lines

    def _by_products(self) -> list[tuple[str, Cost]]:
        return sorted(self.by_dtype.items(), key=lambda item: -item[1].products)

    def _sections(self) -> list[Section]:
        donation = [(x.name, x.array, count(x.size)) for x in self.missing_donation]
        sections = [
            _leaks("Leaks", self.leaks),
            _leaks("Minor leaks", self.minor),
            self._dtypes(),
            self._paths(),
            self._products(),
            _findings("Double casts", self.double_casts),
            _findings("Dead casts", self.dead_casts),
            _findings("Reductions in low precision", self.low_reductions),
            Section("Missing donation", ("argument", "array", "bytes"), donation),
            *([_sent(self.compiled), _optimised(self.compiled)] if self.compiled else []),
        ]
        return [section for section in sections if section.rows]

    def _dtypes(self) -> Section:
        columns = ("dtype", "product FLOPs", "share", "other FLOPs", "bytes")
        rows = [_row(d, c, f"{self.share(d):.1%}") for d, c in self._by_products()]
        return Section("By dtype", columns, rows)

    def _paths(self) -> Section:
        rows = []
        for path, dtypes in self.by_path.items():
            total = sum(dtypes.values(), Cost())
            costs = {dtype: cost.products for dtype, cost in dtypes.items() if cost.products}
            shares = " ".join(f"{dtype} {n / total.products:.0%}" for dtype, n in costs.items())
            rows.append((total, _row(path or "(none)", total, shares)))
        rows.sort(key=lambda row: (-row[0].products, -row[0].bytes))
        columns = ("path", "product FLOPs", "in", "other FLOPs", "bytes")
        return Section("By module path", columns, [row for _, row in rows], SHOWN)

    def _products(self) -> Section:
        grouped: dict[tuple[str, ...], list[Product]] = {}
        for p in self.products:
            key = (p.path or "(none)", p.direction, short(p.line), " x ".join(p.operands),
                   p.accumulation, p.output)  # fmt: skip
            grouped.setdefault(key, []).append(p)
        summed = [
            (sum(p.flops for p in same), (*key, str(sum(p.times for p in same))))
            for key, same in grouped.items()
        ]
        summed.sort(key=lambda row: -row[0])
        columns = ("path", "direction", "line", "operands", "sums in", "goes on in", "times",
                   "FLOPs")  # fmt: skip
        return Section("Products", columns, [(*row, count(n)) for n, row in summed], SHOWN)


def _row(name: str, cost: Cost, shares: str) -> tuple[str, ...]:
    return name, count(cost.products), shares, count(cost.others), count(cost.bytes)


def _leaks(title: str, leaks: Sequence[Leak]) -> Section:
    columns = ("cause at", "path", "mechanism", "from", "products", "share", "remedy")
    rows = [
        (short(x.line), x.path, x.mechanism, short(x.origin),
         f"{len(x.products)} {x.direction}", f"{x.share:.1%}", x.remedy)
        for x in leaks
    ]  # fmt: skip
    return Section(title, columns, rows)


def _findings(title: str, found: Sequence[Finding]) -> Section:
    rows = [(short(f.what), f.path, f.direction, short(f.line), str(f.times)) for f in found]
    return Section(title, ("what", "path", "direction", "line", "times"), rows)


def _sent(found: Optimised) -> Section:
    grouped: dict[tuple[str, ...], list[Collective]] = {}
    for one in found.collectives:
        path = re.sub(r"/\d+(?=/|$)", "", one.path) or "(none)"
        key = (one.kind, one.dtype, one.axes, path, one.direction)
        grouped.setdefault(key, []).append(one)
    rows = [
        (
            sum(one.bytes * one.times for one in same),
            (*key, str(sum(one.times for one in same)),
             count(sum(one.elements * one.times for one in same))),
        )
        for key, same in grouped.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: -row[0])
    columns = ("collective", "dtype", "axes", "path", "direction", "times", "elements", "bytes")
    cells = [(*row, count(size)) for size, row in rows]
    return Section("Sent between devices", columns, cells, SHOWN)


def _optimised(found: Optimised) -> Section:
    kinds = {"product": found.products, "convert": found.converts, "instructions": found.dtypes}
    rows = [
        (kind, what, str(number))
        for kind, counted in kinds.items()
        for what, number in sorted(counted.items(), key=lambda item: -item[1])
    ]
    return Section(f"Optimised HLO on {found.backend}", ("kind", "what", "count"), rows, SHOWN)


class Section(NamedTuple):
    """A table with a title.

    Args:
      title: what it lists.
      columns: their names.
      rows: their cells.
      shown: how many rows are printed; 0 for all.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    shown: int = 0

    @property
    def visible(self) -> Sequence[tuple[str, ...]]:
        """The rows that are printed."""
        return self.rows[: self.shown] if self.shown else self.rows

    @property
    def caption(self) -> str:
        """The title, with how many rows are not printed."""
        hidden = len(self.rows) - len(self.visible)
        return f"{self.title} (the first {self.shown}, {hidden} more)" if hidden else self.title


def as_text(sections: Sequence[Section], head: Sequence[str]) -> str:
    """Returns the sections for a terminal, without colour codes."""
    # Plain text wherever it is printed: no HTML in a notebook, no colour codes in a file.
    console = Console(
        file=io.StringIO(), width=WIDTH, force_jupyter=False, force_terminal=False, markup=False,
        highlight=False,
    )  # fmt: skip
    for section in sections:
        table = Table(box=box.SIMPLE, title=section.caption, title_justify="left")
        for column in section.columns:
            table.add_column(column, overflow="fold")
        for row in section.visible:
            table.add_row(*row)
        console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join([*head, *(line.rstrip() for line in lines if line.strip())])


def as_markdown(sections: Sequence[Section], head: Sequence[str]) -> str:
    """Returns the sections in Markdown."""
    parts = list(head)
    for section in sections:
        cells = markdown.table(section.columns, section.visible)
        parts.append(f"## {section.caption}\n\n{cells}")
    return "\n\n".join(parts)


def count(number: float) -> str:
    """Returns a number with three digits and a unit.

    Example:
      >>> count(999), count(1234567)
      ('999', '1.23 M')
    """
    for unit in ("", " k", " M", " G", " T"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} P"


def short(text: str) -> str:
    """Returns a text with the folders left out of the source lines in it.

    Example:
      >>> short("a constant at /a/b/model.py:12 (f)")
      'a constant at model.py:12 (f)'
    """
    return " ".join(word.rsplit("/", 1)[-1] if ".py:" in word else word for word in text.split(" "))
