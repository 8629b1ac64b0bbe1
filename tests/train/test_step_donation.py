"""What a step donates, and what it gives to optimizers that ask for more than gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from mpjax.models import decoder
from mpjax.ops import rows_alike
from mpjax.optim import wrap
from mpjax.train import init_state, make_train_step, parse_mesh, state_shardings

pytestmark = pytest.mark.usefixtures("fast_compile")

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [3.0]], np.float32)
BATCH = {"x": X, "y": Y}


def loss_fn(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), state


def loss_of(params: Any) -> Any:
    return loss_fn(params, BATCH, state=None, key=None, train=True)[0]


def weights() -> dict[str, Any]:
    return {"w": jnp.ones((3, 1)), "unused": jnp.ones(2)}


# Each keeps the first weights, or anything else twice.
HOARDERS: dict[str, Callable[[], Any]] = {
    "prodigy": optax.contrib.prodigy,
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-3)),
    "schedule free": lambda: optax.contrib.schedule_free_adamw(1e-3),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    "dog": lambda: optax.contrib.dog(1.0),
}


@pytest.mark.parametrize("name", HOARDERS)
def test_no_state_holds_an_array_twice(name: str) -> None:
    params = weights()
    opt = wrap(HOARDERS[name](), "fp32")
    step = make_train_step(loss_fn, opt)
    state = init_state(params, opt)
    for _ in range(2):
        state, _ = step(state, BATCH)
    assert params["w"].sum() == 3  # the caller's own weights are still there
    # new weights for a state, with a fresh state of the optimizer
    state = state._replace(params=params, opt_state=opt.init(params))
    state, metrics = step(state, BATCH)
    assert np.isfinite(float(metrics["loss"]))


def test_one_array_in_two_places_is_two_weights() -> None:
    def two(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
        out = batch["x"] @ params["a"] + 2 * (batch["x"] @ params["b"])
        return jnp.mean((out - batch["y"]) ** 2), state

    w = jnp.ones((3, 1))
    opt = wrap(optax.sgd(0.01), "fp32")
    step = make_train_step(two, opt)
    state = init_state({"a": w, "b": w}, opt)
    state, _ = step(state._replace(params={"a": w, "b": w}), BATCH)
    moved = {name: np.asarray(p) - 1 for name, p in state.params.items()}
    np.testing.assert_allclose(moved["b"], 2 * moved["a"], rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_gets_the_loss_of_the_whole_batch(accumulate: int) -> None:
    opt = wrap(optax.contrib.momo(), "fp16")
    step = make_train_step(loss_fn, opt, accumulate=accumulate, count=rows_alike)
    state = init_state(weights(), opt)
    tx = optax.contrib.momo()
    params = weights()
    oracle = tx.init(params)
    for _ in range(3):
        state, metrics = step(state, BATCH)
        value, grads = jax.value_and_grad(loss_of)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, oracle = tx.update(grads, oracle, params, value=value)
        params = optax.apply_updates(params, updates)
        assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(state.params["w"], params["w"], rtol=1e-4)
    assert float(state.opt_state.loss_scale.value) > 1  # or the scaled loss would do as well


def test_a_line_search_gets_the_loss_as_a_function() -> None:
    opt = wrap(optax.lbfgs(), "fp32")
    step = make_train_step(loss_fn, opt, accumulate=2, count=rows_alike)
    state = init_state(weights(), opt)
    for _ in range(8):
        state, metrics = step(state, BATCH)
    right = np.linalg.lstsq(X.astype(np.float64), Y.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(state.params["w"], right, atol=1e-3)
    assert float(metrics["loss"]) < 1e-4


def test_steps_gathered_by_optax_are_taken_as_they_are() -> None:
    opt = wrap(optax.MultiSteps(optax.sgd(0.1), 2), "fp16")
    step = make_train_step(loss_fn, opt)
    state = init_state(weights(), opt)
    moved = []
    for scale in (1.0, np.inf, 1.0):  # the step between is skipped, and counts for neither
        before = np.asarray(state.params["w"])
        state, _ = step(state, {"x": X * np.float32(scale), "y": Y})
        moved.append(not np.array_equal(before, state.params["w"]))
    grad = 2 / 8 * X.T.astype(np.float64) @ (X @ np.ones((3, 1)) - Y)
    assert moved == [False, False, True] and int(state.opt_state.gate.skipped) == 1
    np.testing.assert_allclose(state.params["w"], 1 - 0.1 * grad, rtol=1e-4)


def test_moments_of_layers_are_cut_like_their_weights() -> None:
    model = decoder("tiny", "fp32", layers=2, width=16, heads=2, vocabulary=32, context=8)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    opt = wrap(optax.contrib.muon(1e-2), "fp32")
    rng = np.random.default_rng(0)

    def draw() -> Any:
        return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)

    params, grads = draw(), draw()
    abstract = jax.eval_shape(lambda p: init_state(p, opt), shapes)
    cut = state_shardings(abstract, model.axes, parse_mesh("fsdp=8"))
    mu = cut.opt_state.inner.inner_states["muon"].inner_state[0].mu
    for name in ("up", "down"):
        moment = mu["decoder"]["layers"]["mlp"][name]["kernel"]
        assert moment == cut.params["decoder"]["layers"]["mlp"][name]["kernel"]
        assert "fsdp" in moment.spec

    def move(params: Any) -> Any:
        return opt.step(grads, opt.init(params), params)[0]

    whole = jax.jit(move)(params)
    sharded = jax.jit(move, out_shardings=cut.params)(jax.device_put(params, cut.params))
    for a, b, w in zip(*map(jax.tree.leaves, (whole, sharded, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert not np.array_equal(a, w)
