"""How far a student's distribution is from a teacher's, in float32, whatever their dtypes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.typing import Array

KINDS = ("forward", "reverse", "jensen-shannon")


def check_divergence(kind: str, temperature: float, mix: float) -> None:
    """Checks the settings of a divergence.

    Raises:
      ConfigError: an unknown kind, a temperature that is not positive, a mix outside (0, 1).
    """
    if kind not in KINDS:
        raise ConfigError(f"divergence: unknown kind {brief(kind)}; known: {' '.join(KINDS)}")
    for name, value, most in (("temperature", temperature, math.inf), ("mix", mix, 1.0)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < most):
            where = "a positive number" if most == math.inf else "between 0 and 1"
            raise ConfigError(f"divergence: {name}={brief(value)} is not {where}")


def divergence(
    student: Array,
    teacher: Array,
    *,
    temperature: float = 1.0,
    kind: str = "forward",
    mix: float = 0.5,
) -> Array:
    r"""Returns $\tau^2 D$ of a teacher's distributions $p$ and a student's $q$, a number each.

    With $p = \mathrm{softmax}(t / \tau)$ and $q = \mathrm{softmax}(s / \tau)$, `forward` is
    $\sum_v p_v \ln (p_v / q_v)$, `reverse` $\sum_v q_v \ln (q_v / p_v)$, and `jensen-shannon`
    $\beta\,\mathrm{KL}(p \| m) + (1 - \beta)\,\mathrm{KL}(q \| m)$ with $m = \beta p + (1 - \beta)
    q$. The factor $\tau^2$ keeps the size of the gradient, whatever the temperature. All of it is
    float32: a softmax at temperature 4 in bfloat16 loses its tail.

    Args:
      student: logits $s$, (..., V).
      teacher: logits $t$, (..., V); no gradient goes to them.
      temperature: $\tau$.
      kind: which divergence.
      mix: $\beta$ of `jensen-shannon`.

    Returns:
      (...), float32, 0 or above.

    Raises:
      ConfigError: logits of two shapes, or what `check_divergence` raises.

    Example:
      >>> s, t = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(divergence(s, t)), 4), round(float(divergence(s, t, kind="reverse")), 4)
      (0.1308, 0.1438)

    References:
      Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2; Agarwal et al.
      2024, On-Policy Distillation of Language Models, equation 1.
    """
    check_divergence(kind, temperature, mix)
    if student.shape != teacher.shape:
        raise ConfigError(
            f"divergence: the student's logits have shape {student.shape}, the teacher's"
            f" {teacher.shape}; both need one vocabulary and one batch"
        )
    cool = jnp.float32(1 / temperature)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) * cool)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) * cool)
    return jnp.float32(temperature**2) * between(log_q, log_p, kind, mix)


def between(log_q: Array, log_p: Array, kind: str, mix: float) -> Array:
    """Returns the divergence of distributions that are given as logarithms, (..., V) -> (...).

    Args:
      log_q: the student's, float32; -inf leaves a class out.
      log_p: the teacher's.
      kind: which divergence.
      mix: of `jensen-shannon`.
    """

    def relative(log_a: Array, log_b: Array) -> Array:
        a = jnp.exp(log_a)
        # A logit of -inf leaves its class out: 0 ln 0 is 0, and so is its gradient.
        return jnp.sum(a * jnp.where(a > 0, log_a - log_b, 0.0), axis=-1)

    if kind == "forward":
        return relative(log_p, log_q)
    if kind == "reverse":
        return relative(log_q, log_p)
    neither = (log_p == -jnp.inf) & (log_q == -jnp.inf)  # whose derivative would be NaN
    a, b = (jnp.where(neither, 0.0, x) for x in (log_p, log_q))
    log_m = jnp.logaddexp(a + math.log(mix), b + math.log1p(-mix))
    return mix * relative(log_p, log_m) + (1 - mix) * relative(log_q, log_m)
