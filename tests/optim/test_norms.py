"""Norms of gradients that are right where squares overflow or vanish, and unchanged elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpjax.optim import LeafLossScale, LogMaxLossScale, global_norm, wrap

pytestmark = pytest.mark.usefixtures("fast_compile")


def tree(size: float, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: np.float32(rng.normal(size=s) * size) for k, s in (("a", (37, 129)), ("b", (5,)))}


def exact(grads: Any) -> float:
    return float(np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in grads.values())))


def plain(grads: Any) -> Any:
    """As it was: squares in float32."""
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


norm, was = jax.jit(global_norm), jax.jit(plain)


@pytest.mark.parametrize("exponent", [-118, -100, -70, 0, 60, 64, 100, 118])
def test_a_norm_over_the_whole_range(exponent: int) -> None:
    grads = tree(2.0**exponent)
    assert float(norm(grads)) == pytest.approx(exact(grads), rel=1e-6, abs=0)
    if abs(exponent) > 64:
        assert not float(was(grads)) == pytest.approx(exact(grads), rel=1e-2, abs=0)


@pytest.mark.parametrize("exponent", range(-50, 56, 7))
def test_an_ordinary_norm_keeps_its_bits(exponent: int) -> None:
    grads = tree(2.0**exponent * 1.37, exponent + 50)
    assert norm(grads) == was(grads)


def test_what_is_not_finite_or_empty() -> None:
    assert np.isnan(norm({"a": jnp.array([1.0, jnp.nan])}))
    assert np.isinf(norm({"a": jnp.array([1.0, -jnp.inf])}))
    assert norm({"a": jnp.zeros(3), "b": jnp.zeros((0, 2))}) == 0 and norm({}) == 0


@pytest.mark.parametrize("size", [5e37, 3e19, 1e10, 1.0, 1e-3, 1e-30])
@pytest.mark.parametrize("clip", [1.0, 0.75])
def test_clipping_gradients_of_any_size(size: float, clip: float) -> None:
    grads = {"w": np.float32([1, -2, 2]) * np.float32(size / 3)}
    optimizer = wrap(optax.sgd(1.0), "fp32", clip=clip)
    params = {"w": jnp.zeros(3)}
    step = jax.jit(optimizer.step_with_metrics)
    new, _, metrics = step(grads, optimizer.init(params), params)
    want = np.float64([1, -2, 2]) / 3 * min(size, clip)
    np.testing.assert_allclose(np.asarray(new["w"]), -want, rtol=1e-6)
    assert metrics["finite"] and float(metrics["grad_norm"]) == pytest.approx(size, rel=1e-6, abs=0)


def test_a_norm_beyond_float32_skips_the_step() -> None:
    params = {"w": jnp.ones(4)}
    optimizer = wrap(optax.sgd(1.0), "fp32", clip=1.0)
    grads = {"w": jnp.full(4, 3.4e38)}
    new, state, metrics = optimizer.step_with_metrics(grads, optimizer.init(params), params)
    assert (new["w"] == 1).all() and not metrics["finite"] and state.gate.skipped == 1


@pytest.mark.parametrize("size", [1.0, 3e19, 1e-30])
def test_a_sharded_norm(size: float) -> None:
    grads = {"w": np.float32(np.random.default_rng(1).normal(size=(16, 8)) * size)}
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    placed = jax.device_put(grads["w"], NamedSharding(mesh, PartitionSpec("data")))
    assert float(norm({"w": placed})) == pytest.approx(exact(grads), rel=1e-6, abs=0)


@pytest.mark.parametrize("size", [3e38, 1e30, 1.0, 1e-30, 2.0**-126])
def test_loss_scales_that_read_gradients_of_any_size(size: float) -> None:
    grads = {"w": jnp.array([size, size / 2]), "v": jnp.array([size / 4])}
    logmax = LogMaxLossScale(min_scale=2.0**-126, max_scale=2.0**127).adjust(True, grads)
    want = 2.0 ** np.floor(np.log2(65504) - np.log2(size) - 4)
    assert float(logmax.value) == np.clip(want, 2.0**-126, 2.0**127)
    leaf = LeafLossScale(["w", "**"], growth_interval=1).adjust(True, grads)
    assert (leaf.state[0] == 2.0**17).all()
