"""The loop: one step late, every step once, actions that see all of it, stop, resume, clock."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.data import batches
from mpjax.errors import TrainingStopped
from mpjax.models import decoder
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.train import build, init_state, loop, make_train_step
from mpjax.train.loop import fit

pytestmark = pytest.mark.usefixtures("fast_compile")

BATCH = {"inputs": np.zeros((2, 3), np.int32)}  # 6 tokens


class State(NamedTuple):
    step: Any
    params: Any = None
    opt_state: Any = None


class Metric:
    """A scalar on a device that says when it is fetched."""

    def __init__(self, value: Any, fetched: Any, waited: Any = lambda: None) -> None:
        self._value, self._fetched, self._waited = value, fetched, waited

    def block_until_ready(self) -> None:
        self._waited()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        self._fetched()
        return np.asarray(self._value, dtype)


class Recorder:
    """A train step on no device: it notes what happens, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.optimizer = self

    def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        number = state.step + 1
        self.events.append(("dispatch", number))
        metrics = {
            "loss": Metric(
                number / 2,
                lambda: self.events.append(("fetch", number)),
                lambda: self.events.append(("wait", number)),
            ),
            "stuck": np.int32(0),
        }
        return State(number), metrics

    def report(self, record: dict[str, Any]) -> None:
        self.events.append(("report", record["step"]))

    def act(self, name: str) -> Any:
        return lambda number, state: self.events.append((name, number))

    def of(self, kind: str) -> list[int]:
        return [number for name, number in self.events if name == kind]


def run(step: Recorder, start: int = 0, steps: int = 5, **more: Any) -> State:
    return fit(State(start), step, itertools.repeat(BATCH), steps=steps, report=step.report, **more)


def is_late_by_one(events: list[tuple[str, int]], steps: int) -> bool:
    """Whether each step was dispatched before the one before it was waited for or fetched."""
    at = {event: place for place, event in enumerate(events)}
    return all(
        at["dispatch", n + 1] < min(at["fetch", n], at.get(("wait", n), at["fetch", n]))
        for n in range(1, steps)
    )


def test_the_next_step_is_dispatched_before_the_last_ones_metrics_are_fetched(monkeypatch):
    monkeypatch.setattr(loop, "_MOST_STEPS", 1)
    step = Recorder()
    run(step)
    assert is_late_by_one(step.events, 5)
    # late by one and not by more: a run of long steps that dies has reported all but one
    at = {event: place for place, event in enumerate(step.events)}
    assert all(at["report", n] < at["dispatch", n + 2] for n in range(1, 4))


def test_short_steps_go_in_bursts_that_end_at_an_action(monkeypatch):
    monkeypatch.setattr(loop, "_MOST_STEPS", 3)
    step = Recorder()
    run(step, steps=12, every=((7, step.act("act")),))
    assert is_late_by_one(step.events, 6)
    at = {event: place for place, event in enumerate(step.events)}
    # step 1 alone, then three at a time; no more than four are in flight
    assert at["dispatch", 2] < at["report", 1] < at["dispatch", 3]
    assert at["dispatch", 5] < at["report", 2] < at["report", 4] < at["dispatch", 6]
    assert at["report", 7] < at["act", 7] < at["dispatch", 8]
    assert step.of("report") == list(range(1, 13)) and step.of("act") == [7, 12]


def test_a_loop_that_waits_for_each_step_is_not_late():
    step, state = Recorder(), State(0)
    for number in range(1, 6):
        state, metrics = step(state, BATCH)
        step.report({"step": number, "loss": np.asarray(metrics["loss"])})
    assert not is_late_by_one(step.events, 5)


def finished_at_next_dispatch(train: Any) -> list[bool]:
    """Drives a compiled step of some 0.1 s; whether each was over when the next was dispatched."""
    found: list[bool] = []
    previous: list[Any] = []

    @jax.jit
    def compiled(number: Any) -> tuple[Any, Any]:
        x = jnp.full((700, 700), number, jnp.float32)  # XLA runs inline what it holds for cheap
        for _ in range(8):
            x = jnp.tanh(x @ x)
        return number + 1, {"loss": x[0, 0], "stuck": jnp.int32(0)}

    def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        found.extend(metrics["loss"].is_ready() for metrics in previous[-1:])
        number, metrics = compiled(state.step)
        previous.append(metrics)
        return State(number), metrics

    jax.block_until_ready(compiled(jnp.int32(0)))
    train(State(jnp.int32(0)), step)
    return found


def test_nothing_waits_for_the_device_on_the_way():
    def ours(state: State, step: Any) -> None:
        fit(state, step, itertools.repeat(BATCH), steps=5, report=lambda record: None)

    def waits(state: State, step: Any) -> None:
        for _ in range(5):
            state, metrics = step(state, BATCH)
            jax.device_get(metrics)

    assert finished_at_next_dispatch(waits) == [True] * 4
    # each would be False if the host were never held up; one is enough to tell the two apart
    assert not all(finished_at_next_dispatch(ours))


def test_every_step_is_reported_once_and_in_order():
    step = Recorder()
    state = run(step)
    assert state.step == 5
    assert step.of("report") == step.of("dispatch") == step.of("fetch") == [1, 2, 3, 4, 5]


def test_a_report_holds_python_numbers_and_not_the_loops_own():
    records: list[dict[str, Any]] = []
    fit(State(0), Recorder(), iter([BATCH]), steps=1, report=records.append)
    (record,) = records
    assert set(record) == {"step", "tokens_per_s", "loss"}
    assert record["loss"] == 0.5 and {type(value) for value in record.values()} == {int, float}


