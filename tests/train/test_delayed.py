"""Delayed scaling through the train step: jumps, zeros, NaN, skips, microbatches, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import dot_general, rows_alike
from mpjax.optim import wrap
from mpjax.precision import Operand, Recipe, get_precision
from mpjax.train import build, init_state, make_train_step
from mpjax.train.checkpoint.checkpointer import Checkpointer
from tests.train.meshes import FAST, batch, host, small

pytestmark = pytest.mark.usefixtures("fast_compile")

HISTORY = 4
PAIR = (Operand("e4m3"), Operand("e4m3"))
BACK = (Operand("e5m2"), Operand("e4m3"))
RECIPE = Recipe("short", PAIR, BACK, (Operand("e4m3"), Operand("e5m2")), history=HISTORY)
DIMS = (((1,), (0,)), ((), ()))


def loss_fn(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> tuple[Any, Any]:
    """y = x W, weighted by `dy`, so that the gradient of y is `dy` over the rows."""
    del key, train
    y, amax = dot_general(batch["x"], params["w"], DIMS, RECIPE, amax=state["amax"])
    return jnp.mean(jnp.sum(y * batch["dy"], -1)), {"amax": amax}


def start(accumulate: int = 1, loss_scale: str = "none", lr: float = 0.0) -> tuple[Any, Any]:
    wrapped = wrap(optax.sgd(lr), get_precision("fp32", loss_scale=loss_scale))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)}
    state = init_state(params, wrapped, model_state={"amax": AmaxHistory.empty(HISTORY)})
    return state, make_train_step(loss_fn, wrapped, accumulate=accumulate, count=rows_alike)


def rows(seed: int, factor: float = 1.0, n: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    x, dy = factor * rng.normal(size=(n, 8)), factor * rng.normal(size=(n, 4))
    return {"x": jnp.asarray(x, jnp.float32), "dy": jnp.asarray(dy, jnp.float32)}


def amax(x: Any) -> float:
    return float(np.abs(np.asarray(x)).max())


class Plain:
    """Delayed scaling in lists: the newest magnitude first, what teaches nothing is zero."""

    def __init__(self) -> None:
        self.history, self.amax = [0.0] * HISTORY, 0.0

    def see(self, value: float) -> None:
        value = value if math.isfinite(value) else 0.0
        self.history = [value, *self.history[:-1]]
        self.amax = max(self.history) or self.amax


def test_histories_follow_a_plain_model_through_jumps_zeros_and_nan() -> None:
    factors = [1, 1, 64, 1, 0, 0, 0, 0, 0, 1 / 64, 1, math.nan, math.inf, 1, 1, 0, 1]
    state, plain = AmaxHistory.empty(HISTORY), [Plain() for _ in range(3)]
    for n, factor in enumerate(factors):
        seen = jnp.asarray([1.5 * factor, 2.0, 0.25 * factor * 8], jnp.float32)
        begun = state.begin(jnp.float32(8))
        assert float(begun.amax[2]) == pytest.approx(8 * plain[2].amax)
        observed = begun._replace(observed_amax=seen.at[2].set(0))
        state = observed.end(state, jnp.zeros(3).at[2].set(seen[2]), jnp.float32(8))
        for model, value in zip(plain, (1.5 * factor, 2.0, 0.25 * factor), strict=True):
            model.see(value)
        assert state.history.tolist() == [pytest.approx(m.history) for m in plain], n
        assert state.amax.tolist() == pytest.approx([m.amax for m in plain]), n
    assert plain[0].amax > 0 and float(state.amax[0]) == 1.5


def test_the_first_step_takes_its_own_magnitudes_and_the_next_the_last_steps() -> None:
    state, step = start()
    first, second = rows(1), rows(2)
    state, _ = step(state, first)
    got = state.model_state["amax"]
    np.testing.assert_allclose(
        got.history[:, 0], [amax(first["x"]), amax(state.params["w"]), amax(first["dy"]) / 8]
    )
    assert got.history[:, 1:].tolist() == [[0.0] * 3] * 3

    def product(batch: Any, known: Any) -> Any:
        begun = AmaxHistory.empty(HISTORY)._replace(amax=known)
        return dot_general(batch["x"], state.params["w"], DIMS, RECIPE, amax=begun)[0]

    current = product(first, jnp.zeros(3))
    np.testing.assert_array_equal(current, dot_general(first["x"], state.params["w"], DIMS, "fp8"))
    assert not np.array_equal(product(second, got.amax), product(second, jnp.zeros(3)))


def test_a_jump_of_64_saturates_once_and_is_known_a_step_later() -> None:
    state, step = start()
    for seed in range(2):
        state, _ = step(state, rows(seed))
    jump = rows(2, 64.0)

    def error(state: Any) -> float:
        begun = state.model_state["amax"].begin(jnp.float32(1))
        y = dot_general(jump["x"], state.params["w"], DIMS, RECIPE, amax=begun)[0]
        exact = np.asarray(jump["x"], np.float64) @ np.asarray(state.params["w"], np.float64)
        assert np.isfinite(np.asarray(y)).all()
        return float(np.abs(y - exact).max() / np.abs(exact).max())

    before = error(state)
    state, metrics = step(state, jump)
    assert int(metrics["skipped"]) == 0 and np.isfinite(float(metrics["loss"]))
    assert before > 0.5 and error(state) < 0.05
    for seed in range(HISTORY - 1):
        state, _ = step(state, rows(seed))
        assert float(state.model_state["amax"].amax[0]) == amax(jump["x"])
    state, _ = step(state, rows(9))  # the jump has left the history
    assert float(state.model_state["amax"].amax[0]) < 10


def test_a_tensor_of_zeros_keeps_the_scale() -> None:
    state, step = start()
    state, _ = step(state, {"x": jnp.zeros((8, 8)), "dy": jnp.zeros((8, 4))})
    assert float(state.model_state["amax"].amax[0]) == 0.0
    state, metrics = step(state, rows(1))
    known = host(state.model_state["amax"].amax)
    for _ in range(HISTORY + 1):
        state, metrics = step(state, {"x": jnp.zeros((8, 8)), "dy": jnp.zeros((8, 4))})
    assert float(metrics["loss"]) == 0.0
    np.testing.assert_array_equal(state.model_state["amax"].amax, known)


@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_skipped_step_leaves_the_history_bit_for_bit(where: str, bad: float) -> None:
    state, step = start(loss_scale="dynamic:init=1024", lr=0.1)
    state, _ = step(state, rows(1))
    before = host(state)
    broken = rows(2)
    broken[where] = broken[where].at[0, 0].set(bad)
    state, metrics = step(state, broken)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, host(state.model_state), before.model_state)
    np.testing.assert_array_equal(state.params["w"], before.params["w"])
    state, _ = step(state, rows(2))
    assert not np.array_equal(state.model_state["amax"].history, before.model_state["amax"].history)


def test_four_microbatches_are_joined_by_their_maximum() -> None:
    data = rows(3, n=16)
    data["x"] = data["x"].at[1, 0].set(50.0)  # microbatch 1 of 4: rows 1, 5, 9, 13
    data["dy"] = data["dy"].at[2, 0].set(40.0)  # microbatch 2
    state, step = start(accumulate=4)
    state, _ = step(state, data)
    got = state.model_state["amax"].history[:, 0]
    # each microbatch takes the mean over its own four rows
    np.testing.assert_allclose(got, [50.0, amax(state.params["w"]), 40.0 / 4], rtol=1e-6)
    parts = [amax(data["dy"][i::4]) / 4 for i in range(4)]
    assert parts[-1] < 0.5 * max(parts) < max(parts) < 0.9 * sum(parts)  # not the last, not a sum


def test_a_product_that_is_used_twice_keeps_the_larger_magnitude() -> None:
    w = jnp.ones((2, 2))

    def loss(seen: Any) -> tuple[Any, Any]:
        amax = AmaxHistory.empty(HISTORY)._replace(observed_amax=seen)
        y, amax = dot_general(jnp.full((1, 2), 3.0), w, DIMS, RECIPE, amax=amax)
        z, amax = dot_general(jnp.full((1, 2), 5.0), w, DIMS, RECIPE, amax=amax)
        return jnp.sum(7.0 * y) + jnp.sum(2.0 * z), amax.observed_amax

    gradient, seen = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros(3))
    assert seen.tolist() == [5.0, 1.0, 0.0]
    assert gradient.tolist() == [0.0, 0.0, 7.0]  # a sum would be 9


@pytest.mark.parametrize("scale", ["static:1024", "dynamic:init=65536"])
def test_the_history_does_not_know_the_loss_scale(scale: str) -> None:
    plain, plain_step = start()
    scaled, scaled_step = start(loss_scale=scale)
    for seed in range(3):
        plain, _ = plain_step(plain, rows(seed))
        scaled, _ = scaled_step(scaled, rows(seed))
    jax.tree.map(np.testing.assert_array_equal, host(scaled.model_state), host(plain.model_state))
    assert float(plain.model_state["amax"].amax[2]) > 0


@pytest.fixture(scope="module")
def delayed() -> Any:
    return get_precision("fp8-delayed")


def test_a_decoder_threads_its_histories_alike_on_one_and_on_eight_devices(delayed: Any) -> None:
    model = small(delayed, layers=2)
    found = []
    for mesh in (None, "data=2,fsdp=2,tensor=2"):
        state, step = build(model, optax.sgd(0.1), mesh)
        run = jax.jit(step.function, compiler_options=FAST)
        for seed in range(2):
            state, metrics = run(state, step.place(batch(seed)))
        found.append(host(state.model_state["amax"]["layers"]))
    one, eight = found
    assert set(one) == {"attention", "mlp"}
    up = one["mlp"]["up"]["kernel"]
    assert up.history.shape == (2, 3, 1024) and (up.history[:, :, :2] > 0).all()
    assert (up.history[:, :, 2:] == 0).all() and not np.array_equal(up.amax[0], up.amax[1])
    # Sums in another order flip a rounding here and there: one step of e4m3, in which x and W are,
    # is 1/8 of a number at most, and one of e5m2, in which dy is, 1/4.
    step = [1 / 8, 1 / 8, 1 / 4]

    def alike(a: Any, b: Any) -> None:
        for number, rtol in enumerate(step):
            np.testing.assert_allclose(a[:, number], b[:, number], rtol=rtol)

    jax.tree.map(alike, one, eight)


def test_a_restored_run_goes_on_bit_for_bit(delayed: Any, tmp_path: Path) -> None:
    model = small(delayed)
    state, step = build(model, optax.adam(1e-2))
    for seed in range(2):
        state, _ = step(state, batch(seed))
    checkpoints = Checkpointer(tmp_path / "run")
    checkpoints.save(2, state, {})
    checkpoints.close()
    straight = host(step(state, batch(2))[0])
    fresh, _ = build(model, optax.adam(1e-2), seed=1)
    reader = Checkpointer(tmp_path / "run")
    restored, lost = (reader.restore(fresh)[0] for _ in range(2))
    lost = lost._replace(model_state=model.init_state())
    again = host(step(restored, batch(2))[0])
    jax.tree.map(np.testing.assert_array_equal, again, straight)
    without = host(step(lost, batch(2))[0])  # the histories do matter
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, without.params, straight.params)


def test_a_model_without_its_state_is_refused(delayed: Any) -> None:
    model = small(delayed)
    params = model.init(jax.random.key(0))
    with pytest.raises(ConfigError, match="decoder/layers/0/attention/query: .*model.init_state"):
        model.loss(params, batch())
    assert small("fp8").init_state() is None
