"""The wrapped optimizer: its order, against float64 by hand; its errors; its use in any loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError, TrainingStopped
from mpjax.optim import apply_updates, global_norm, wrap
from mpjax.precision import LossScaleSettings, get_precision

SHAPES = {"a": (2, 3), "b": (4,)}
F32_MAX = float(np.finfo(np.float32).max)


def normal(seed: int, size: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s) * size, jnp.float32) for k, s in SHAPES.items()}


def times(tree: Any, factor: float) -> Any:
    return jax.tree.map(lambda x: x * factor, tree)


def float64(tree: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, np.float64) for k, v in tree.items()}


def precision(scale: str = "none", **options: Any) -> Any:
    return get_precision("fp32", loss_scale=scale, **options)


# The chain by hand, in float64 with float32's range; its order is a parameter, so that every wrong
# order is a mutant.
STAGES = ("unscale", "gate", "clip", "optimizer")


def chain(order: Any, grads: Any, scale: float, clip: float, optimizer: Callable[..., Any]) -> Any:
    value, keep = float64(grads), True
    for stage in order:
        if stage == "unscale":
            value = {k: v / scale for k, v in value.items()}
            value = {k: np.where(np.abs(v) > F32_MAX, np.inf, v) for k, v in value.items()}
        elif stage == "gate":
            keep = all(np.isfinite(v).all() for v in value.values())
        elif stage == "clip":
            norm = np.sqrt(sum((v**2).sum() for v in value.values()))
            value = {k: v * min(1.0, clip / norm) for k, v in value.items()}
        else:
            value = {k: optimizer(v) for k, v in value.items()}
    return value if keep else {k: np.zeros_like(v) for k, v in value.items()}


def sgd(g: np.ndarray) -> np.ndarray:
    return -0.5 * g


def first_adam(g: np.ndarray) -> np.ndarray:
    """Adam's first step: m / (1 - b1) = g and v / (1 - b2) = g^2."""
    return -0.5 * g / (np.abs(g) + 1e-8)


def first_lion(g: np.ndarray) -> np.ndarray:
    return -0.5 * np.sign(g)


OPTIMIZERS = {
    "sgd": (optax.sgd(0.5), sgd),
    "adam": (optax.adam(0.5), first_adam),
    "lion": (optax.lion(0.5, weight_decay=0.0), first_lion),
}
# Scaled gradients and their scale: large ones that are clipped, small ones that are not, ones that
# are finite only before they are unscaled, and one inf.
INPUTS = {
    "clipped": (times(normal(1), 2.0**10), 2.0**10),
    "small": (times(normal(2, 1e-2), 2.0**10), 2.0**10),
    "overflow": (normal(3, 1e35), 2.0**-20),
    "inf": ({**normal(4), "b": jnp.full(4, jnp.inf)}, 2.0**10),
}
CLIP = 0.5
RTOL = {"adam": 1e-4}  # 1 - 0.999 in float32 loses 10 bits of 24


def close(ours: Any, hand: Any, rtol: float = 1e-6) -> bool:
    """Six float32 roundings of 2^-24 each."""
    return all(
        np.allclose(np.asarray(ours[k], np.float64), hand[k], rtol=rtol, atol=0, equal_nan=True)
        for k in SHAPES
    )


@pytest.fixture(scope="module")
def steps() -> dict[tuple[str, str], Any]:
    """The wrapped optimizer's own deltas from zero weights."""
    zero, out = jax.tree.map(jnp.zeros_like, normal(0)), {}
    for (name, (tx, _)), (kind, (grads, scale)) in itertools.product(
        OPTIMIZERS.items(), INPUTS.items()
    ):
        opt = wrap(tx, precision(f"static:{scale}"), clip=CLIP)
        out[name, kind] = opt.step(grads, opt.init(zero), zero)[0]
    return out


def agreeing(steps: Any, order: Any) -> set[tuple[str, str]]:
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            (name, kind)
            for name, kind in steps
            if close(
                steps[name, kind],
                chain(order, *INPUTS[kind], CLIP, OPTIMIZERS[name][1]),
                RTOL.get(name, 1e-6),
            )
        }


def test_unscale_gate_clip_optimizer_is_the_order(steps: Any) -> None:
    assert agreeing(steps, STAGES) == set(steps)


@pytest.mark.parametrize(
    "order", [o for o in itertools.permutations(STAGES) if o != STAGES], ids=lambda o: "-".join(o)
)
def test_every_other_order_is_told_apart(steps: Any, order: Any) -> None:
    """All but two: norm clipping turns inf into NaN, which a later gate still sees."""
    same = order[:2] == ("unscale", "clip")
    assert (agreeing(steps, order) == set(steps)) is same


