"""LogMax against a plain Python scaler, and against dynamic scaling on gradients that grow."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import Format
from mpjax.models import decoder
from mpjax.optim import (
    DynamicLossScale,
    LogMaxLossScale,
    ScaledGradients,
    make_loss_scale,
    scaled_value_and_grad,
    wrap,
)
from mpjax.precision import LossScaleSettings, get_precision
from mpjax.train import build
from tests.optim.scaled_step import scaled_step

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS = 10_000


class Scaler:
    """The oracle: the docstring in float64, a step at a time."""

    def __init__(self, settings: LossScaleSettings) -> None:
        self.s, self.scale = settings, settings.init
        self.good = self.seen = 0
        self.mean = self.variance = self.headroom = 0.0
        self.seen_kinds: collections.Counter[str] = collections.Counter()
        self.near = False  # of a step of the rounding: float32 may fall on the other side

    def step(self, finite: bool, amax: float) -> float:
        s = self.s
        self.good = self.good + 1 if finite else 0
        if finite and amax > 0:
            self.seen = min(self.seen + 1, math.ceil(1 / (1 - s.decay)))
            rate = max(1 / self.seen, 1 - s.decay)
            off = math.log2(amax) - self.mean
            self.mean += rate * off
            self.variance = (1 - rate) * (self.variance + rate * off**2)
        rate = max(1 / max(self.seen, 1), 1 - s.decay)
        ceiling = math.log2(Format(s.format).max) - self.mean
        ceiling -= s.deviations * math.sqrt(self.variance + rate)
        if not finite:
            self.scale = max(self.scale * s.backoff_factor, s.min_scale)
            if self.seen:
                self.headroom = max(self.headroom, ceiling - math.log2(self.scale))
            self.seen_kinds["backoff"] += 1
            return self.scale
        if self.good == s.growth_interval:
            self.headroom = max(self.headroom - math.log2(s.growth_factor), 0.0)
            self.good = 0
            self.seen_kinds["release"] += 1
        if amax == 0:
            self.scale = min(self.scale * s.growth_factor, s.max_scale)
            self.seen_kinds["zero"] += 1
            return self.scale
        target = ceiling - self.headroom
        self.near = s.power_of_two and abs(target - round(target)) < 1e-3
        wanted = 2.0 ** (math.floor(target) if s.power_of_two else target)
        self.scale = min(max(wanted, s.min_scale), s.max_scale)
        self.seen_kinds[
            "cap" if wanted > s.max_scale else "floor" if wanted < s.min_scale else ""
        ] += 1
        return self.scale


def path(seed: int, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Largest gradients that wander over 60 binades, with zeros, and steps that are not finite."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(size=steps) * 0.3)
    log = 25 * np.sin(drift / 8) - 10 + rng.normal(size=steps)
    amax = np.exp2(log).astype(np.float32)
    amax[rng.random(steps) < 0.02] = 0
    return rng.random(steps) > 0.02, amax


def run(settings: LossScaleSettings, finite: np.ndarray, amax: np.ndarray) -> np.ndarray:
    """The scales after each step, of one jitted scan."""

    def body(scale: Any, step: Any) -> tuple[Any, Any]:
        ok, largest = step
        bad = jnp.where(ok, 1, jnp.nan)
        grads = {"a": -largest * bad * jnp.ones(2), "b": (largest * 0.5)[None]}
        scale = scale.adjust(ok, grads)
        return scale, scale.value

    fn = jax.jit(lambda scale, steps: jax.lax.scan(body, scale, steps)[1])
    return np.asarray(fn(make_loss_scale(settings), (finite, amax)), np.float64)


def compare(settings: LossScaleSettings, scales: np.ndarray, oracle: Scaler, steps: Any) -> float:
    """The largest relative difference; where float32 may round down to either side, either will."""
    worst, either = 0.0, 0
    for ours, (finite, amax) in zip(scales.tolist(), steps, strict=True):
        oracle.near = False
        theirs = oracle.step(bool(finite), float(amax))
        if oracle.near and ours / theirs in (0.5, 2):
            oracle.scale, either = ours, either + 1
        else:
            worst = max(worst, abs(ours / theirs - 1))
    assert either <= 2e-3 * len(scales)
    return worst


def logmax(**fields: Any) -> LossScaleSettings:
    return LossScaleSettings("logmax", **fields)


SETTINGS = {
    "default": logmax(growth_interval=40),
    "e5m2, unrounded": logmax(
        format="e5m2", deviations=3.0, decay=0.95, growth_interval=30, power_of_two=False,
        growth_factor=1.5, backoff_factor=0.3, min_scale=2.0**-9, max_scale=2.0**21,
        init=0.7,
    ),
    "bfloat16": logmax(format="bfloat16", decay=0.0, growth_interval=20, max_scale=2.0**120),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_thousand_random_steps_agree(name: str) -> None:
    """Within 1e-3 (float32 sums over 100 steps, 2e-6 of numbers up to 60, in an exponent), and
    exactly where the scale is rounded to a power of two."""
    settings = SETTINGS[name]
    finite, amax = path(len(name))
    oracle = Scaler(settings)
    worst = compare(
        settings, run(settings, finite, amax), oracle, list(zip(finite, amax, strict=True))
    )
    assert worst <= (0 if settings.power_of_two else 1e-3)
    assert {"backoff", "release", "zero", ""} <= {k for k, n in oracle.seen_kinds.items() if n > 30}
    if name != "bfloat16":
        assert oracle.seen_kinds["cap"] > 10 and oracle.seen_kinds["floor"] > 10


MUTANTS: dict[str, dict[str, Any]] = {
    "c": {"deviations": 3.1},
    "decay": {"decay": 0.96},
    "format": {"format": "e4m3"},
    "interval": {"growth_interval": 31},
    "growth": {"growth_factor": 1.6},
    "backoff": {"backoff_factor": 0.4},
    "floor": {"min_scale": 2.0**-8},
    "cap": {"max_scale": 2.0**22},
    "rounded": {"power_of_two": True},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_tells_a_wrong_setting(name: str) -> None:
    settings = SETTINGS["e5m2, unrounded"]
    finite, amax = path(3, 1500)
    steps = list(zip(finite, amax, strict=True))
    wrong = dataclasses.replace(settings, **MUTANTS[name])
    assert compare(settings, run(wrong, finite, amax), Scaler(settings), steps) > 0.01


# --- before the overflow -------------------------------------------------------------------------


def product(w: Any, x: Any) -> Any:
    """A mean over 1024; its gradient, x / 1024, passes through float16."""
    return jnp.sum((w * x).astype(jnp.float32)) * jnp.float32(2.0**-10)


def train(scale: Any, sizes: np.ndarray) -> tuple[int, int]:
    """Steps skipped and gradients lost, when step t's gradient is sizes[t] (1, 2^-10)."""
    fn = jax.jit(scaled_value_and_grad(product))
    adjust = jax.jit(lambda scale, finite, grads: scale.adjust(finite, grads))
    skipped = lost = 0
    for size in sizes:
        x = jnp.asarray(np.array([size, size * 2.0**-10]) * 2.0**10, jnp.float16)
        _, grads, finite = fn(scale, jnp.ones(2, jnp.float16), x)
        skipped += not finite
        lost += bool(finite) and bool((grads == 0).any())
        scale = adjust(scale, finite, grads)
    return skipped, lost


