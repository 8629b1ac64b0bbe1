"""Temperatures of simulated annealing, by the number of proposals since it began."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.optim.checks import check_positive, check_whole, is_number
from mpjax.typing import Array, ArrayLike

# proposals since the start or the last reheating -> temperature, in units of the loss
Cooling: TypeAlias = Callable[[ArrayLike], Array]


def affine(start: float, factor: float, plus: float = 0.0) -> Cooling:
    r"""Returns the cooling $T_{t+1} = a T_t + b$.

    $$T_t = a^t T_0 + b\,\frac{1 - a^t}{1 - a}$$ tends to $b / (1 - a)$; with $b = 0$ it is
    geometric. It is computed in this form, so that no rounding adds up over the steps.

    Args:
      start: $T_0$, in units of the loss.
      factor: $a$, in (0, 1]; 1 keeps the temperature.
      plus: $b$.

    Raises:
      ConfigError: a temperature that is not positive, or one that would grow without end.

    Example:
      >>> [round(float(affine(1.0, 0.5, 0.1)(t)), 3) for t in (0, 1, 2, 1000)]
      [1.0, 0.6, 0.4, 0.2]

    References:
      Kirkpatrick et al. 1983, Optimization by Simulated Annealing.
    """
    check_positive("cooling", "start", start)
    if not (is_number(factor) and 0 < factor <= 1):
        raise ConfigError(
            f"cooling: factor={brief(factor)} is not in 0 to 1; give 0.999 to cool, 1 to stay"
        )
    if not (is_number(plus) and 0 <= plus < math.inf):
        raise ConfigError(f"cooling: plus={brief(plus)} is not 0 or a positive number")
    if factor == 1 and plus > 0:
        raise ConfigError(
            f"cooling: factor=1 with plus={plus:g} heats without end; give a factor below 1"
        )
    limit = plus / (1 - factor) if factor < 1 else start
    rate = math.log(factor)  # of float64: float32 would keep a thousandth of 1 - a

    def temperature(age: ArrayLike) -> Array:
        power = jnp.exp(jnp.asarray(age, jnp.float32) * jnp.float32(rate))
        return jnp.float32(start - limit) * power + jnp.float32(limit)

    return temperature


def logarithmic(start: float) -> Cooling:
    r"""Returns the cooling $T_t = T_0 \ln 2 / \ln(t + 2)$.

    Args:
      start: $T_0$, in units of the loss.

    Raises:
      ConfigError: a temperature that is not positive.

    Example:
      >>> [round(float(logarithmic(1.0)(t)), 3) for t in (0, 2, 14)]
      [1.0, 0.5, 0.25]

    References:
      Geman and Geman 1984, Stochastic Relaxation, Gibbs Distributions, and the Bayesian
      Restoration of Images, section XII.
    """
    check_positive("cooling", "start", start)

    def temperature(age: ArrayLike) -> Array:
        return jnp.float32(start * math.log(2)) / jnp.log(jnp.asarray(age, jnp.float32) + 2)

    return temperature


def cosine(start: float, steps: int, end: float = 0.0) -> Cooling:
    r"""Returns the cooling $T_t = T_1 + \frac{T_0 - T_1}{2}(1 + \cos(\pi \min(t / n, 1)))$.

    At temperature 0 no worse weights are accepted.

    Args:
      start: $T_0$, in units of the loss.
      steps: $n$, proposals until the end.
      end: $T_1$.

    Raises:
      ConfigError: a temperature that is not positive, or fewer than one step.

    Example:
      >>> [round(float(cosine(1.0, 100)(t)), 3) for t in (0, 50, 100, 200)]
      [1.0, 0.5, 0.0, 0.0]
    """
    check_positive("cooling", "start", start)
    if not (is_number(end) and 0 <= end < math.inf):
        raise ConfigError(f"cooling: end={brief(end)} is not 0 or a positive number")
    check_whole("cooling", "steps", steps, 1)

    def temperature(age: ArrayLike) -> Array:
        share = jnp.minimum(jnp.asarray(age, jnp.float32) / jnp.float32(steps), 1)
        half = jnp.float32((start - end) / 2)
        return jnp.float32(end) + half * (1 + jnp.cos(jnp.float32(math.pi) * share))

    return temperature
