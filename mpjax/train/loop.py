"""The training loop: dispatches step n + 1 before it reads the metrics of step n."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mpjax.train.step import TrainState, TrainStep

Action = Callable[[int, TrainState], None]


def fit(
    state: TrainState,
    step: TrainStep,
    batches: Iterator[Any],
    *,
    steps: int,
    report: Callable[[dict[str, Any]], None],
    every: Sequence[tuple[int, Action]] = (),
    stop: Callable[[], str | None] = lambda: None,
) -> TrainState:
    """Trains until a number of steps is reached.

    Metrics are fetched one step late, so that the devices never wait for the host.

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

    Returns:
      The last state.

    Raises:
      TrainingStopped: the loss scale cannot fall and gradients stay non-finite.
    """
    pending: tuple[int, Any, int] | None = None
    clock = time.perf_counter()

    def flush(restart: bool = False) -> None:
        nonlocal pending, clock
        if pending is not None:
            number, metrics, tokens = pending
            pending = None
            # not jax.device_get, which takes the host four times as long for a few scalars
            host = {key: np.asarray(value).item() for key, value in metrics.items()}
            now = time.perf_counter()
            stuck = host.pop("stuck")
            report({"step": number, "tokens_per_s": tokens / (now - clock)} | host)
            clock = now
            if stuck:
                step.optimizer.check_alive(state.opt_state, state.params, stuck)
        if restart:
            clock = time.perf_counter()

    for number in range(int(state.step) + 1, steps + 1):
        batch = next(batches)
        tokens = int(np.size(jax.tree.leaves(batch)[0])) * jax.process_count()
        state, metrics = step(state, batch)
        flush()
        pending = (number, metrics, tokens)
        reason = stop()
        due = [act for n, act in every if number == steps or reason or (n and number % n == 0)]
        if due:
            flush()
            for act in due:
                act(number, state)
            flush(restart=True)
        if reason:
            break
    flush()
    return state
