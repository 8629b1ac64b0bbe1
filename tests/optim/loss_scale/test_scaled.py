"""Scaled and unscaled gradients cannot be mistaken for each other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.optim import (
    DynamicLossScale,
    LeafLossScale,
    ScaledGradients,
    StaticLossScale,
    apply_updates,
    global_norm,
    scaled_value_and_grad,
    scaled_value_and_grads,
    wrap,
)
from mpjax.optim.loss_scale.multi_loss import MultiLossScale

pytestmark = pytest.mark.usefixtures("fast_compile")

X = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
Y = X @ np.arange(8, dtype=np.float32)
START = {"w": np.zeros(8, np.float32)}


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ params["w"] - y) ** 2)


def by_hand(steps: int, lr: float) -> float:
    """Gradient descent in float64; the loss before the last step."""
    w, x, y = np.zeros(8), X.astype(np.float64), Y.astype(np.float64)
    for _ in range(steps):
        error = x @ w - y
        loss, w = np.mean(error**2), w - lr * 2 * x.T @ error / len(y)
    return float(loss)


def start(precision: str = "fp16", **options: Any) -> tuple[Any, Any, Any]:
    opt = wrap(optax.sgd(0.05), precision, **options)
    params = jax.tree.map(jnp.asarray, START)
    return opt, opt.init(params), params


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_value_and_grad_and_step_train_as_gradient_descent_does(precision: str) -> None:
    opt, state, params = start(precision, clip=1e3)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = opt.value_and_grad(loss_fn)(state, params, X, Y)
        return *opt.step(grads, state, params), loss

    for _ in range(100):
        params, state, loss = step(params, state)
    right = by_hand(100, 0.05)
    assert right < 1e-3 < 100 < by_hand(1, 0.05)
    assert float(loss) == pytest.approx(right, rel=1e-3)


def test_values_and_gradients_are_those_of_float64() -> None:
    opt, state, params = start("fp16")

    def with_aux(params: Any, x: Any, y: Any) -> Any:
        return loss_fn(params, x, y), x.shape

    (loss, aux), grads = opt.value_and_grad(with_aux, has_aux=True)(state, params, X, Y)
    plain = state.loss_scale.unscale(grads)
    assert aux == (64, 8) and loss.dtype == jnp.float32 and not isinstance(plain, ScaledGradients)
    error = X.astype(np.float64) @ START["w"] - Y
    np.testing.assert_allclose(plain["w"], 2 * X.T @ error / 64, rtol=1e-5)
    np.testing.assert_allclose(grads["w"], 65536 * np.asarray(plain["w"]))


def vg(scale: Any) -> Any:
    return scaled_value_and_grad(loss_fn)(scale, jax.tree.map(jnp.asarray, START), X, Y)[1]


@pytest.mark.parametrize("jitted", [False, True])
def test_the_scale_of_an_optimizer_is_not_for_the_pieces(jitted: bool) -> None:
    _, state, params = start()
    piece = scaled_value_and_grad(loss_fn)
    with pytest.raises(ConfigError, match=r"loss scale: it belongs to an optimizer") as error:
        (jax.jit(piece) if jitted else piece)(state.loss_scale, params, X, Y)
    assert one_line(error)
    # Through a step, donation and jit too.
    opt, state, params = start()
    grads = jax.grad(lambda p: state.loss_scale.scale(loss_fn(p, X, Y)))(params)
    _, state = jax.jit(opt.step)(ScaledGradients(grads), state, params)
    with pytest.raises(ConfigError, match="belongs to an optimizer"):
        piece(state.loss_scale, params, X, Y)


OWN = {
    "dynamic": DynamicLossScale(),
    "static": StaticLossScale(8.0),
    "leaf": LeafLossScale(["w"]),
}


PLAIN = {name: lambda scale=scale: vg(scale) for name, scale in OWN.items()} | {
    "jax.grad": lambda: jax.grad(loss_fn)(jax.tree.map(jnp.asarray, START), X, Y),
    "half of it": lambda: jax.tree.map(lambda g: g / 2, vg(OWN["dynamic"])),
}


@pytest.mark.parametrize("grads", PLAIN.values(), ids=list(PLAIN))
def test_unscaled_gradients_are_no_food_for_step(grads: Any) -> None:
    opt, state, params = start()
    with pytest.raises(ConfigError, match=r"gradients: .* may be unscaled, .* write") as error:
        opt.step(grads(), state, params)
    assert one_line(error)
    with pytest.raises(ConfigError, match="may be unscaled"):
        opt.as_optax().update(grads(), state, params)
    with pytest.raises(ConfigError, match="may be unscaled"):
        jax.jit(lambda params, state: opt.step(grads(), state, params))(params, state)
    # An optimizer without a loss scale has nothing to divide by.
    opt, state, params = start("fp32")
    new, _ = opt.step(grads(), state, params)
    assert float(loss_fn(new, X, Y)) < float(loss_fn(params, X, Y))


def test_several_losses_likewise() -> None:
    opt, state, params = start()
    two = scaled_value_and_grads(lambda p: (jnp.sum(p["w"]), jnp.sum(p["w"] * 2)))
    _, grads, _ = two(MultiLossScale([StaticLossScale(8.0)] * 2), params)
    with pytest.raises(ConfigError, match="may be unscaled"):
        opt.step(grads, state, params)


def test_what_goes_on_as_before() -> None:
    opt, state, params = start()
    # scaled by hand
    by_scale = jax.grad(lambda p: state.loss_scale.scale(loss_fn(p, X, Y)))(params)
    expected, _ = opt.step(ScaledGradients(by_scale), state, params)
    _, grads = opt.value_and_grad(loss_fn)(state, params, X, Y)
    new, _ = opt.step(grads, state, params)
    assert new["w"].tobytes() == expected["w"].tobytes()
    # a pytree: halves of two microbatches add up, and it stays scaled
    half = [opt.value_and_grad(loss_fn)(state, params, X[i::2], Y[i::2])[1] for i in (0, 1)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *half)
    assert isinstance(mean, ScaledGradients)
    np.testing.assert_allclose(opt.step(mean, state, params)[0]["w"], new["w"], rtol=1e-5)
    summed = jax.vmap(lambda g: jax.lax.pmean(g, "i"), axis_name="i")(
        jax.tree.map(lambda *g: jnp.stack(g), *half)
    )
    assert isinstance(summed, ScaledGradients) and "w" in summed and list(summed) == ["w"]
    # as an optax transformation
    updates, _ = opt.as_optax().update(grads, state, params)
    np.testing.assert_allclose(apply_updates(params, updates)["w"], new["w"], rtol=1e-6)
    # the pieces without a scale, and any other optimizer
    updates, _ = optax.sgd(0.05).update(vg(DynamicLossScale()), optax.sgd(0.05).init(params))
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"], new["w"], rtol=1e-5)


def test_scaled_gradients_fit_nowhere_else() -> None:
    opt, state, params = start()
    _, grads = opt.value_and_grad(loss_fn)(state, params, X, Y)
    for use in (lambda: apply_updates(params, grads), lambda: global_norm(grads)):
        with pytest.raises(ConfigError, match=r"gradients of the scaled loss") as error:
            use()
        assert one_line(error)
    adam = optax.adam(1e-3)
    with pytest.raises(ValueError, match="ScaledGradients"):
        adam.update(grads, adam.init(params), params)
    with pytest.raises(ConfigError, match=r"the optimizer's state is .* write opt.value_and_grad"):
        opt.value_and_grad(loss_fn)(params, state, X, Y)
