"""Loss scales against a pure Python scaler, hand-written traces, and jmp's own code."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from mpjax.optim import (
    DynamicLossScale,
    make_loss_scale,
)
from mpjax.precision import LossScaleSettings

STEPS = 10_000
MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)


class Scaler:
    """The oracle: the rules in plain Python, one float32 rounding a product."""

    def __init__(self, settings: LossScaleSettings) -> None:
        self.s = settings
        self.scale = np.float32(settings.init)
        self.good, self.left = 0, settings.hysteresis
        self.seen: collections.Counter[str] = collections.Counter()

    def step(self, finite: bool) -> tuple[np.float32, int, int]:
        s = self.s
        if finite:
            self.good += 1
            if self.good == s.growth_interval:
                wanted = self.scale * np.float32(s.growth_factor)
                self.seen["cap" if wanted > np.float32(s.max_scale) else "growth"] += 1
                self.scale = min(wanted, np.float32(s.max_scale))
                self.good, self.left = 0, s.hysteresis
        else:
            self.good = 0
            if self.left > 1:
                self.left -= 1
                self.seen["absorbed"] += 1
            else:
                wanted = self.scale * np.float32(s.backoff_factor)
                self.seen["floor" if wanted < np.float32(s.min_scale) else "backoff"] += 1
                self.scale = max(wanted, np.float32(s.min_scale))
        return self.scale, self.good, self.left


def flags(seed: int, steps: int = STEPS) -> np.ndarray:
    """Calm and stormy spells of 50 steps: the calm reach the upper bound, the stormy the lower."""
    rng = np.random.default_rng(seed)
    bad = np.repeat(rng.choice([0.01, 0.15, 0.8], size=-(-steps // 50)), 50)[:steps]
    return rng.random(steps) >= bad


def adjust(scale: Any, finite: Any) -> Any:
    return scale.adjust(finite)


def run(scale: Any, finite: np.ndarray, adjust: Callable[[Any, Any], Any] = adjust) -> list[Any]:
    """The states after each step, of one jitted scan."""

    def body(scale: Any, flag: Any) -> tuple[Any, Any]:
        scale = adjust(scale, flag)
        return scale, scale.state

    out = jax.jit(lambda scale, finite: jax.lax.scan(body, scale, finite)[1])(scale, finite)
    return [np.asarray(x) for x in out]


def same(states: Sequence[np.ndarray], oracle: Sequence[tuple[Any, ...]]) -> bool:
    columns = [np.asarray(c) for c in zip(*oracle, strict=True)]
    assert states[0].dtype == columns[0].dtype == np.float32
    return states[0].tobytes() == columns[0].tobytes() and all(
        np.array_equal(a, b) for a, b in zip(states[1:], columns[1:], strict=True)
    )


def dynamic(**fields: float) -> LossScaleSettings:
    return LossScaleSettings("dynamic", **fields)  # type: ignore[arg-type]


SETTINGS = {
    "hysteresis 1": dynamic(init=2.0**4, growth_interval=5, min_scale=0.5, max_scale=2.0**8),
    "hysteresis 2": dynamic(
        init=2.0**4, growth_interval=4, hysteresis=2, min_scale=0.5, max_scale=2.0**8
    ),
    "hysteresis 3": dynamic(
        init=2.0**15, growth_interval=3, hysteresis=3, min_scale=2.0**12, max_scale=2.0**16
    ),
    "odd factors": dynamic(
        init=9.1, growth_factor=1.7, backoff_factor=0.3, growth_interval=3, hysteresis=2,
        min_scale=0.1, max_scale=1000.1,
    ),
    "growth at every finite step": dynamic(
        init=1.0, growth_factor=1.5, backoff_factor=0.3, growth_interval=1, hysteresis=2,
        min_scale=0.7, max_scale=40.5,
    ),
    "the ends of float32": dynamic(
        init=1.0, growth_factor=2.0**40, backoff_factor=2.0**-40, growth_interval=3,
        hysteresis=2, min_scale=TINY, max_scale=MAX,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_thousand_random_steps_agree_bit_for_bit(name: str) -> None:
    settings, finite = SETTINGS[name], flags(seed=len(name))
    scaler = Scaler(settings)
    with np.errstate(over="ignore", under="ignore"):  # the ends of float32: inf and 0 are clipped
        oracle = [scaler.step(flag) for flag in finite.tolist()]
    assert same(run(make_loss_scale(settings), finite), oracle)
    # Each branch really ran, often.
    kinds = {"growth", "cap", "backoff", "floor"} | (
        {"absorbed"} if settings.hysteresis > 1 else set()
    )
    assert {kind for kind, count in scaler.seen.items() if count >= 30} == kinds, scaler.seen


MUTANTS = {
    "interval + 1, as in flax": {"growth_interval": 4},
    "no floor": {"min_scale": TINY},
    "no cap": {"max_scale": MAX},
    "hysteresis 1": {"hysteresis": 1},
    "hysteresis 3": {"hysteresis": 3},
    "growth in float16": {"growth_factor": float(np.float16(1.7))},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_tells_a_wrong_setting(name: str) -> None:
    settings, finite = SETTINGS["odd factors"], flags(0, 2000)
    oracle = [Scaler(settings)]
    trace = [oracle[0].step(flag) for flag in finite.tolist()]
    assert same(run(make_loss_scale(settings), finite), trace)
    mutant = make_loss_scale(dataclasses.replace(settings, **MUTANTS[name]))  # type: ignore[arg-type]
    assert not same(run(mutant, finite)[:1], [(scale,) for scale, _, _ in trace])


def _refill_each_step(scale: Any, finite: Any) -> Any:
    """DeepSpeed's consecutive_hysteresis=True, which is not our rule."""
    new = scale.adjust(finite)
    value, good, left = new.state
    left = jnp.where(finite, scale.settings.hysteresis, left)
    return jax.tree.unflatten(jax.tree.structure(new), (value, good, left))


