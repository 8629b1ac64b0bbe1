"""Accuracy by slice: whom a low precision hurts, which an average hides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpjax.errors import ConfigError
from mpjax.report.results import interval


@dataclasses.dataclass(frozen=True)
class SliceGap:
    """One slice of the held-out examples in two arms.

    Args:
      name: of the slice.
      count: examples.
      accuracy: of the arm, mean over seeds, in 0 ... 1.
      reference: of the arm that it is compared with.
      gap: accuracy minus reference.
      half: half-width of the gap's 95 % interval over the slice's examples.
    """

    name: str
    count: int
    accuracy: float
    reference: float
    gap: float
    half: float

    @property
    def hurt(self) -> bool:
        """Whether the whole interval of the gap is below zero."""
        return self.gap + self.half < 0


def length_slices(lengths: Sequence[int], parts: int = 4, unit: str = "tokens") -> list[str]:
    """Returns the slice of each example by its length: quantiles, so that slices are alike in size.

    Example:
      >>> length_slices([1, 2, 3, 10], parts=2)
      ['1-2 tokens', '1-2 tokens', '3-10 tokens', '3-10 tokens']
    """
    sizes = np.asarray(lengths)
    edges = np.quantile(sizes, np.linspace(0, 1, parts + 1)[1:-1])
    of = np.searchsorted(edges, sizes)
    spans = {part: (sizes[of == part].min(), sizes[of == part].max()) for part in np.unique(of)}
    return [f"{spans[part][0]}-{spans[part][1]} {unit}" for part in of]


def slice_gaps(correct: Any, reference: Any, slices: Sequence[str]) -> list[SliceGap]:
    r"""Compares two arms on each slice of the same examples, the same seeds.

    The difference of an example is its mean over the seeds; the interval is Student's t over the
    examples of the slice, so that it says what other examples of the kind would show, with these
    weights. With many slices some intervals leave zero by chance: one in twenty.

    Args:
      correct: (seeds, examples) bool, whether each example is right; (examples,) of one seed.
      reference: the same of the reference arm.
      slices: name of each example's slice.

    Returns:
      A `SliceGap` for all, then for each slice in the order of its name, numbers as numbers.

    Raises:
      ConfigError: shapes that do not pair.

    Example:
      >>> right, worse = [[True] * 6], [[True] * 3 + [False, True, False]]
      >>> [(s.name, round(s.gap, 3)) for s in slice_gaps(worse, right, list("aaabbb"))]
      [('all', -0.333), ('a', 0.0), ('b', -0.667)]
    """
    own, other = (np.atleast_2d(np.asarray(x, np.float64)) for x in (correct, reference))
    if own.shape != other.shape or own.shape[1] != len(slices):
        raise ConfigError(
            f"slices: {own.shape} and {other.shape} outcomes of {len(slices)} examples; seeds and"
            " examples must pair"
        )
    names, difference = np.asarray(slices), (own - other).mean(0)
    chosen = {"all": np.ones(len(names), bool)}
    chosen |= {name: names == name for name in sorted(set(slices), key=_natural)}
    return [
        SliceGap(
            name, int(where.sum()), own[:, where].mean(), other[:, where].mean(),
            *interval(difference[where]),
        )
        for name, where in chosen.items()
    ]  # fmt: skip


def _natural(name: str) -> list[Any]:
    """Texts and numbers by turns, so that 9 stands before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def slice_cells(gaps: Sequence[SliceGap]) -> list[tuple[str, ...]]:
    """Returns the cells of a table: slice, examples, accuracy of both in percent, gap in points."""
    return [
        (
            g.name, str(g.count), f"{100 * g.accuracy:.2f}", f"{100 * g.reference:.2f}",
            f"{100 * g.gap:+.2f} ± {100 * g.half:.2f}{' *' if g.hurt else ''}",
        )
        for g in gaps
    ]  # fmt: skip