def test_growing_gradients_skip_no_step_where_dynamic_scaling_skips_many() -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp2(np.arange(54) / 3 - 14 + rng.uniform(-0.3, 0.3, 54))  # doubles every 3 steps
    assert train(LogMaxLossScale(decay=0.9), sizes) == (0, 0)
    # the controls: from the largest scale, and from one at which nothing overflows at first
    assert train(DynamicLossScale(2.0**24), sizes)[0] >= 10
    assert train(DynamicLossScale(2.0**16, growth_interval=5), sizes)[0] >= 5


@pytest.mark.parametrize("rate", [0.1, 1.0, 4.0])
def test_no_exponential_growth_overflows(rate: float) -> None:
    """The claim of the docstring, c = 4 bits a step; c = 1 overflows."""

    def overflows(deviations: float) -> int:
        settings = logmax(
            deviations=deviations, power_of_two=False, min_scale=2.0**-120, max_scale=2.0**120,
            format="bfloat16", decay=0.9,
        )  # fmt: skip
        steps = min(200, int(200 / rate))
        log = rate * np.arange(steps) - 100
        amax = np.exp2(log).astype(np.float32)
        scales = run(settings, np.ones(steps, bool), amax)
        return int((np.log2(scales[:-1]) + log[1:] > np.log2(Format("bfloat16").max)).sum())

    assert overflows(4.0) == 0
    assert rate == 0.1 or overflows(1.0) > 0