def _count_through_bad_steps(scale: Any, finite: Any) -> Any:
    """Finite steps need not follow each other."""
    new = scale.adjust(finite)
    value, good, left = new.state
    return jax.tree.unflatten(
        jax.tree.structure(new), (value, jnp.where(finite, good, scale.state[1]), left)
    )


def _no_reset_at_cap(scale: Any, finite: Any) -> Any:
    """A growth that the cap swallows does not end the run."""
    new = scale.adjust(finite)
    value, good, left = new.state
    held = finite & (good == 0) & (value == scale.value)
    return jax.tree.unflatten(
        jax.tree.structure(new), (value, jnp.where(held, scale.state[1], good), left)
    )


@pytest.mark.parametrize("mutant", [_refill_each_step, _count_through_bad_steps, _no_reset_at_cap])
def test_the_comparison_tells_a_wrong_rule(mutant: Callable[[Any, Any], Any]) -> None:
    settings, finite = SETTINGS["hysteresis 2"], flags(0, 2000)
    scaler = Scaler(settings)
    trace = [scaler.step(flag) for flag in finite.tolist()]
    assert not same(run(make_loss_scale(settings), finite, mutant), trace)


# Traces by hand. "+" is a finite step, "-" one with inf or NaN; below it the scale AFTER the step.
#
# torch.amp.GradScaler (docs.pytorch.org/docs/stable/amp.html, class GradScaler): "If no inf/NaN
# gradients occur for growth_interval consecutive iterations, the scale is multiplied by
# growth_factor; if inf/NaN are found it is multiplied by backoff_factor", at once, without bounds.
# init_scale=8, growth_factor=2, backoff_factor=0.5, growth_interval=2:
#   ++ grows to 16; + then - forgets the one good step and halves to 8; two - in a row halve twice,
#   to 2; + waits, + grows to 4, + waits, + grows to 8.
TORCH = ("+ + + - - - + + + +", [8, 16, 16, 8, 4, 2, 2, 4, 4, 8])
TORCH_SETTINGS = dynamic(init=8.0, growth_interval=2, min_scale=TINY, max_scale=MAX)
# Below 1 torch goes on halving: - from 2 gives 1, 0.5, 0.25.
TORCH_LOW = ("- - -", [1, 0.5, 0.25])
#
# jmp.DynamicLossScale (github.com/google-deepmind/jmp, docstring): "increasing the loss scale every
# `period` steps by `factor` if the grads remain finite, otherwise it reduces the loss scale by
# 1 / factor and resets the counter", and loss_scale = max(1, loss_scale / factor).
# init 2, period=3, factor=2:
#   +++ grows to 4; ++ - resets the count and halves to 2; - to 1; - stays at the floor 1;
#   ++ waits, + grows to 2.
JMP = ("+ + + + + - - - + + +", [2, 2, 4, 4, 4, 2, 1, 1, 1, 1, 2])
JMP_SETTINGS = dynamic(init=2.0, growth_interval=3, max_scale=MAX)
#
# DeepSpeed (www.deepspeed.ai/docs/config-json, fp16): loss_scale_window, hysteresis ("the delay
# shift in dynamic loss scaling"), min_loss_scale; consecutive_hysteresis false (the default): the
# delay is refilled when the scale grows, not at each finite step.
# initial_scale_power=4, loss_scale_window=2, hysteresis=2, min_loss_scale=4:
#   - is absorbed (16, delay spent); + waits; - halves to 8, the finite step did not refill; + +
#   grows to 16 and refills; - is absorbed; - halves to 8; - halves to 4: spent until a growth;
#   - stays at the floor 4; + waits, + grows to 8 and refills; - is absorbed.
DEEPSPEED = ("- + - + + - - - - + + -", [16, 16, 8, 8, 16, 16, 8, 4, 4, 4, 8, 8])
DEEPSPEED_SETTINGS = dynamic(
    init=16.0, growth_interval=2, hysteresis=2, min_scale=4.0, max_scale=MAX
)
#
# Apex (nvidia.github.io/apex/amp.html, max_loss_scale=2.**24, the default for dynamic scaling):
# torch's rule under a cap. init 2^23, window 1: + grows to 2^24, + and + stay there, - halves.
APEX = ("+ + + -", [2.0**24, 2.0**24, 2.0**24, 2.0**23])
APEX_SETTINGS = dynamic(init=2.0**23, growth_interval=1)

