"""Annealing: the Boltzmann law of a double well, rejections, hybrids, precisions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.optim import pruned, wrap
from mpjax.optim.annealing import (
    affine,
    alternate,
    anneal_then_descend,
    annealed,
    cosine,
    gaussian,
    langevin,
    logarithmic,
    random_rate,
)

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize(("a", "b"), [(0.999, 0.0), (0.99, 0.002), (0.5, 0.1), (1.0, 0.0)])
def test_affine_cooling_is_its_recursion(a: float, b: float) -> None:
    temperature, cooling = 2.0, affine(2.0, a, b)
    for step in range(1001):
        if step in (0, 1, 10, 1000):
            assert float(cooling(jnp.int32(step))) == pytest.approx(temperature, rel=1e-5, abs=1e-9)
        temperature = a * temperature + b
    # what it would be with a rounded to float32 is further away
    if a == 0.999:
        naive = 2.0 * np.float32(a).astype(np.float64) ** 1000
        assert abs(naive - float(cooling(1000))) > 1e-6


def test_the_other_coolings() -> None:
    steps = np.array([0, 1, 7, 50, 100, 1000])
    right = 3.0 * np.log(2) / np.log(steps + 2.0)
    np.testing.assert_allclose([logarithmic(3.0)(t) for t in steps], right, rtol=1e-6)
    share = np.minimum(steps / 100, 1)
    right = 0.5 + (3.0 - 0.5) / 2 * (1 + np.cos(np.pi * share))
    np.testing.assert_allclose([cosine(3.0, 100, 0.5)(t) for t in steps], right, rtol=1e-6)


def test_mistakes_are_one_line() -> None:
    cooling, proposal = affine(1.0, 0.9), gaussian(0.1)
    for call, message in (
        (lambda: affine(0.0, 0.9), "start=0.0 is not a positive number"),
        (lambda: affine(1.0, 1.1), "factor=1.1 is not in 0 to 1; give 0.999 to cool"),
        (lambda: affine(1.0, 1.0, 0.1), "factor=1 with plus=0.1 heats without end"),
        (lambda: affine(1.0, 0.9, -0.1), "plus=-0.1 is not 0 or a positive number"),
        (lambda: cosine(1.0, 0), "steps=0 is not a whole number"),
        (lambda: logarithmic(-1), "start=-1 is not a positive number"),
        (lambda: gaussian("big"), "scale='big' is not a positive number"),  # type: ignore[arg-type]
        (lambda: random_rate([]), "is no list of learning rates"),
        (lambda: random_rate([0.1, 0.0]), "rates=0.0 is not a positive number"),
        (lambda: langevin(float("nan")), "learning_rate=nan is not a positive number"),
        (lambda: annealed(0.1, cooling), "0.1 is no optax optimizer"),  # type: ignore[arg-type]
        (lambda: annealed(proposal, 0.9), "0.9 is no function of the number"),  # type: ignore[arg-type]
        (lambda: annealed(proposal, cooling, reheat=-1), "reheat: -1 is not a whole number"),
        (lambda: alternate(optax.sgd(0.1), annealed(proposal, cooling), descend=0, anneal=1),
         "descend=0 is not a whole number of 1 or above"),
        (lambda: anneal_then_descend(optax.sgd(1), optax.sgd(1), after=1),  # type: ignore[arg-type]
         "is not what annealed"),
        (lambda: alternate(pruned(optax.sgd(0.1), 0.5), annealed(proposal, cooling), descend=1,
                           anneal=1), "moves pruned weights away from 0"),
        (lambda: wrap(annealed(proposal, cooling), "fp32").as_optax(), "use Optimizer.step"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    opt, w = wrap(annealed(proposal, cooling), "fp32"), jnp.ones(2)
    with pytest.raises(ConfigError, match="needs the loss and a function to judge new weights"):
        opt.step(w, opt.init(w), w)