def test_a_larger_cotangent_inside_is_learnt_from_the_overflow() -> None:
    """Inside, cotangents are 2^7 times the weight's gradient, which is all that LogMax sees."""

    def loss(w: Any) -> Any:
        small = w * jnp.float16(2.0**-7)  # d/dw is 2^-7 of what small gets
        return jnp.sum((small * jnp.float16(2.0**6)).astype(jnp.float32)) * jnp.float32(0.5)

    def skips(scale: Any) -> list[bool]:
        fn = jax.jit(scaled_value_and_grad(loss))
        adjust = jax.jit(lambda scale, finite, grads: scale.adjust(finite, grads))
        out = []
        for _ in range(60):
            _, grads, finite = fn(scale, jnp.ones(2, jnp.float16))
            out.append(not finite)
            scale = adjust(scale, finite, grads)
        return out

    seen = skips(LogMaxLossScale(deviations=2.0))
    assert 1 <= sum(seen) <= 8 and not any(seen[-40:])
    # the control: with the headroom forgotten every other step is skipped
    forgetful = skips(LogMaxLossScale(deviations=2.0, growth_interval=1, growth_factor=2.0**20))
    assert sum(forgetful) > 20


def test_a_scale_so_low_that_all_gradients_vanish_rises_again() -> None:
    scale = LogMaxLossScale(init=1.0, min_scale=2.0**-20)
    for expected in (2.0, 4.0, 8.0):
        scale = scale.adjust(jnp.bool_(True), {"w": jnp.zeros(3)})
        assert scale.value == expected
    assert LogMaxLossScale(max_scale=2.0).adjust(jnp.bool_(True), jnp.zeros(1)).value == 2.0


# --- in the optimizer and the train step ---------------------------------------------------------


def test_a_skipped_step_changes_only_the_scale_and_the_counters() -> None:
    precision = get_precision("fp16", loss_scale="logmax:init=64,c=3")
    opt = wrap(optax.adam(0.1), precision, clip=1.0)
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    state = opt.init(params)
    step = scaled_step(opt)
    good = {"w": jnp.full(3, 2.0**-6), "b": jnp.full(2, 2.0**-9)}
    params, state = step(good, state, params)
    assert state.loss_scale.value == 2.0**24  # 64 2^-12, the cap
    bad = {"w": jnp.array([1.0, jnp.nan, 1.0]), "b": jnp.ones(2)}
    after, skipped = step(bad, state, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, after, params))
    assert jax.tree.all(jax.tree.map(np.array_equal, skipped.inner, state.inner))
    assert skipped.gate.skipped == 1 and skipped.loss_scale.value == 2.0**23
    before, now = state.loss_scale.state, skipped.loss_scale.state
    assert [x.item() for x in before[2:5]] == [x.item() for x in now[2:5]]  # no statistics


def test_clipping_does_not_hide_the_gradient_from_it() -> None:
    precision = get_precision("fp16", loss_scale="logmax")
    grads = {"w": jnp.array([2.0**5, 0.0])}
    ends = []
    for clip in (None, 2.0**-3):
        opt = wrap(optax.sgd(0.1), precision, clip=clip)
        state = opt.init({"w": jnp.ones(2)})
        ends.append(
            opt.step(ScaledGradients(grads), state, {"w": jnp.ones(2)})[1].loss_scale.value.item()
        )
    assert ends == [2.0**6, 2.0**6]  # 16 - 5 - 4, rounded down: 65504 is below 2^16


def test_eight_devices_scale_by_the_largest_gradient_of_all() -> None:
    def scales(mesh: str | None) -> tuple[list[float], list[float]]:
        model = decoder(
            "tiny", get_precision("fp16", loss_scale="logmax:c=3,decay=0.9"), vocabulary=64,
            layers=1, width=32, heads=8, context=16,
        )  # fmt: skip
        state, step = build(model, optax.sgd(0.5), mesh)
        ids = np.random.default_rng(0).integers(0, 64, (8, 9)).astype(np.int32)
        batch = {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}
        seen, means = [], []
        for _ in range(3):
            state, metrics = step(state, batch)
            seen.append(float(metrics["loss_scale"]))
            means.append(float(metrics["log2_gradient_mean"]))
        assert float(metrics["skipped"]) == 0
        return seen, means

    one, many = scales(None), scales("data=2,fsdp=2,tensor=2")
    assert one[0] == many[0] and one[0][0] == 1 and one[0][1] > 2.0**8
    np.testing.assert_allclose(one[1], many[1], atol=0.02)  # bits; float16 sums in other orders
    assert one[1][1] != 0


# --- what is refused -----------------------------------------------------------------------------


def test_adjust_without_gradients_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logmax reads the gradients; write scale.adjust"):
        LogMaxLossScale().adjust(jnp.bool_(True))


def test_no_gate_is_refused() -> None:
    with pytest.raises(ConfigError, match="gate: a logmax loss scale needs the finite gate"):
        wrap(optax.sgd(0.1), get_precision("fp16", loss_scale="logmax"), gate=False)
