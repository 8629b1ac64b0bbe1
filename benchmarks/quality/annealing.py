"""Annealing against its laws and against gradient descent.

Run:       python -m benchmarks.quality.annealing
Expected:  corrected samples follow the Boltzmann law and uncorrected ones do not; a hybrid reaches
           the global basin of Rastrigin's function in ten dimensions in at least 80 % of 50 seeds,
           where the best of the tuned gradient methods reaches it in at most 20 %.

A double well $(x^2 - 1)^2$ is sampled at temperature 0.4 by 100,000 chains of 250 steps, and
compared with the law by Kolmogorov and Smirnov. Rastrigin's function has $11^{10}$ minima in the
cube where the seeds begin; all methods have 6,000 evaluations, a proposal and a gradient being one
each. Descent has 24 settings, of which the best counts; the hybrid has one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax

from benchmarks.common.page import write
from mpjax.markdown import table
from mpjax.optim import wrap
from mpjax.optim.annealing import Annealing, affine, alternate, annealed, gaussian
from tests.optim.annealing.test_boltzmann import sampled

SEEDS, SIZE, EVALUATIONS = 50, 10, 6000


def rastrigin(x: jax.Array) -> jax.Array:
    """Rastrigin's function; 0 at the origin, a minimum near every point of whole numbers."""
    return 10.0 * x.size + jnp.sum(jnp.square(x) - 10 * jnp.cos(2 * jnp.pi * x))


def reached(optimizer: optax.GradientTransformation | Annealing) -> float:
    """The share of seeds that end in the basin of the global minimum."""
    opt = wrap(optimizer, "fp32")
    value_and_grad = jax.value_and_grad(rastrigin)

    def step(carry: Any, _: None) -> Any:
        x, state = carry
        value, grads = value_and_grad(x)
        x, state = opt.step(
            grads, state, x, value=value, evaluate=lambda x, _: (rastrigin(x), None)
        )
        return (x, state), None

    def run(seed: jax.Array) -> jax.Array:
        begin = jax.random.uniform(jax.random.key(seed), (SIZE,), minval=-5.12, maxval=5.12)
        first = (begin, opt.init(begin, seed))
        return jax.lax.scan(step, first, None, EVALUATIONS)[0][0]

    ends = jax.jit(jax.vmap(run))(jnp.arange(SEEDS))
    return float(jnp.mean(jnp.all(jnp.abs(ends) < 0.5, axis=1)))


def descents() -> dict[str, optax.GradientTransformation]:
    """Gradient methods by their settings."""
    found: dict[str, optax.GradientTransformation] = {}
    for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3):
        found[f"descent {rate:g}"] = optax.sgd(rate)
        found[f"momentum 0.9, {rate:g}"] = optax.sgd(rate, momentum=0.9)
        found[f"Adam {rate:g}"] = optax.adam(rate)
    return found


def main() -> bool:
    """Measures and writes the page; whether every bar is met."""
    ways = sampled(100_000)
    bars = ["p > 0.01", "p > 0.01", "p < 1e-6", "p < 1e-6"]
    met = [p > 0.01 for p in [*ways.values()][:2]] + [p < 1e-6 for p in [*ways.values()][2:]]
    laws = [
        [name, f"{p:.2g}", bar, "met" if ok else "missed"]
        for (name, p), bar, ok in zip(ways.items(), bars, met, strict=True)
    ]
    judged = annealed(gaussian(0.3, share=0.1, least=1.0), affine(2.0, 0.999))
    hybrid = reached(alternate(optax.sgd(1e-3), judged, descend=1, anneal=2))
    alone = reached(judged)
    found = {name: reached(optimizer) for name, optimizer in descents().items()}
    best = max(found, key=lambda name: found[name])
    rows = [
        ["a gradient step, two proposals, and so on", f"{hybrid:.0%}", ">= 80 %"],
        ["proposals alone", f"{alone:.0%}", ""],
        [f"the best of {len(found)} descents: {best}", f"{found[best]:.0%}", "<= 20 %"],
    ]
    body = (__doc__ or "").split("\n\nRun:")[0] + "\n\n" + (__doc__ or "").split("%.\n\n")[-1]
    body += "\n## The Boltzmann law\n\n"
    body += table(["samples", "p of Kolmogorov and Smirnov", "bar", ""], laws)
    body += "\n\n## Rastrigin's function\n\n"
    body += table(["method", f"seeds of {SEEDS} in the global basin", "bar"], rows)
    write("annealing", "Annealing follows its law, and leaves local minima", body)
    return all(met) and hybrid >= 0.8 and found[best] <= 0.2


if __name__ == "__main__":
    sys.exit(not main())