TRACES = {
    "torch": (TORCH_SETTINGS, TORCH),
    "torch below one": (dataclasses.replace(TORCH_SETTINGS, init=2.0), TORCH_LOW),
    "jmp": (JMP_SETTINGS, JMP),
    "deepspeed": (DEEPSPEED_SETTINGS, DEEPSPEED),
    "apex": (APEX_SETTINGS, APEX),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_written_out_by_hand(name: str) -> None:
    settings, (steps, expected) = TRACES[name]
    finite = np.array([step == "+" for step in steps.split()])
    assert run(make_loss_scale(settings), finite)[0].tolist() == expected
    scaler = Scaler(settings)  # the oracle stands on the same traces
    assert [scaler.step(flag)[0].item() for flag in finite.tolist()] == expected


@pytest.mark.parametrize("name", ["torch", "deepspeed", "jmp"])
def test_a_hand_trace_is_not_another_librarys(name: str) -> None:
    settings, (steps, expected) = TRACES[name]
    finite = np.array([step == "+" for step in steps.split()])
    others = [
        dataclasses.replace(settings, hysteresis=3 - min(settings.hysteresis, 2)),
        dataclasses.replace(settings, growth_interval=settings.growth_interval + 1),
    ]
    for other in others:
        assert run(make_loss_scale(other), finite)[0].tolist() != expected


@pytest.mark.parametrize(("init", "period", "factor"), [(2.0**10, 5, 2), (2.0**3, 7, 4)])
def test_agrees_with_jmp_step_by_step(init: float, period: int, factor: int) -> None:
    finite = flags(period, 3000)
    ours = DynamicLossScale(init, factor, 1 / factor, period, 1, 1.0, MAX)
    theirs = jmp.DynamicLossScale(jnp.float32(init), jnp.int32(0), period, factor)

    def body(scale: Any, flag: Any) -> tuple[Any, Any]:
        scale = scale.adjust(flag)
        return scale, (scale.loss_scale, scale.counter)

    with jax.numpy_dtype_promotion("standard"):  # jmp multiplies int32 by bool
        values, counters = jax.jit(lambda s, f: jax.lax.scan(body, s, f)[1])(theirs, finite)
    states = run(ours, finite)
    assert states[0].tobytes() == np.asarray(values).tobytes()
    assert np.array_equal(states[1], counters)
    assert (states[0] == 1).sum() > 100 and len(set(states[0].tolist())) > 5
    assert states[0].max() < 1e37  # neither met the end of float32, where the rules differ
