"""Optimizers that subtract one moment from another, or divide by one: with low moments too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from mpjax.errors import ConfigError
from mpjax.optim import quantize_moments
from mpjax.optim.moments.low_moments import widen
from mpjax.precision import Moments

pytestmark = pytest.mark.usefixtures("fast_compile")

# name -> optimizer, moments, and how far the loss may be from float32's
CASES: dict[str, tuple[Any, str, float]] = {
    "centered": (lambda: optax.rmsprop(0.02, centered=True), "int8@64", 0.1),
    "centered, 4 bits": (lambda: optax.rmsprop(0.02, centered=True), "int4@64", 0.4),
    "centered, first": (lambda: optax.rmsprop(0.02, centered=True), "first=int8@64", 0.1),
    "centered, second": (lambda: optax.rmsprop(0.02, centered=True), "second=bf16", 0.1),
    "centered, nearest": (
        lambda: optax.rmsprop(0.02, centered=True), "int8@64,rounding=nearest", 0.1,
    ),
    "adopt divides by the last": (lambda: contrib.adopt(0.02), "int8@64", 0.1),
    "adabelief": (lambda: optax.adabelief(0.02), "e4m3@64", 0.2),
}  # fmt: skip
SHAPE, STEPS = (8, 64), 200


@pytest.fixture(scope="module")
def losses() -> dict[str, tuple[float, float, Any]]:
    """Loss at the end in low moments and in float32, on a quadratic with noisy gradients."""
    rng = np.random.default_rng(0)
    h = jnp.asarray(10.0 ** rng.uniform(-1, 0, SHAPE), jnp.float32)
    start = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    low, exact = {}, {}
    for name, (make, text, _) in CASES.items():
        m = Moments.parse(text)
        low[name] = quantize_moments(make(), first=m.first, second=m.second, rounding=m.rounding)
        exact[name] = make()
    runs = [*low.values(), *exact.values()]

    def body(carry: Any, n: Any) -> Any:
        noise = 0.3 * h * jax.random.normal(jax.random.fold_in(jax.random.key(1), n), SHAPE)
        out = []
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for tx, (w, state) in zip(runs, carry, strict=True):
                updates, state = tx.update(h * w + noise, state, w)
                out.append((w + updates, state))
        return out, jnp.stack([jnp.sum(h * w * w) for w, _ in out])

    first = [(start, tx.init(start)) for tx in runs]
    ends, loss = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(STEPS)))(first)
    mean = np.asarray(loss)[-20:].mean(0)
    count = len(CASES)
    return {
        name: (float(mean[n]), float(mean[n + count]), ends[n][1]) for n, name in enumerate(CASES)
    }


@pytest.mark.parametrize("name", CASES)
def test_it_descends_as_in_float32(losses: dict[str, Any], name: str) -> None:
    low, exact, _ = losses[name]
    assert low == pytest.approx(exact, rel=CASES[name][2]) and low != exact


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("centered")])
def test_the_square_is_never_below_that_of_the_mean(losses: dict[str, Any], name: str) -> None:
    state = widen(losses[name][2], frozenset())[0]
    mu, nu = (np.asarray(x, np.float64) for x in (state.mu, state.nu))
    assert (nu - mu * mu > -1e-6 * nu).all() and (nu > 0).all()


def test_a_difference_after_bias_correction_is_refused() -> None:
    tx = optax.rmsprop(0.1, centered=True, bias_correction=True)
    with pytest.raises(ConfigError, match="bias_correction=True.* set moments=f32 or") as error:
        quantize_moments(tx, first="int8", second="int8").init(jnp.ones(3))
    assert "\n" not in str(error.value)
