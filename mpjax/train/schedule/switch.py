"""A train step that changes its Precision while a run goes on.

There is one program for each precision, compiled when it first runs and kept. Decisions are made
between steps, on the host, from numbers that lie in the state, so that a run that is resumed makes
the same ones. The host waits for the devices once a window of a dynamic schedule, and never for
the others.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpjax.errors import ConfigError
from mpjax.interpret.monitor.monitor import monitor
from mpjax.interpret.monitor.report import Monitored
from mpjax.precision import PrecisionSchedule
from mpjax.precision.triggers import Evidence
from mpjax.train.room import free_bytes
from mpjax.train.schedule.switch_state import (
    entered,
    plain_state,
    scheduled,
    switch_of,
    updated,
)
from mpjax.train.step import StepFn, TrainState, TrainStep, compile_step
from mpjax.typing import Array, Batch, Settings

log = logging.getLogger("mpjax.train")

_SAMPLE = 8192  # numbers of each tensor that are measured for underflow


@dataclasses.dataclass(frozen=True)
class SwitchingStep(TrainStep):
    """A train step of several precisions, called as any TrainStep.

    Metrics hold `precision`, the index of the step's precision in the schedule, and at the first
    step after a switch `switch`, a text with the reason, which is logged too.

    Args:
      schedule: which precision comes when.
      steps: the step of each precision alone.
    """

    schedule: PrecisionSchedule | None = None
    steps: tuple[TrainStep, ...] = ()

    def active(self, state: TrainState) -> tuple[TrainStep, TrainState]:
        """Returns the step of the precision that ran last, and the state as it sees it."""
        index = int(switch_of(state).active)
        return self.steps[index], plain_state(state, index)


class _Chooser:
    """`chooser(state, batch)`: decides, then runs the program of the precision."""

    def __init__(
        self, schedule: PrecisionSchedule, steps: Sequence[TrainStep], programs: Sequence[StepFn]
    ) -> None:
        self._schedule, self._steps, self._programs = schedule, steps, programs
        self._turn = schedule.turn if schedule.kind == "late" else 0
        # Two arrays of the state that was returned last, and their values on the host.
        self._known: tuple[Array, Array, tuple[int, int]] | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        number, index = self._where(state)
        before, reason = index, ""
        if self._turn:
            index = int(number >= self._turn)
            reason = f"the last {self._schedule.last:g} of {self._schedule.steps} steps"
        elif number and number % self._schedule.window == 0:
            state, index, reason = self._judge(state, batch, number, index)
        text = ""
        if index != before:
            labels = self._schedule.labels
            text = f"{labels[before]} -> {labels[index]}: {reason}"
            log.info("step %d: %s", number + 1, text)
            state = state._replace(switch=entered(switch_of(state), before, index, number))
        state, metrics = self._programs[index](state, batch)
        self._known = state.step, switch_of(state).active, (number + 1, index)
        return state, metrics | ({"switch": text} if text else {})

    def _where(self, state: TrainState) -> tuple[int, int]:
        """Steps taken and the active precision; the devices are asked only about another state."""
        known, active = self._known, switch_of(state).active
        if known and state.step is known[0] and active is known[1]:
            return known[2]
        number, index = jax.device_get((state.step, active))
        return int(number), int(index)

    def _judge(
        self, state: TrainState, batch: Batch, number: int, index: int
    ) -> tuple[TrainState, int, str]:
        triggers = self._schedule.triggers
        assert triggers is not None
        underflow = self._underflow(state, batch, index)
        switch: Any = switch_of(state)._replace(loss_scales=(), model_states=())
        switch, skipped = jax.device_get((switch, state.opt_state.gate.skipped))
        if number - int(switch.since) < triggers.window:  # the run began within this window
            return state, index, ""
        # float64 on the host: the same bits wherever the state comes from
        losses = switch.losses[np.isfinite(switch.losses)].astype(np.float64)
        loss, spread = (losses.mean(), losses.std()) if losses.size else (np.nan, np.nan)
        evidence = Evidence(
            high=index > 0,
            windows=(number - int(switch.since)) // triggers.window,
            trips=int(switch.trips),
            skips=(int(skipped) - int(switch.skipped)) / triggers.window,
            loss=float(loss),
            best=float(switch.best),
            spread=float(switch.spread),
            underflow=underflow,
            free=_free() if triggers.headroom else np.inf,
        )
        verdict = triggers.judge(evidence)
        new: Settings = {"skipped": skipped}
        if loss < switch.best:
            new |= {"best": np.float32(loss), "spread": np.float32(spread)}
        state = state._replace(switch=updated(switch_of(state), new))
        if verdict.reason and not verdict.switch:
            log.info("step %d: %s", number + 1, verdict.reason)
        return state, 1 - index if verdict.switch else index, verdict.reason

    @functools.cached_property
    def _monitors(self) -> list[Callable[[TrainState, Batch], Monitored]]:
        """For each precision, a program that measures its backward pass."""
        options: Any = {"what": ("activation_gradients",), "sample": _SAMPLE}
        functions = [
            monitor(step.function, formats=(self._schedule.measured,), **options)
            for step in self._steps
        ]
        return [jax.jit(lambda *args, f=f: f(*args)[1]) for f in functions]

    def _underflow(self, state: TrainState, batch: Batch, index: int) -> float:
        format = self._schedule.measured
        if not format:
            return float("nan")
        evidence = jax.device_get(self._monitors[index](plain_state(state, index), batch))
        found = list(evidence.activation_gradients.values())
        count = sum(np.sum(s.size) for s in found)
        # What has underflowed already is a zero.
        lost = sum(np.sum((s.zeros + s.underflow(format)) * s.size) for s in found)
        return float(lost / count)


def _free() -> float:
    """GB free on the fullest device of all processes."""
    free = min(free_bytes(device) for device in jax.local_devices()) / 1e9
    if jax.process_count() == 1:
        return free
    return float(multihost_utils.process_allgather(np.float64(free)).min())


def make_switching_step(
    schedule: PrecisionSchedule, steps: Sequence[TrainStep], shardings: TrainState | None = None
) -> SwitchingStep:
    """Returns the step that runs one of several, as a schedule says.

    Args:
      schedule: of two precisions.
      steps: of each, from `make_train_step`.
      shardings: of the state of the whole run; needed with a mesh.

    Raises:
      ConfigError: the schedule needs the length of the run, or a gate that the steps lack.
    """
    first = steps[0]
    if schedule.triggers:
        optimizer, window = first.optimizer, schedule.window
        if not optimizer.gate:
            raise ConfigError(
                "precision schedule: dynamic counts skipped steps, which needs the finite gate;"
                " leave gate on"
            )
        if optimizer.patience < 2 * window:
            raise ConfigError(
                f"precision schedule: patience={optimizer.patience} stops the run before a window"
                f" of {window} steps can promote it; raise patience to {2 * window} or lower window"
            )
    functions = [scheduled(step, index) for index, step in enumerate(steps)]
    programs = [
        compile_step(function, first.mesh, shardings, first.frozen) for function in functions
    ]
    # Uncompiled, it decides likewise.
    return SwitchingStep(
        _Chooser(schedule, steps, functions), _Chooser(schedule, steps, programs), first.optimizer,
        first.mesh, shardings, first.accumulate, None, first.frozen, first.check, schedule,
        tuple(steps),
    )  # fmt: skip