def test_actions_come_every_n_steps_and_after_the_last_and_see_all_reported():
    step = Recorder()
    run(step, every=((2, step.act("two")), (0, step.act("end")), (5, step.act("five"))))
    assert (step.of("two"), step.of("end"), step.of("five")) == ([2, 4, 5], [5], [5])
    for place, (name, number) in enumerate(step.events):
        if name in ("two", "end", "five"):
            before = [n for kind, n in step.events[:place] if kind == "report"]
            assert before == list(range(1, number + 1))
    assert [name for name, _ in step.events[-3:]] == ["two", "end", "five"]  # as they are listed


def test_an_action_gets_the_state_of_its_step():
    seen = []
    run(Recorder(), every=((2, lambda number, state: seen.append((number, state.step))),))
    assert seen == [(2, 2), (4, 4), (5, 5)]


def test_a_stop_reports_all_acts_once_and_takes_no_further_step():
    step, taken = Recorder(), []

    def data() -> Any:
        for number in itertools.count(1):
            taken.append(number)
            yield BATCH

    answers = iter([None, None, "SIGTERM", AssertionError])
    state = fit(
        State(0), step, data(), steps=9, report=step.report,
        every=((2, step.act("act")), (0, step.act("end"))), stop=lambda: next(answers),
    )  # fmt: skip
    assert state.step == 3 and taken == [1, 2, 3]
    assert step.of("report") == [1, 2, 3]
    assert (step.of("act"), step.of("end")) == ([2, 3], [3])


def test_a_resumed_run_goes_on_at_the_states_step():
    step = Recorder()
    state = run(step, start=3, steps=6, every=((2, step.act("act")),))
    assert state.step == 6
    assert step.of("report") == [4, 5, 6] and step.of("act") == [4, 6]


def test_a_run_that_is_done_takes_no_step_and_no_batch():
    step = Recorder()
    assert fit(State(5), step, iter([]), steps=5, report=step.report).step == 5
    assert step.events == []


def test_tokens_per_second_leave_out_what_actions_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Timed(Recorder):
        """The device needs 2 s a step, which pass while the host waits for it."""

        def __call__(self, state: State, batch: Any) -> tuple[State, dict[str, Any]]:
            state, metrics = super().__call__(state, batch)
            metrics["loss"] = Metric(0.0, lambda: None, lambda: now.__setitem__(0, now[0] + 2))
            return state, metrics

    def evaluate(number: int, state: State) -> None:
        now[0] += 1000

    records: list[dict[str, Any]] = []
    fit(
        State(0), Timed(), itertools.repeat(BATCH), steps=7, report=records.append,
        every=((3, evaluate),),
    )  # fmt: skip
    assert now[0] == 7 * 2 + 3 * 1000  # the actions did run
    assert [record["tokens_per_s"] for record in records] == [6 / 2] * 7


# --- with real steps --------------------------------------------------------------------------


def loss_fn(params, batch, *, state, key, train):
    del key, train
    return jnp.sum(params["good"]) + jnp.sum(params["bad"]["w"] * batch["x"]), state


def toy(patience: int) -> Any:
    precision = get_precision("fp16", loss_scale="dynamic:init=1,min=1")
    optimizer = wrap(optax.sgd(0.1), precision, patience=patience)
    params = {"bad": {"w": jnp.ones(2)}, "good": jnp.ones(3)}
    return init_state(params, optimizer), make_train_step(loss_fn, optimizer)


def toy_batches(text: str) -> Any:
    return ({"x": np.full(2, np.nan if letter == "x" else 1, np.float32)} for letter in text)


def test_a_run_that_cannot_recover_stops_with_the_path_of_the_gradient():
    state, step = toy(patience=3)
    records: list[dict[str, Any]] = []
    with pytest.raises(TrainingStopped, match=r"^bad/w: gradient is not finite, 3 steps in a row"):
        fit(state, step, toy_batches("..xxx....."), steps=10, report=records.append)
    # the step that ends it is reported too, once
    assert [(r["step"], r["skipped"]) for r in records] == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3)]


def test_a_run_that_recovers_in_time_goes_on():
    state, step = toy(patience=3)
    records: list[dict[str, Any]] = []
    state = fit(state, step, toy_batches("xx.xx.xx."), steps=9, report=records.append)
    assert int(state.step) == 9 and records[-1]["skipped"] == 6


def bits(tree: Any) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_fit_is_the_bare_loop_bit_for_bit_and_so_is_a_resumed_one():
    model = decoder("tiny", "fp16", layers=1, width=16, heads=2, dropout=0.5)
    start, step = build(model, optax.adam(1e-2), seed=1)
    tokens = np.arange(500) % 251

    def data() -> Any:
        return batches(tokens, batch=2, seq=8, seed=0)

    def copy(state: Any) -> Any:
        return jax.tree.map(jnp.copy, state)

    reference, losses = copy(start), []
    for batch in itertools.islice(data(), 6):
        reference, metrics = step(reference, batch)
        losses.append(float(metrics["loss"]))

    records: list[dict[str, Any]] = []
    whole = fit(copy(start), step, data(), steps=6, report=records.append)
    assert bits(whole) == bits(reference)
    assert [record["loss"] for record in records] == losses
    assert {"step", "loss", "tokens_per_s", "loss_scale", "skipped"} <= set(records[0])

    first, second = data(), data()
    half = fit(copy(start), step, first, steps=3, report=records.append)
    second.set_state(first.get_state())
    assert bits(fit(copy(half), step, second, steps=6, report=records.append)) == bits(reference)
    # the comparison can fail: one batch further on is another run
    other = data()
    other.set_state(first.get_state())
    next(other)
    assert bits(fit(half, step, other, steps=6, report=records.append)) != bits(reference)
