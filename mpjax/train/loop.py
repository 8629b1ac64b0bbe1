"""The training loop: dispatches step n + 1 before it reads the metrics of step n.

Steps that take less than 0.2 s are dispatched and reported in bursts of about that time: the
host's caches are cold when a step has run, and what it does for one step alone takes several times
as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np

from mpjax.errors import ConfigError, TrainingStopped, brief, explains_calls, is_whole
from mpjax.train.step import TrainState, TrainStep
from mpjax.typing import Batch, Metrics, Settings

Action: TypeAlias = Callable[[int, TrainState], None]
Stuck: TypeAlias = Callable[[int, TrainState, Batch], None]
_BURST_SECONDS, _MOST_STEPS = 0.2, 16


@explains_calls
def fit(
    state: TrainState,
    step: TrainStep,
    batches: Iterable[Batch],
    *,
    steps: int,
    report: Callable[[Settings], None],
    every: Sequence[tuple[int, Action]] = (),
    stop: Callable[[], str | None] = lambda: None,
    stuck: Stuck = lambda number, state, batch: None,
) -> TrainState:
    """Trains until a number of steps is reached.

    Metrics are fetched at least one step late, so that the devices never wait for the host, and
    at most about 0.2 s later than that.

    Args:
      state: where to begin; `state.step` steps count as done.
      step: from `build` or `make_train_step`; it donates the state.
      batches: host batches of this process, at the right position.
      steps: steps of the whole run.
      report: called once a step, in order, with `step`, `loss`, `tokens_per_s`, `loss_scale`,
        `skipped` and what else the step measures, as Python numbers.
      every: (n, action) pairs: `action(step, state)` after every n-th step and after the last;
        all earlier steps have been reported by then. The action must not keep the state.
      stop: asked after each step; a reason (a signal's name) ends the run early, actions run.
      stuck: called with the number of the last step, its state and its host batch before
        TrainingStopped is raised; the gate has kept the state as it was before that step.

    Returns:
      The last state.

    Raises:
      ConfigError: there are fewer batches than steps, or they are something else.
      TrainingStopped: the loss scale cannot fall and gradients stay non-finite.
    """
    for name, value in (("steps", steps), *(("every", n) for n, _ in every)):
        if not is_whole(value, 0):
            raise ConfigError(f"fit: {name}={brief(value)}; give a whole number of 0 or above")
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise ConfigError(f"fit: batches are {brief(batches)}; give an iterator of batches")
    batches = iter(batches)
    running: list[tuple[int, Metrics, int]] = []
    burst = 1
    clock = time.perf_counter()

    def flush(late: int) -> None:
        """Waits for all steps but the `late` last ones, and reports them."""
        nonlocal clock, burst
        done, running[:] = running[: len(running) - late], running[len(running) - late :]
        if not done:
            return
        done[-1][1]["loss"].block_until_ready()
        now = time.perf_counter()
        seconds, clock = now - clock, now
        burst = min(max(int(_BURST_SECONDS * len(done) / seconds), 1), _MOST_STEPS)
        tokens_per_s = sum(tokens for _, _, tokens in done) / seconds
        for number, metrics, _ in done:
            # not jax.device_get, which takes the host four times as long for a few scalars
            host = {key: np.asarray(value).item() for key, value in metrics.items()}
            stuck_steps = host.pop("stuck")
            report({"step": number, "tokens_per_s": tokens_per_s} | host)
            if stuck_steps:
                try:
                    taken, plain = step.active(state)
                    taken.optimizer.check_alive(plain.opt_state, plain.params, stuck_steps)
                except TrainingStopped:
                    stuck(int(state.step), state, batch)
                    raise

    for number in range(int(state.step) + 1, steps + 1):
        try:
            batch = next(batches)
        except StopIteration:
            raise ConfigError(
                f"fit: batches ended before step {number} of {steps}; give an endless iterator,"
                " such as itertools.cycle(batches), or fewer steps"
            ) from None
        state, metrics = step(state, batch)
        tokens = sum(map(np.size, jax.tree.leaves(batch)[:1])) * jax.process_count()
        running.append((number, metrics, tokens))
        if len(running) > burst:
            flush(late=1)
        reason = stop()
        due = [act for n, act in every if number == steps or reason or (n and number % n == 0)]
        if due:
            flush(late=0)
            for act in due:
                act(number, state)
            clock = time.perf_counter()
        if reason:
            break
    flush(late=0)
    return state
