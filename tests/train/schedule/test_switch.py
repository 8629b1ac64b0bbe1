"""A schedule of Precision in training: when it switches, why, and what goes on over a switch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError, TrainingStopped
from mpjax.formats.delayed import AmaxHistory
from mpjax.precision import Precision, Triggers, get_precision
from mpjax.precision.schedule import dynamic, fixed, late, mixed
from mpjax.train import SwitchingStep, build, room
from mpjax.train.checkpoint.checkpointer import Checkpointer
from mpjax.train.loop import fit
from mpjax.train.report.memory import state_bytes
from mpjax.train.schedule import switch
from mpjax.train.schedule.switch_state import entered, joined

pytestmark = pytest.mark.usefixtures("fast_compile")

BF16 = "p=f32,c=bf16,o=bf16"
FP16 = get_precision("fp16", loss_scale="dynamic:init=1024,interval=1000")
QUICK = Triggers(window=4, skips=0.5, rise=1.0, hold=1)
TRACED: list[str] = []  # the compute dtype of each program that was traced


@dataclasses.dataclass(frozen=True)
class Toy:
    """Linear regression in bare JAX that computes as its Precision says."""

    precision: Precision
    stateful: bool = False
    axes: Any = None

    def sharded(self, shard: Any) -> Toy:
        return self

    def init(self, key: Any) -> Any:
        dtype = self.precision.policy("w").param_dtype
        return {"w": jax.random.normal(key, (4, 3)).astype(dtype)}

    def init_state(self) -> Any:
        if not self.stateful:
            return None
        state = {"mean": jnp.float32(0)}
        return state | ({"amax": AmaxHistory.empty(2)} if self.precision.name == "fp16" else {})

    def loss(self, params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
        low = self.precision.policy("w").compute_dtype
        TRACED.append(jnp.dtype(low).name)
        # float16 overflows where the gain is above 65504; bfloat16 loses digits and never overflows
        x = (batch["x"] * batch["gain"][:, None]).astype(low)
        out = (x @ params["w"].astype(low)).astype(jnp.float32) / batch["gain"][:, None]
        loss = jnp.mean(jnp.square(out - batch["y"]))
        if low == jnp.bfloat16:
            loss = loss + jnp.mean(batch["drift"])
        return loss, None if state is None else state | {"mean": state["mean"] + loss}


@functools.cache
def rows(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    y = x @ np.arange(12.0, dtype=np.float32).reshape(4, 3) + rng.normal(size=(8, 3))
    return {"x": x, "y": y.astype(np.float32)}


def data(letters: str, start: int = 0) -> Any:
    """Batches from a step on; `x` overflows in float16, `d` raises the loss in bfloat16."""
    for number, letter in enumerate(letters):
        if number >= start:
            gain, drift = 1e6 if letter == "x" else 1.0, 1e3 if letter == "d" else 0.0
            filled = {"gain": np.full(8, gain), "drift": np.full(8, drift)}
            yield rows(number) | {k: v.astype(np.float32) for k, v in filled.items()}


def start(schedule: Any, mesh: Any = None, stateful: bool = False, **options: Any) -> Any:
    model = Toy(schedule.first, stateful)
    return build(model, optax.adam(0.05), mesh, schedule=schedule, **options)


_built = functools.cache(start)  # programs are compiled once for all tests


def begun(schedule: Any) -> Any:
    state, step = _built(schedule)
    return jax.tree.map(jnp.copy, state), step


def run(state: Any, step: Any, letters: str, **more: Any) -> tuple[Any, list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    begin = int(state.step)
    state = fit(
        state, step, data(letters, begin), steps=len(letters), report=records.append, **more
    )
    return state, records


def indices(records: list[dict[str, Any]]) -> str:
    return "".join(str(record["precision"]) for record in records)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def as_texts(records: list[dict[str, Any]]) -> list[str]:
    """Records without the clock; NaN is equal to NaN."""
    return [str(r | {"tokens_per_s": 0}) for r in records]


def held(state: Any) -> list[bytes]:
    """Bits of what every precision stores alike."""
    return bits((state.params, state.opt_state.inner, state.opt_state.gate, state.key))


# --- without a switch -------------------------------------------------------------------------


def test_a_schedule_that_never_switches_is_the_run_without_it_bit_for_bit() -> None:
    schedule = dynamic(FP16, "fp32", QUICK)
    state, records = run(*begun(schedule), "." * 12)
    plain, step = build(Toy(schedule.first), optax.adam(0.05))
    plain, reference = run(plain, step, "." * 12)
    assert indices(records) == "0" * 12 and not any("switch" in r for r in records)
    assert held(state) == held(plain)
    assert bits(state.switch.loss_scales[0]) == bits(plain.opt_state.loss_scale)
    assert [r["loss"] for r in records] == [r["loss"] for r in reference]
    other, _ = run(*build(Toy(get_precision("fp32")), optax.adam(0.05)), "." * 12)
    assert held(other) != held(plain)  # it can fail


@pytest.mark.parametrize("schedule", [fixed(BF16), mixed(BF16, {"w": "fp32"})], ids=str)
def test_a_schedule_of_one_precision_is_the_plain_step(schedule: Any) -> None:
    state, step = start(schedule)
    assert not isinstance(step, SwitchingStep) and state.switch is None
    assert step.active(state) == (step, state)


# --- late -------------------------------------------------------------------------------------


LATE = late(BF16, "fp32", last=0.5, steps=9)


def test_late_switches_at_exactly_its_step_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mpjax.train"):
        _, records = run(*begun(LATE), "." * 9)
    assert indices(records) == "000011111"
    reason = f"{BF16} -> fp32: the last 0.5 of 9 steps"
    assert [(r["step"], r["switch"]) for r in records if "switch" in r] == [(5, reason)]
    assert caplog.messages == [f"step 5: {reason}"]


def test_what_goes_over_a_switch_is_the_state_of_the_plain_steps() -> None:
    """Oracle: the plain step of one precision, then that of the other on its weights."""
    state, step = begun(LATE)
    low, high = step.steps
    state, _ = run(state, step, "." * 9)
    half, _ = build(Toy(LATE.first), optax.adam(0.05))
    half, _ = run(half, low, "." * 4)
    whole, _ = run(half, high, "." * 9)
    assert held(state) == held(whole)


def test_the_host_does_not_wait_for_the_devices_where_nothing_is_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    get = jax.device_get
    monkeypatch.setattr(switch.jax, "device_get", lambda x: asked.append(1) or get(x))
    run(*begun(LATE), "." * 9)
    assert len(asked) == 1  # about the state that it was given
    asked.clear()
    run(*begun(dynamic(FP16, "fp32", QUICK)), "." * 9)
    assert len(asked) == 1 + 2


# --- dynamic ----------------------------------------------------------------------------------

STORM = "....xxxx............" + "xxxx" + "." * 16


def test_a_skip_storm_promotes_and_it_returns_and_stays_longer_the_second_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    TRACED.clear()
    state, step = start(dynamic(FP16, "fp32", QUICK))
    with caplog.at_level(logging.INFO, "mpjax.train"):
        state, records = run(state, step, STORM)
    #                         ....  xxxx  ....  ....  ....  xxxx  ....  ....  ....  ....
    assert indices(records) == "0000000011110000000000001111111100000000"
    assert [r["step"] for r in records if "switch" in r] == [9, 13, 25, 33]
    assert [m.split(":")[0] for m in caplog.messages] == [f"step {n}" for n in (9, 13, 25, 33)]
    assert "fp16 -> fp32: 100% of the last 4 steps were skipped, limit 50%" in caplog.messages[0]
    assert "fp32 -> fp16: calm again" in caplog.messages[1]
    assert [r["skipped"] for r in records][-1] == 8
    # four switches and two programs, each compiled once
    assert sorted(TRACED) == ["float16", "float32"]
    assert [program._cache_size() for program in step.compiled._programs] == [1, 1]


def test_the_loss_scale_rests_while_another_precision_runs() -> None:
    state, step = begun(dynamic(FP16, "fp32", QUICK))
    _, records = run(state, step, STORM[:16])
    scales = [r["loss_scale"] for r in records]
    assert scales[:8] == [1024] * 5 + [512, 256, 128]
    assert scales[8:] == [1] * 4 + [64] * 4  # and not 1024, which the storm has refuted


def test_a_rising_loss_promotes_and_the_high_precision_brings_it_back() -> None:
    letters = "............" + "dddddddd" + "." * 12
    state, records = run(*start(dynamic(BF16, "fp32", QUICK)), letters)
    assert indices(records) == "0" * 16 + "1" * 4 + "0" * 12
    (up, down) = [r["switch"] for r in records if "switch" in r]
    assert "the loss rose to 1" in up and "over the last 4 steps" in up and "calm again" in down
    assert float(state.switch.best) < 1e3  # the drift taught it nothing


def test_a_schedule_that_joins_a_run_begins_its_own_windows() -> None:
    state, step = begun(dynamic(FP16, "fp32", QUICK))
    gate = state.opt_state.gate._replace(skipped=jnp.int32(6))  # all of them long ago
    state = state._replace(step=jnp.int32(6), opt_state=state.opt_state._replace(gate=gate))
    state = joined(state)
    assert (int(state.switch.since), int(state.switch.skipped)) == (6, 6)
    state, records = run(state, step, "." * 24)  # the window is 4: step 8 ends none of its own
    assert indices(records) == "0" * 18
    assert 0 < float(state.switch.best) < 1e3


def test_it_does_not_flap_when_the_low_precision_never_works() -> None:
    _, records = run(*begun(dynamic(FP16, "fp32", QUICK)), "x" * 120)
    found = indices(records)
    runs = [(index, len(list(steps))) for index, steps in itertools.groupby(found)]
    assert runs == [("0", 4), ("1", 4), ("0", 4), ("1", 8), ("0", 4), ("1", 16), ("0", 4),
                    ("1", 32), ("0", 4), ("1", 40)]  # fmt: skip


def test_underflow_is_measured_where_it_is_asked_for() -> None:
    low = get_precision(FP16, loss_scale="none")
    triggers = Triggers(window=4, underflow=0.5, hold=9)

    def batches() -> Any:  # from the ninth step on, the gradients are about 1e-10
        for number, batch in enumerate(data("." * 12)):
            tiny = np.float32(1e-9 if number >= 8 else 1)
            yield batch | {"y": batch["y"] * tiny, "x": batch["x"] * tiny}

    state, step = build(Toy(low), optax.sgd(0.0), schedule=dynamic(low, "fp32", triggers))
    records: list[dict[str, Any]] = []
    fit(state, step, batches(), steps=10, report=records.append)
    (text,) = [r["switch"] for r in records if "switch" in r]
    assert indices(records) == "0000000011"  # measured after the fourth step too
    assert text == "fp16 -> fp32: 100% of the backward pass underflows, limit 50%"


def test_little_memory_keeps_it_low_and_brings_it_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = iter([3.0, 3.0, 1.0, 1.0])
    monkeypatch.setattr(switch, "free_bytes", lambda device: 1e9 * next(free))
    monkeypatch.setattr(switch.jax, "local_devices", lambda: [None])
    triggers = dataclasses.replace(QUICK, headroom=2.0, hold=99)
    with caplog.at_level(logging.INFO, "mpjax.train"):
        _, records = run(*start(dynamic(FP16, "fp32", triggers)), "....xxxx....xxxx....")
    assert indices(records) == "00000000111100000000"
    assert [r["switch"] for r in records if "switch" in r][1].endswith(
        "1.00 GB are free, headroom 2 GB"
    )
    assert "stays, because only 1.00 GB are free" in caplog.messages[-1]
    assert room.free_bytes is not switch.free_bytes


def test_a_run_that_neither_precision_can_go_on_with_stops_with_its_own_loss_scale() -> None:
    schedule = dynamic(get_precision(FP16, loss_scale="dynamic:init=2,min=2"), BF16, QUICK)
    state, step = start(schedule, patience=8)

    def broken() -> Any:
        for batch in data("." * 40):
            yield batch | {"x": np.full_like(batch["x"], np.nan)}

    with pytest.raises(TrainingStopped, match=r"8 steps in a row, and the loss scale 1 cannot"):
        fit(state, step, broken(), steps=40, report=lambda record: None)


# --- resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "at"),
    [(dynamic(FP16, "fp32", QUICK), (6, 8, 11)), (LATE, (3, 4, 6))],
    ids=["dynamic", "late"],
)
def test_a_run_that_is_resumed_anywhere_switches_alike_and_has_the_same_bits(
    schedule: Any, at: tuple[int, ...], tmp_path: Any
) -> None:
    letters = STORM[: 9 if schedule is LATE else 24]
    state, step = begun(schedule)
    with Checkpointer(tmp_path, keep=9) as checkpoints:

        def save(number: int, state: Any) -> None:
            if number in at:
                checkpoints.save(number, state, {})

        whole, records = run(state, step, letters, every=((1, save),))
        for number in at:
            fresh, again = start(schedule) if number == at[0] else begun(schedule)
            half, _, _ = checkpoints.restore(jax.eval_shape(lambda s=fresh: s), step=number)
            end, rest = run(half, again, letters)
            assert bits(end) == bits(whole)
            assert as_texts(rest) == as_texts(records)[number:]
            if number == at[0]:  # a committed state is compiled for once, too
                assert max(p._cache_size() for p in again.compiled._programs) == 1


# --- what is carried --------------------------------------------------------------------------


def test_running_means_are_carried_and_amax_histories_begin_anew() -> None:
    state, _ = start(dynamic(FP16, "fp32", QUICK), stateful=True)
    old = {"amax": jax.tree.map(lambda x: x + 7, AmaxHistory.empty(2)), "mean": jnp.float32(1)}
    models = (old, {"mean": jnp.float32(5)})
    back = entered(state.switch._replace(active=jnp.int32(1), model_states=models), 1, 0, 12)
    assert float(back.model_states[0]["mean"]) == 5 and int(back.since) == 12
    assert not any(np.any(x) for x in back.model_states[0]["amax"])
    assert int(back.trips) == 0 and int(back.active) == 0
    up = entered(state.switch._replace(model_states=models), 0, 1, 8)
    assert float(up.model_states[1]["mean"]) == 1 and int(up.trips) == 1


def test_a_models_state_goes_on_through_a_run() -> None:
    state, step = start(late(FP16, "fp32", last=0.5, steps=6), stateful=True)
    state, records = run(state, step, "." * 6)
    _, plain = step.active(state)
    assert float(plain.model_state["mean"]) == pytest.approx(sum(r["loss"] for r in records))


def test_the_states_bytes_count_what_a_schedule_keeps() -> None:
    state, _ = begun(dynamic(FP16, "fp32", QUICK))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state.switch))
    plain, _ = build(Toy(get_precision("fp32")), optax.adam(0.05))
    assert state_bytes(state)["rest"] == state_bytes(plain)["rest"] + kept > kept
    assert state_bytes(state)["total"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_it_switches_on_eight_devices() -> None:
    schedule = dynamic(FP16, "fp32", QUICK)
    state, records = run(*start(schedule, "data=8"), STORM[:16])
    assert indices(records) == "0000000011110000"
    alone, _ = run(*begun(schedule), STORM[:16])
    np.testing.assert_allclose(state.params["w"], alone.params["w"], atol=1e-3)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(5))
def test_what_cannot_be_built_is_one_line(case: int) -> None:
    low = get_precision("p=f16,c=f16,o=f16", update="master")
    high = get_precision("p=bf16,c=bf16,o=bf16", update="master")
    schedule, options, words = [
        (late(BF16, "fp32"), {}, ("late needs the length", "schedule.over(1000)")),
        (late(BF16, "fp32", last=0.01, steps=9), {}, ("0.01 of 9 steps is 0", "train longer")),
        (dynamic(BF16, "fp32"), {"gate": False}, ("finite gate", "leave gate on")),
        (dynamic(BF16, "fp32"), {"patience": 30}, ("patience=30", "raise patience to 40")),
        (dynamic(low, high), {}, ("w is float16[4,3] in p=f16", "bfloat16[4,3]", "the same p=")),
    ][case]
    with pytest.raises(ConfigError) as error:
        start(schedule, **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_model_in_another_precision_than_the_first_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"begins in fp16 and the model carries fp32; make .*"):
        build(Toy(get_precision("fp32")), optax.sgd(0.1), schedule="late:fp16:fp32:0.1")
