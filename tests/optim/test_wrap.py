"""The wrapped optimizer: its order and its arithmetic, against float64 by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.optim import ScaledGradients, global_norm, wrap
from mpjax.precision import get_precision

pytestmark = pytest.mark.usefixtures("fast_compile")

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
        out[name, kind] = opt.step(ScaledGradients(grads), opt.init(zero), zero)[0]
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
    out, state = opt.step(ScaledGradients(times(g, 1024.0)), state, w)
    hand = {k: float64(w)[k] - 0.5 * float64(g)[k] for k in w}
    mutant = {k: float64(w)[k] - 0.25 * float64(g)[k] for k in w}
    assert state.loss_scale.value == 2048.0
    for k in w:
        np.testing.assert_allclose(out[k], hand[k], rtol=1e-5)
    assert not close(out, mutant)
    # the next step is scaled by the new scale
    out, _ = opt.step(ScaledGradients(times(g, 2048.0)), state, out)
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
        w, state = step(ScaledGradients(scaled), state, w)
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
