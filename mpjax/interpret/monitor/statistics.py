"""Statistics of a tensor: shares, means and losses by format, from what was measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError
from mpjax.interpret.monitor import measure
from mpjax.interpret.monitor.measure import EXPONENTS, Candidate
from mpjax.typing import Array, ArrayLike


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("counts", "reals"), meta_fields=("formats",)
)
@dataclasses.dataclass(frozen=True)
class Statistics:
    r"""Statistics of a tensor, or of the same tensor in each layer along a leading axis.

    Args:
      counts: histogram, zeros, NaNs, and for each candidate underflows and overflows; uint32, so
        of at most $2^{32} - 1$ numbers.
      reals: largest number, largest magnitude, mean, root mean square, and for each candidate the
        root mean square of its error.
      formats: the candidates.

    Example:
      >>> s = statistics(jnp.array([0.0, 1e-4, 1.0, 600.0]), ["e4m3"])
      >>> float(s.amax), float(s.zeros), float(s.underflow("e4m3")), float(s.overflow("e4m3"))
      (600.0, 0.25, 0.25, 0.25)
    """

    counts: Array
    reals: Array
    formats: tuple[Candidate, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Sizes of the leading axes, one for each scan over layers around the tensor."""
        return tuple(self.counts.shape[:-1])

    @property
    def size(self) -> Array:
        """How many numbers were measured."""
        return self.counts[..., :EXPONENTS].sum(-1)

    @property
    def histogram(self) -> Array:
        r"""Counts of $2^e \le |x| < 2^{e+1}$ for e = -126 .. 127, (..., 254)."""
        return self.counts[..., 1 : EXPONENTS - 1]

    @property
    def zeros(self) -> Array:
        """Share of zeros."""
        return self.counts[..., measure.ZEROS] / self.size

    @property
    def subnormal(self) -> Array:
        r"""Share of $0 < |x| < 2^{-126}$."""
        return (self.counts[..., 0] - self.counts[..., measure.ZEROS]) / self.size

    @property
    def nan(self) -> Array:
        """Share of NaNs."""
        return self.counts[..., measure.NANS] / self.size

    @property
    def infinite(self) -> Array:
        """Share of infinities."""
        return (self.counts[..., EXPONENTS - 1] - self.counts[..., measure.NANS]) / self.size

    @property
    def max(self) -> Array:
        """Largest finite number."""
        return self.reals[..., measure.MAX]

    @property
    def amax(self) -> Array:
        """Largest finite magnitude."""
        return self.reals[..., measure.AMAX]

    @property
    def mean(self) -> Array:
        """Mean of the finite numbers."""
        return self.reals[..., measure.MEAN]

    @property
    def rms(self) -> Array:
        """Root mean square of the finite numbers."""
        return self.reals[..., measure.RMS]

    def _place(self, format: str, scaled: bool) -> int:
        wanted = Candidate(format, scaled)
        if wanted not in self.formats:
            known = " ".join(dict.fromkeys(c.name for c in self.formats if c.scaled >= scaled))
            raise ConfigError(
                f"statistics: {format!r} was not measured{' with a scale' * scaled}; measured:"
                f" {known or 'none'}; name it in monitor(..., formats=[...])"
            )
        return self.formats.index(wanted)

    def underflow(self, format: str, scaled: bool = False) -> Array:
        """Returns the share of numbers that are not zero and become zero in a format.

        Args:
          format: one of those that were measured.
          scaled: with one scale for the tensor.
        """
        return self.counts[..., measure.FIRST + 2 * self._place(format, scaled)] / self.size

    def overflow(self, format: str, scaled: bool = False) -> Array:
        """Returns the share of numbers beyond the format's largest, infinities among them."""
        return self.counts[..., measure.FIRST + 1 + 2 * self._place(format, scaled)] / self.size

    def sqnr(self, format: str, scaled: bool = False) -> np.ndarray:
        """Returns the ratio of signal to rounding noise in dB, inf where nothing was lost."""
        noise = np.asarray(self.reals[..., measure.NOISE + self._place(format, scaled)], np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 20 * np.log10(np.asarray(self.rms, np.float64) / noise)
        return np.where(noise == 0, np.inf, ratio)


def statistics(x: ArrayLike, formats: Sequence[str] = ()) -> Statistics:
    """Returns the statistics of one array.

    Args:
      x: floating-point, any shape.
      formats: names of the formats that it might be stored in.
    """
    found = measure.candidates(formats)
    (pair,) = measure.measure([(jnp.asarray(x), False)], found)
    return Statistics(*pair, found)
