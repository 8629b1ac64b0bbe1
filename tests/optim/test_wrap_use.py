"""The wrapped optimizer in use: when it stops, what it refuses, and someone else's loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError, TrainingStopped
from mpjax.optim import ScaledGradients, apply_updates, wrap
from mpjax.precision import LossScaleSettings, get_precision

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPES = {"a": (2, 3), "b": (4,)}


def normal(seed: int, size: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s) * size, jnp.float32) for k, s in SHAPES.items()}


def precision(scale: str = "none", **options: Any) -> Any:
    return get_precision("fp32", loss_scale=scale, **options)


def skip(opt: Any, n: int, state: Any, w: Any, leaf: str = "b") -> Any:
    for _ in range(n):
        bad = {**normal(0), leaf: jnp.full(SHAPES[leaf], jnp.nan)}
        w, state = opt.step(ScaledGradients(bad), state, w)
    return state


@pytest.mark.parametrize(
    ("scale", "falls"),
    [("dynamic:init=8,min=2,interval=1", 2), ("dynamic:init=8,min=2,hysteresis=2", 3),
     ("static:64", 0), ("none", 0)],
)  # fmt: skip
def test_stops_after_patience_skips_at_the_minimum_scale(scale: str, falls: int) -> None:
    opt, w = wrap(optax.sgd(1.0), precision(scale), patience=3), normal(0)
    state = skip(opt, falls + 2, opt.init(w), w)
    opt.check_alive(state, w)
    opt.check_alive(skip(opt, 1, opt.init(w), w), w)
    last = skip(opt, 1, state, w)
    with pytest.raises(TrainingStopped) as error:
        opt.check_alive(last, w)
    value = {"static:64": "64", "none": "1"}.get(scale, "2")
    assert str(error.value).startswith("b: gradient is not finite, 3 steps in a row, and the loss")
    assert f"scale {value} cannot fall further" in str(error.value)
    assert "\n" not in str(error.value)
    # One finite step between resets the count; the scale grows in the dynamic case only.
    _, state = opt.step(ScaledGradients(normal(1)), state, w)
    assert state.gate.stuck == 0
    opt.check_alive(skip(opt, 2, state, w), w)


def test_the_stop_names_the_first_bad_gradient_by_its_path() -> None:
    w = {"decoder": {"mlp": {"up": jnp.ones(2), "down": jnp.ones(2)}, "norm": jnp.ones(2)}}
    opt = wrap(optax.sgd(1.0), precision(), patience=1)
    bad = jax.tree.map(jnp.ones_like, w)
    bad["decoder"]["norm"] = jnp.array([1.0, jnp.inf])
    bad["decoder"]["mlp"]["up"] = jnp.array([jnp.nan, 1.0])  # after mlp/down, before norm
    _, state = opt.step(bad, opt.init(w), w)
    with pytest.raises(TrainingStopped, match=r"^decoder/mlp/up: .*--rule '\*\*/mlp=fp32'"):
        opt.check_alive(state, w)
    with pytest.raises(TrainingStopped):
        opt.check_alive(state, w, stuck=1)
    opt.check_alive(state, w, stuck=0)  # what the caller fetched is used


def test_without_gate_a_bad_step_is_taken() -> None:
    opt, w = wrap(optax.sgd(1.0), precision("static:2"), gate=False, patience=1), normal(0)
    bad = ScaledGradients({**w, "b": jnp.full(4, jnp.nan)})
    w2, state, metrics = opt.step_with_metrics(bad, opt.init(w), w)
    assert np.isnan(w2["b"]).all() and "finite" not in metrics
    opt.check_alive(state, w2)


# What is refused.


@pytest.mark.parametrize(
    "again", [lambda opt: opt, lambda opt: opt.as_optax()], ids=["Optimizer", "as_optax"]
)
def test_an_optimizer_is_wrapped_once(again: Any) -> None:
    opt = wrap(optax.sgd(1.0), precision())
    with pytest.raises(ConfigError, match="wrapped already; pass the raw optax optimizer"):
        wrap(again(opt), precision())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip: 0.0 is not positive; leave it out"),
        ({"clip": -1.0}, "clip: -1.0 is not positive"),
        ({"clip": float("nan")}, "clip: nan is not positive"),
        ({"patience": 0}, "patience: 0 is not positive"),
        ({"gate": False}, "gate: a dynamic loss scale needs the finite gate"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        wrap(optax.sgd(1.0), precision("dynamic"), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_update_needs_the_weights() -> None:
    tx = wrap(optax.sgd(1.0), precision()).as_optax()
    with pytest.raises(ConfigError, match=r"call update\(grads, state, params\)"):
        tx.update(normal(0), tx.init(normal(0)))


# Someone else's loop.


def test_in_a_plain_optax_loop() -> None:
    """Linear regression, float16 products, small loss: solved with the scale, stuck without."""
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(32, 3)).astype(np.float32), np.array([0.5, -0.25, 1.0], np.float32)
    y = x @ true

    def loss(w: Any) -> Any:
        out = jnp.asarray(x, jnp.float16) @ w["w"].astype(jnp.float16)
        return jnp.mean(jnp.square(out.astype(jnp.float32) - y)) * 2.0**-22

    def fit(scale: str) -> Any:
        tx = wrap(optax.adam(0.05), precision(scale)).as_optax()
        params = {"w": jnp.zeros(3)}
        state = tx.init(params)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            grads = jax.grad(lambda w: state.loss_scale.scale(loss(w)))(params)
            updates, state = tx.update(ScaledGradients(grads), state, params)
            return apply_updates(params, updates), state

        for _ in range(300):
            params, state = step(params, state)
        return np.asarray(params["w"]), state

    w, state = fit("dynamic:init=17592186044416,max=1e15,interval=50")
    np.testing.assert_allclose(w, true, atol=5e-3)  # float16 products
    assert state.gate.skipped > 0  # the first scale was too large
    assert state.inner[0].count == 300 - state.gate.skipped
    lost, _ = fit("none")
    assert np.abs(lost - true).max() > 0.1


def test_settings_reach_the_state() -> None:
    settings = LossScaleSettings("dynamic", init=8.0, hysteresis=2)
    assert wrap(optax.sgd(1.0), precision(settings)).init(normal(0)).loss_scale.settings == settings


@pytest.mark.parametrize("tree", ["plain", "stacked"])
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda u: jnp.float32(1), "nothing for"),
        (lambda u: jax.tree.map(lambda x: x[:1], u), "an array of shape"),  # it would broadcast
        (
            lambda u: u | {"more": jnp.ones(3)},
            "an array of shape \\(3,\\) for more, no weight there",
        ),
        (lambda u: None, "nothing for"),
    ],
    ids=["a number", "a row", "one more", "none"],
)
def test_an_optimizer_returns_an_update_for_each_weight(
    tree: str, returned: Any, said: str
) -> None:
    kernel = {"kernel": jnp.ones((2, 3, 4))}
    params = {"model": {"layers": kernel} if tree == "stacked" else kernel}
    opt = wrap(optax.stateless(lambda u, p: returned(u)), "fp32")
    with pytest.raises(ConfigError, match=f"the optimizer returns {said}"):
        opt.step(ScaledGradients(params), opt.init(params), params)


@pytest.mark.parametrize("layers", [False, True])
def test_a_state_that_grows_is_whole_from_the_start(layers: bool) -> None:
    """`optax.monitor` has no measurements before its first step; a skipped step must keep bits."""

    def largest(updates: Any) -> Any:
        return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(updates)]))

    tx = optax.chain(optax.monitor({"largest": largest}), optax.adam(1e-2))
    kernel = {"kernel": jnp.ones((2, 3, 4))}
    params = {"model": {"layers": kernel} if layers else kernel}
    opt = wrap(tx, "fp32")
    state, step = opt.init(params), jax.jit(opt.step)
    grads = jax.tree.map(lambda x: x.at[1, 2, 3].set(7.0), params)
    seen = []
    for given in (jax.tree.map(lambda x: x * jnp.inf, grads), grads):
        params, state = step(ScaledGradients(given), state, params)
        seen.append(float(optax.tree.get(state.inner, "measurements")["largest"]))
    assert seen == [0.0, 7.0] and step._cache_size() == 1
