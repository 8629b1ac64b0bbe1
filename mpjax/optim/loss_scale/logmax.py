"""A loss scale from the statistics of the largest gradient, which acts before an overflow."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mpjax.errors import ConfigError, explains_calls
from mpjax.formats import Format
from mpjax.formats.format_table import FormatLike
from mpjax.optim.loss_scale.scalers import StaticLossScale, as_flag, as_pytree, rebuild
from mpjax.precision import LossScaleSettings
from mpjax.typing import Grads, Metrics, PyTree


def largest(tree: PyTree) -> Float[Array, ""]:
    """Returns the largest magnitude of a tree of floating-point arrays, float32; 0 without any.

    Example:
      >>> largest({"a": jnp.array([1.0, -3.0]), "b": jnp.zeros(2, jnp.float16)}).item()
      3.0
    """
    leaves = [
        jnp.max(jnp.abs(x)).astype(jnp.float32)
        for x in jax.tree.leaves(tree)
        if x.size and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.float32(0)


@as_pytree
class LogMaxLossScale(StaticLossScale):
    r"""The largest scale that keeps the largest gradient below a format's largest number $M$.

    From each finite step with $a = \max|g| > 0$ over all unscaled weight gradients
    ($x = \log_2 a$, $n$ such steps so far, $\rho = \max(1/n, 1 - \text{decay})$, $d = x - \mu$):

    $$\mu \leftarrow \mu + \rho d, \qquad v \leftarrow (1 - \rho)(v + \rho d^2)$$
    $$\log_2 s = \log_2 M - \mu - c \sqrt{v + \rho} - h$$

    rounded down to a power of two and kept between the bounds. $\mu$ and $v$ are the plain mean
    and variance of the first $1 / (1 - \text{decay})$ steps and decay exponentially from then on.
    $\rho$ beside $v$ widens the margin while few steps have been seen, by one bit at the first;
    with it and $c \ge 2$ no gradient overflows whose logarithm grows linearly, by at most $c$ bits
    a step.

    It reads weight gradients; the cotangents of activations may be larger. So a non-finite step
    multiplies the scale by `backoff_factor` and leaves the difference in the headroom $h$, which
    shrinks by $\log_2$ `growth_factor` after `growth_interval` finite steps in a row. A step whose
    gradients are all zero gives no information: the scale is multiplied by `growth_factor`.

    Args:
      format: name of the format that the gradients must fit in.
      deviations: $c$.
      decay: of mean and variance; 0.99 remembers about 100 steps.
      init: first scale, before any gradient has been seen.
      growth_factor: of the headroom's release, > 1.
      backoff_factor: at a non-finite step, < 1.
      growth_interval: finite steps in a row between releases.
      min_scale: lower bound.
      max_scale: upper bound.
      power_of_two: False leaves the scale unrounded; unscaling is then not exact.

    Raises:
      ConfigError: a value outside its range; `adjust` without the gradients.

    Example:
      >>> scale = LogMaxLossScale("float16", deviations=4.0)
      >>> scale.adjust(jnp.bool_(True), {"w": jnp.array([2.0**-10])}).value.item() == 2.0**21
      True

    References:
      Kuchaiev et al. 2018, Mixed-Precision Training for NLP and Speech Recognition with
      OpenSeq2Seq (LogMax: mean and deviation of log2 of the largest gradient, decays 0.99 and
      0.999, c = 3.09); Noune et al. 2022, 8-bit Numerical Formats for Deep Neural Networks
      (compares it with backing off). $\rho$ and $h$ are ours.
    """

    names = ("scale", "good_steps", "mean", "variance", "seen", "headroom")

    @explains_calls
    def __init__(
        self,
        format: FormatLike = "float16",
        deviations: int | float = 4.0,
        decay: int | float = 0.99,
        init: int | float = 1.0,
        growth_factor: int | float = 2.0,
        backoff_factor: int | float = 0.5,
        growth_interval: int = 2000,
        min_scale: int | float = 1.0,
        max_scale: int | float = 2.0**24,
        power_of_two: bool = True,
    ) -> None:
        bounds = {"min_scale": min_scale, "max_scale": max_scale}
        own = {"deviations": deviations, "decay": decay, "power_of_two": power_of_two}
        name = Format.of(format).name
        factors = growth_factor, backoff_factor, growth_interval
        self._begin("logmax", init, *factors, format=name, **bounds, **own)

    @staticmethod
    def first_state(settings: LossScaleSettings) -> tuple[Array, ...]:
        # An array each: the state is donated.
        zeros = [jnp.float32(0) for _ in range(3)]
        return jnp.float32(settings.init), jnp.int32(0), *zeros[:2], jnp.int32(0), zeros[2]

    def adjust(self, finite: Bool[Array, ""] | bool, grads: Grads = None) -> LogMaxLossScale:
        finite = as_flag(finite)
        if grads is None:
            raise ConfigError(
                "loss scale: logmax reads the gradients; write scale.adjust(finite, grads) with"
                " the unscaled ones"
            )
        s = self.settings
        scale, good, mean, variance, steps, headroom = self.state
        amax = largest(grads)
        told = finite & (amax > 0)
        # After that many steps the exponential decay has the larger weight, for good.
        steps = jnp.where(told, jnp.minimum(steps + 1, math.ceil(1 / (1 - s.decay))), steps)
        rate = jnp.maximum(1 / jnp.maximum(steps, 1).astype(jnp.float32), 1 - s.decay)
        off = jnp.where(told, jnp.log2(jnp.where(told, amax, 1)) - mean, 0)
        mean = mean + rate * off
        variance = jnp.where(told, (1 - rate) * (variance + rate * off * off), variance)
        ceiling = math.log2(Format(s.format).max) - mean
        ceiling = ceiling - s.deviations * jnp.sqrt(variance + rate)

        good = jnp.where(finite, good + 1, 0)
        release = good >= s.growth_interval
        eased = jnp.maximum(headroom - math.log2(s.growth_factor), 0)
        lowered = jnp.maximum(scale * s.backoff_factor, s.min_scale)
        raised = jnp.where(steps > 0, jnp.maximum(headroom, ceiling - jnp.log2(lowered)), headroom)
        headroom = jnp.where(finite, jnp.where(release, eased, headroom), raised)

        exponent = jnp.clip(ceiling - headroom, -126.0, 127.0)  # of normal float32 numbers
        if s.power_of_two:  # from its bits: `exp2` need not be exact
            field = (jnp.floor(exponent).astype(jnp.int32) + 127) << 23
            wanted = jax.lax.bitcast_convert_type(field, jnp.float32)
        else:
            wanted = jnp.exp2(exponent)
        wanted = jnp.clip(wanted, s.min_scale, s.max_scale)
        grown = jnp.minimum(scale * s.growth_factor, s.max_scale)
        scale = jnp.where(finite, jnp.where(amax > 0, wanted, grown), lowered)
        state = (scale, jnp.where(release, 0, good), mean, variance, steps, headroom)
        return rebuild(type(self), s, state, self.owned)

    def at_minimum(self, grads: Grads = None) -> Bool[Array, ""]:
        del grads
        return self.value <= self.settings.min_scale

    def metrics(self) -> Metrics:
        _, _, mean, variance, _, headroom = self.state
        return {
            "loss_scale": self.value,
            "log2_gradient_mean": mean,
            "log2_gradient_deviation": jnp.sqrt(variance),
            "loss_scale_headroom": headroom,
        }
