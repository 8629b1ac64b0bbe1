"""Delayed scaling under autocast: the state of a function is that of products written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.formats import AmaxHistory, begin_step, end_step, observed_of
from mpjax.ops import dot_general, rows_alike
from mpjax.optim import wrap
from mpjax.precision import get_precision, register_recipe
from mpjax.precision import recipe as recipes
from mpjax.train import init_state, make_train_step
from tests.train.test_delayed import HISTORY, RECIPE, Plain, amax

pytestmark = pytest.mark.usefixtures("fast_compile", "own_recipe")
RULES = [f"**=r={RECIPE.name}"]
DIMS = (((1,), (0,)), ((), ()))
DRAW = np.random.default_rng(0)
PARAMS = {
    "up": jnp.asarray(DRAW.normal(size=(8, 16)), jnp.float32),
    "down": jnp.asarray(DRAW.normal(size=(16, 4)), jnp.float32),
}


@pytest.fixture(scope="module")
def own_recipe() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "_RECIPES", dict(recipes._RECIPES))
        register_recipe(RECIPE)
        yield


def batch(seed: int, factor: float = 1.0, rows: int = 8) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    x, y = factor * draw.normal(size=(rows, 8)), draw.normal(size=(rows, 4))
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}


def mlp(params: Any, batch: Any) -> Any:
    hidden = jnp.tanh(batch["x"] @ params["up"])
    return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)


def by_hand(params: Any, batch: Any, state: Any) -> tuple[Any, Any]:
    up, down = state
    x, up = dot_general(batch["x"], params["up"], DIMS, RECIPE, amax=up)
    y, down = dot_general(jnp.tanh(x), params["down"], DIMS, RECIPE, amax=down)
    return jnp.mean((y - batch["y"]) ** 2), (up, down)


def autocast(function: Any, **options: Any) -> Any:
    return mpjax.autocast(function, "fp32", rules=RULES, **options)


@pytest.mark.parametrize("accumulate, scale", [(1, "none"), (2, "dynamic:init=1024")])
def test_a_train_step_has_the_bits_of_products_written_by_hand(accumulate: int, scale: str) -> None:
    low = autocast(mlp)
    wrapped = wrap(optax.sgd(0.1), get_precision("fp32", loss_scale=scale))
    assert [h.history.shape for h in low.init_state(PARAMS, batch(0))] == [(3, HISTORY)] * 2

    def loss_of(function: Any) -> Any:
        def loss_fn(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
            return function(params, batch, state=state)

        return loss_fn

    runs = []
    for function in (low, by_hand):
        state = low.init_state(PARAMS, batch(0))
        run = init_state(jax.tree.map(jnp.copy, PARAMS), wrapped, model_state=state)
        step = make_train_step(loss_of(function), wrapped, accumulate=accumulate, count=rows_alike)
        for seed in range(5):
            run, metrics = step(run, batch(seed, 64.0 if seed == 2 else 1.0))
        runs.append((run.params, run.model_state, metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert all((h.history > 0).all() for h in runs[0][1])
    known = low(PARAMS, batch(9), state=runs[0][1])[0]
    assert float(known) != float(low(PARAMS, batch(9), state=low.init_state(PARAMS, batch(9)))[0])


def test_a_loop_of_ones_own_follows_lists_through_a_scan_of_steps() -> None:
    w = PARAMS["up"]
    low = autocast(lambda w, x, dy: jnp.mean(jnp.sum((x @ w) * dy, -1)))
    factors = [1.0, 64.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    xs = jnp.stack([f * batch(n)["x"] for n, f in enumerate(factors)])
    dys = jnp.stack([jnp.full((8, 16), f + 0.25, jnp.float32) for f in factors])

    def step(state: Any, part: Any, scale: float = 8.0) -> tuple[Any, Any]:
        def scaled(w: Any, state: Any) -> tuple[Any, Any]:
            loss, state = low(w, *part, state=state)
            return scale * loss, state

        grad = jax.grad(scaled, (0, 1), has_aux=True)
        (dw, seen), after = grad(w, begin_step(state, jnp.float32(scale)))
        return end_step(after, state, observed_of(seen), jnp.float32(scale)), dw

    start = low.init_state(w, xs[0], dys[0])
    (end,), _ = jax.jit(lambda s: jax.lax.scan(step, s, (xs, dys)))(start)
    plain = [Plain() for _ in range(3)]
    for x, dy in zip(xs, dys, strict=True):
        for model, value in zip(plain, (amax(x), amax(w), amax(dy) / 8), strict=True):
            model.see(value)
    np.testing.assert_allclose(end.history, [m.history for m in plain], rtol=1e-6)
    np.testing.assert_allclose(end.amax, [m.amax for m in plain], rtol=1e-6)
    current = mpjax.autocast(lambda w, x: x @ w, "fp32", rules=["**=r=fp8"])
    first = low(w, xs[0], dys[0], state=start)[0]  # nothing is known: scales of the tensors
    np.testing.assert_allclose(first, jnp.mean(jnp.sum(current(w, xs[0]) * dys[0], -1)), rtol=1e-6)


def layers(params: Any, x: Any, unrolled: bool) -> Any:
    def layer(x: Any, w: Any) -> tuple[Any, None]:
        return jax.checkpoint(lambda x: jnp.tanh(jnp.einsum("nd,df->nf", x, w)))(x), None

    if unrolled:
        for w in params:
            x, _ = layer(x, w)
    else:
        x, _ = jax.lax.scan(layer, x, params)
    return jnp.sum(jnp.square(x))


def test_a_scan_has_a_history_for_each_layer() -> None:
    w = jnp.asarray(DRAW.normal(size=(3, 8, 8)) * np.arange(1, 4)[:, None, None], jnp.float32)
    x, found = batch(0)["x"], []
    for unrolled in (False, True):
        low = autocast(lambda w, x, unrolled=unrolled: layers(w, x, unrolled))
        state = low.init_state(w, x)
        grad = jax.jit(jax.grad(lambda w, s, low=low: low(w, x, state=s), (0, 1), has_aux=True))
        for _ in range(2):
            (dw, seen), after = grad(w, state)
            state = end_step(after, state, observed_of(seen), 1.0)
        found.append((dw, state))
    (dw, (whole,)), (dw_unrolled, parts) = found
    assert whole.history.shape == (3, 3, HISTORY) and len(parts) == 3
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, stacked)
    np.testing.assert_allclose(dw, dw_unrolled, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole.amax[:, 1], jnp.max(jnp.abs(w), (1, 2)))
    assert len(set(whole.amax[:, 2].tolist())) == 3


def test_a_branch_that_does_not_run_observes_nothing() -> None:
    def either(x: Any, w: Any) -> Any:
        return jax.lax.cond(x[0, 0] > 1e6, lambda x: x @ w, lambda x: x @ (2 * w), x)

    low = autocast(either)
    x, w = batch(0)["x"], PARAMS["up"]
    _, (ran, never) = jax.jit(low)(x, w, state=low.init_state(x, w))
    assert never.observed_amax.tolist() == [0.0] * 3
    np.testing.assert_allclose(ran.observed_amax, [amax(x), 2 * amax(w), 0.0], rtol=1e-6)


def test_a_precision_whose_products_are_elsewhere_has_an_empty_state() -> None:
    low = mpjax.autocast(jnp.tanh, "fp8-delayed")
    assert low.init_state(jnp.ones(3)) == ()
    out, state = low(jnp.ones(3), state=())
    assert out.shape == (3,) and state == ()


@jax.custom_vjp
def own(x: Any, w: Any) -> Any:
    return x @ w


own.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, dy: (dy @ r[1].T, r[0].T @ dy))
X, W = batch(0)["x"], PARAMS["up"]
TWO = (AmaxHistory.empty(HISTORY),) * 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: autocast(mlp)(PARAMS, batch(0)), "state is None; give what init_state"),
        (lambda: autocast(mlp)(PARAMS, batch(0), state=TWO[:1]), "histories of shapes"),
        (lambda: autocast(mlp)(PARAMS, batch(0), state=(1, 2)), r"state is \(1, 2\); give"),
        (lambda: autocast(own).init_state(X, W), "a function with a derivative of its own"),
        (lambda: autocast(lambda w: jax.lax.while_loop(
            lambda w: w[0, 0] < 9, lambda w: w @ w, w)).init_state(jnp.eye(4)), "a while loop"),
        (lambda: autocast(lambda x, state: x @ state), "rename it"),
        (lambda: autocast(jax.grad(mlp)).init_state(PARAMS, batch(0)), "traced already"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(call: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        call()
    assert str(error.value).startswith("autocast: ") and "\n" not in str(error.value)
