"""Samples of annealing at one temperature follow the Boltzmann law of a double well."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from mpjax.optim import wrap
from mpjax.optim.annealing import affine, annealed, gaussian, langevin

HEAT, RATE, STEPS = 0.4, 0.08, 250


def well(x: Any) -> Any:
    return jnp.square(jnp.square(x) - 1)


def chains(annealing: Any, count: int) -> np.ndarray:
    """The last weight of chains with keys of their own."""
    opt = wrap(annealing, "fp32")
    grad = jax.value_and_grad(well)

    def step(carry: Any, _: Any) -> Any:
        x, state = carry
        value, g = grad(x)
        x, state = opt.step(g, state, x, value=value, evaluate=lambda x, _: grad(x))
        return (x, state), None

    def chain(x: Any, key: Any) -> Any:
        state = opt.init(x)
        state = state._replace(inner=state.inner._replace(key=jax.random.key_data(key)))
        return jax.lax.scan(step, (x, state), None, STEPS)[0][0]

    keys = jax.random.split(jax.random.key(1), count)
    # Far out the gradient is steep, and a Langevin proposal overshoots for ever.
    first = jax.random.uniform(jax.random.key(2), (count,), minval=-1.6, maxval=1.6)
    return np.asarray(jax.jit(jax.vmap(chain))(first, keys))


def boltzmann(x: np.ndarray) -> float:
    """p of the Kolmogorov-Smirnov test against exp(-V / T), integrated in float64."""
    grid = np.linspace(-4, 4, 200_001)
    total = np.cumsum(np.exp(-((grid**2 - 1) ** 2) / HEAT))
    return float(stats.kstest(x, lambda v: np.interp(v, grid, total / total[-1])).pvalue)


def sampled(count: int) -> dict[str, float]:
    """p of each way of sampling; the last two are controls."""
    constant = affine(HEAT, 1.0)
    exact = annealed(langevin(RATE), constant, keep_best=False)
    blind = langevin(RATE)._replace(log_density=None)
    ways = {
        "langevin": exact,
        "gaussian": annealed(gaussian(0.5, least=1.0), constant, keep_best=False),
        "langevin, judged as if it were symmetric": dataclasses.replace(exact, proposal=blind),
        "langevin, never judged": dataclasses.replace(exact, metropolis=False),
    }
    return {name: boltzmann(chains(way, count)) for name, way in ways.items()}


def test_corrected_samples_follow_the_law_and_others_do_not() -> None:
    exact, symmetric, blind, free = sampled(20_000).values()
    assert exact > 0.01 and symmetric > 0.01
    assert blind < 1e-6 and free < 1e-6