def test_adam_hides_a_wrong_scale_and_sgd_does_not(steps: Any) -> None:
    """Why the order is tested with SGD too: without unscale, Adam's step is the same."""
    agree = agreeing(steps, ("gate", "optimizer"))
    assert ("adam", "small") in agree and ("sgd", "small") not in agree


@pytest.mark.parametrize("order", [("unscale", *STAGES), ("gate", "clip", "optimizer")])
def test_unscale_happens_once(steps: Any, order: Any) -> None:
    assert ("sgd", "small") not in agreeing(steps, order)


def test_unscale_takes_the_scale_from_before_adjust() -> None:
    w, g = normal(0), normal(1)
    opt = wrap(optax.sgd(0.5), precision("dynamic:init=1024,interval=1"))
    state = opt.init(w)
    out, state = opt.step(times(g, 1024.0), state, w)
    hand = {k: float64(w)[k] - 0.5 * float64(g)[k] for k in w}
    mutant = {k: float64(w)[k] - 0.25 * float64(g)[k] for k in w}
    assert state.loss_scale.value == 2048.0
    for k in w:
        np.testing.assert_allclose(out[k], hand[k], rtol=1e-5)
    assert not close(out, mutant)
    out, _ = opt.step(times(g, 2048.0), state, out)  # the next step is scaled by the new scale
    for k in w:
        np.testing.assert_allclose(out[k], hand[k] - 0.5 * float64(g)[k], rtol=1e-5, atol=1e-6)


def test_adam_over_a_moving_scale_is_adam_by_hand_in_float64() -> None:
    """Growth, skip and backoff on the way; the moments never see the scale."""
    opt = wrap(optax.adam(0.1), precision("dynamic:init=4096,interval=2"), clip=1.0)
    step = jax.jit(opt.step)
    w = normal(0)
    state, hand = opt.init(w), float64(w)
    m = {k: np.zeros(s) for k, s in SHAPES.items()}
    v = {k: np.zeros(s) for k, s in SHAPES.items()}
    t, scale, scales = 0, 4096.0, []
    for n in range(9):
        g, bad = normal(10 + n, 0.3), n in (3, 6)
        scaled = times(g, scale)
        if bad:
            scaled["b"] = scaled["b"].at[1].set(jnp.nan)
        w, state = step(scaled, state, w)
        scale = float(state.loss_scale.value)
        scales.append(scale)
        if not bad:
            t += 1
            clipped = chain(("clip",), g, 1.0, 1.0, sgd)
            for k, x in clipped.items():
                m[k] = 0.9 * m[k] + 0.1 * x
                v[k] = 0.999 * v[k] + 0.001 * x**2
                hand[k] -= 0.1 * (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
    assert scales == [4096, 8192, 8192, 4096, 4096, 8192, 4096, 4096, 8192]
    assert state.gate.skipped == 2 and state.inner[0].count == t == 7
    for k in w:
        # 1 - 0.999^t in float32 loses 10 bits of 24.
        np.testing.assert_allclose(w[k], hand[k], rtol=1e-4, atol=1e-5)


def test_clip_is_optax_clip_by_global_norm() -> None:
    zero = jax.tree.map(jnp.zeros_like, normal(0))
    opt = wrap(optax.sgd(1.0), precision(), clip=1.0)
    clip = optax.clip_by_global_norm(1.0)
    for size, clipped in ((10.0, True), (1e-3, False), (0.0, False)):
        g = normal(1, size)
        theirs, _ = clip.update(g, clip.init(g))
        ours, _, metrics = opt.step_with_metrics(g, opt.init(zero), zero)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(g), rtol=1e-6)
        for k in g:
            np.testing.assert_allclose(ours[k], -theirs[k], rtol=1e-6)
            assert clipped or np.array_equal(ours[k], -g[k])
        assert not clipped or np.isclose(float(global_norm(ours)), 1.0, rtol=1e-6)


def test_clipping_each_leaf_is_told_apart() -> None:
    zero, g = jax.tree.map(jnp.zeros_like, normal(0)), normal(1, 10.0)
    ours, _ = (opt := wrap(optax.sgd(1.0), precision(), clip=1.0)).step(g, opt.init(zero), zero)
    assert not any(np.allclose(ours[k], -g[k] / np.linalg.norm(g[k])) for k in g)


# Stopping.


def skip(opt: Any, n: int, state: Any, w: Any, leaf: str = "b") -> Any:
    for _ in range(n):
        bad = {**normal(0), leaf: jnp.full(SHAPES[leaf], jnp.nan)}
        w, state = opt.step(bad, state, w)
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
    _, state = opt.step(normal(1), state, w)
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
    w2, state, metrics = opt.step_with_metrics({**w, "b": jnp.full(4, jnp.nan)}, opt.init(w), w)
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
            updates, state = tx.update(grads, state, params)
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
