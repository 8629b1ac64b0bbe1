"""What a stage begins with: weights by path, from the float32 copy; moments that go on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import quantize
from mpjax.precision import get_precision
from mpjax.train.stages import Edit, Stage, Training, check_stages
from tests.train.stages.toy import STEPS, WIDTH, Data, Toy, named, params, run, saved, training

pytestmark = pytest.mark.usefixtures("fast_compile")
TRUNK, SECOND = "net/trunk/kernel", "net/second/kernel"
still = functools.partial(Data, still=True)


def begun(folder: Any, stages: Any) -> dict[str, np.ndarray]:
    """The weights that the last stage begins with: it has a step of rate 0."""
    run(folder, stages)
    return params(folder, stages[-1].name, 1)


def drawn(head: str) -> dict[str, np.ndarray]:
    return named(jax.jit(Toy(head, get_precision("fp32")).init)(jax.random.key(0)))


def frozen(head: str, precision: str = "fp32", **options: Any) -> Any:
    return training(head, precision, optax.sgd(0.0), steps=1, **options)


def test_weights_are_taken_by_path_and_another_head_begins_anew(tmp_path):
    stages = [Stage("first", training()), Stage("then", frozen("second"), "weights", "first")]
    found, before = begun(tmp_path, stages), params(tmp_path, "first")
    np.testing.assert_array_equal(found[TRUNK], before[TRUNK])
    fresh = drawn("second")
    assert not np.array_equal(before[TRUNK], fresh[TRUNK])
    np.testing.assert_array_equal(found[SECOND], fresh[SECOND])
    taken = run(tmp_path, stages)["then"].taken
    assert taken.rows() == [
        ("net/first", "dropped", 4 * WIDTH), ("net/second", "anew", 4 * WIDTH),
        ("net/trunk", "taken", WIDTH**2),
    ]  # fmt: skip
    assert not taken.moments and "| moments | anew |" in str(taken)


def test_low_weights_are_taken_from_their_float32_copy(tmp_path):
    stages = [
        Stage("first", training("first", "p=bf16,c=f32,o=f32 update=master")),
        Stage("then", frozen("first"), "weights", "first"),
    ]
    found, before = begun(tmp_path, stages), saved(tmp_path, "first")
    master = before[f"opt_state/update_state/master/{TRUNK}"]
    np.testing.assert_array_equal(found[TRUNK], master)
    assert not np.array_equal(master, before[f"params/{TRUNK}"].astype(np.float32))  # control


def test_a_head_of_the_same_shape_begins_anew_when_asked(tmp_path):
    first = Stage("first", training())
    again = Stage("then", frozen("first"), "weights", "first", new=("net/first",))
    found = begun(tmp_path, [first, again])
    fresh = drawn("first")
    np.testing.assert_array_equal(found["net/first/kernel"], fresh["net/first/kernel"])
    np.testing.assert_array_equal(found[TRUNK], params(tmp_path, "first")[TRUNK])


def test_with_moments_two_stages_are_one_run_of_both(tmp_path):
    """Steps count from 0 again, so the noise repeats: the whole run is made to repeat it too."""

    # a rate that moves, by a count that must go on
    optimizer = optax.adam(optax.linear_schedule(0.02, 0.0, 2 * STEPS))
    precision = "fp16 loss_scale=dynamic:init=1048576,interval=4"
    make = training("first", precision, optimizer, data=still)
    for take in ("weights+moments", "weights"):
        stages = [Stage("first", make), Stage("then", make, take, "first")]
        run(tmp_path / take, stages)
    made = make({})
    state, step, batch = made.state, made.step, next(still())
    zero = np.int32(0)
    for number in range(2 * STEPS):
        if number == STEPS:
            state = state._replace(step=jax.numpy.asarray(zero))
        state, metrics = step(state, batch)
    whole = {f"params/{n}": x for n, x in named(state.params).items()}
    found = saved(tmp_path / "weights+moments", "then")
    control = saved(tmp_path / "weights", "then")
    for name, x in whole.items():
        np.testing.assert_array_equal(found[name], x)
        assert not np.array_equal(control[name], x)
    assert int(found["opt_state/inner/0/count"]) > int(control["opt_state/inner/0/count"])
    assert 0 < int(metrics["skipped"]) < STEPS
    scale = named(state.opt_state.loss_scale)["scale"]
    np.testing.assert_array_equal(found["opt_state/loss_scale/scale"], scale)


def test_moments_of_another_storage_go_on_and_a_loss_scale_of_other_settings_does_not(tmp_path):
    stages = [
        Stage("first", training("first", "fp16 loss_scale=dynamic:init=64,interval=2")),
        Stage("low", training("first", "fp16 loss_scale=static:8 moments=bf16", steps=1),
              "weights+moments", "first"),
    ]  # fmt: skip
    run(tmp_path, stages)
    low, first = saved(tmp_path, "low", 1), saved(tmp_path, "first")
    (mu,) = [name for name in low if name.endswith(f"mu/{TRUNK}")]
    (before,) = [name for name in first if name.endswith(f"mu/{TRUNK}")]
    assert low[mu].dtype.name == "bfloat16" and first[before].dtype == np.float32
    # b1 = 0.9 of what went before; a fresh moment would be a tenth of one gradient
    share = np.abs(low[mu].astype(np.float32)).sum() / np.abs(first[before]).sum()
    assert 0.7 < share < 1.3
    assert float(low["opt_state/loss_scale/scale"]) == 8
    assert float(first["opt_state/loss_scale/scale"]) > 64


def test_copies_of_the_first_weights_in_an_optimizer_are_copies_of_those_taken(tmp_path):
    averaged = optax.contrib.schedule_free_sgd(0.0)
    stages = [
        Stage("first", training()),
        Stage("then", training("first", "fp32", averaged, steps=1), "weights", "first"),
    ]
    run(tmp_path, stages)
    then, first = saved(tmp_path, "then", 1), params(tmp_path, "first")
    (copy,) = [name for name in then if name.endswith(f"z/{TRUNK}")]
    np.testing.assert_array_equal(then[copy], first[TRUNK])


def test_weights_and_moments_are_cut_as_the_stages_mesh_says(tmp_path):
    raw = optax.sgd(0.1, momentum=0.9)  # Adam would divide differences of rounding by themselves
    make = training("first", "fp32", raw)
    stages = [
        Stage("first", make),
        Stage("one", make, "weights+moments", "first"),
        Stage(
            "many",
            training("first", "fp32", raw, mesh="data=2,fsdp=2,tensor=2"),
            "weights+moments",
            "first",
        ),
    ]
    run(tmp_path, stages)
    first, one, many = (params(tmp_path, stage.name)[TRUNK] for stage in stages)
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)  # order of sums
    assert not np.allclose(first, one, rtol=1e-3)


def test_quantised_weights_are_read_as_they_were_and_a_teacher_by_its_name(tmp_path):
    read: list[Any] = []

    def rounded(weights: Any) -> Edit:
        return Edit(jax.tree.map(lambda x: quantize(x, "int8", "row"), weights["first"]))

    def taught(weights: Any) -> Training:
        read.append(weights)
        return training("second", steps=1)({})

    stages = [
        Stage("first", training()), Stage("int8", rounded, reads=("first",)),
        Stage("student", taught, reads=("int8", "first")),
    ]  # fmt: skip
    ended = run(tmp_path, stages)
    assert len(read) == 2, "once without numbers"
    np.testing.assert_array_equal(named(read[1]["first"])[TRUNK], params(tmp_path, "first")[TRUNK])
    expected = rounded({"first": ended["first"].weights()}).params
    for found in (read[1]["int8"], ended["int8"].weights()):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert ended["int8"].scores == {}


def edit(weights: Any) -> Edit:
    return Edit(next(iter(weights.values())))


def other(weights: Any) -> Training:
    made = training()({})
    renamed = {"other": made.state.params["net"]}
    return Training(made.state._replace(params=renamed), made.step, Data(), 1)


def quantised(weights: Any) -> Edit:
    return Edit(jax.tree.map(lambda x: quantize(x, "int8", "row"), weights["first"]))


FIRST = Stage("first", training())
LION = training("first", "bf16", optax.lion(0.01))
WRONG: dict[str, tuple[Any, str]] = {
    "no stage": ([], "stages: none; give at least one"),
    "no Stage": ([training()], "is no Stage; give Stage"),
    "a name twice": ([FIRST, FIRST], "stage 'first': stands twice"),
    "of none before": (
        [FIRST, Stage("b", training(), "weights", "fisrt")],
        "stage 'b': needs 'fisrt', which no stage before it makes; did you mean first",
    ),
    "of a later one": ([Stage("b", edit, reads=("first",)), FIRST], "before it: none"),
    "no such path": (
        [FIRST, Stage("b", other, "weights", "first")],
        "stage 'b': none of its weights, such as other/first/kernel, is in 'first', which has",
    ),
    "another shape": (
        [FIRST, Stage("b", training(out=3), "weights", "first")],
        r"net/first/kernel has shape \(8, 4\) in 'first' and \(8, 3\) here; begin it anew, new=",
    ),
    "a pattern of nothing": (
        [FIRST, Stage("b", training(), "weights", "first", new=("net/frist",))],
        "new=net/frist matches no weight; near misses: net/first",
    ),
    "quantised": (
        [FIRST, Stage("q", quantised, reads=("first",)), Stage("b", training(), "weights", "q")],
        "net/first/kernel is quantised in 'q', which cannot be trained on; take weights of the st",
    ),
    "moments of an edit": (
        [FIRST, Stage("e", edit, reads=("first",)),
         Stage("b", training(), "weights+moments", "e")],
        "'e' trains nothing and has no moments; set take=weights",
    ),
    "moments of a new head": (
        [FIRST, Stage("b", training("second"), "weights+moments", "first")],
        "the optimizer states do not fit, 'first' has no opt_state/inner/0/mu/net/second/kernel",
    ),
    "moments of another optimizer": (
        [Stage("first", LION), Stage("b", training(), "weights+moments", "first")],
        "the optimizer states do not fit, 'first' has no opt_state/inner/0/nu/",
    ),
    "more moments than are taken": (
        [FIRST, Stage("b", LION, "weights+moments", "first")],
        "the optimizer states do not fit, 'first' has opt_state/inner/0/nu/.*, which is not here",
    ),
    "an edit that takes": (
        [FIRST, Stage("b", lambda w: Edit({"w": np.ones(2)}), "weights", "first")],
        "an Edit trains nothing that could take weights; name the stage in reads",
    ),
    "nothing made": ([Stage("b", lambda w: None)], "stage 'b': make returned None; return a Tr"),
    "a mistake inside": (
        [Stage("b", training("first", "bf61"))], "stage 'b': precision: unknown preset 'bf61'"
    ),
    "no steps": ([Stage("b", training(steps=0))], "stage 'b': training: steps=0"),
    "no position": (
        [Stage("b", training(data=lambda: iter([])))], "stage 'b': training: batches, .* get_state"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("stages", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_plan_is_one_line(stages, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_stages(stages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "stage 'a/b': the name is that of a folder"),
        ({"name": "plan.json"}, "stage 'plan.json': the name is that of a folder"),
        ({"make": 3}, "make is 3; give a function"),
        ({"take": "moments"}, "unknown take 'moments'; did you mean weights.moments"),
        ({"take": "weights"}, "takes weights, and no source says of which stage"),
        ({"source": "a"}, "take=nothing does not read source='a'"),
        ({"new": ("a",)}, "take=nothing does not read new="),
        ({"settings": {"a": {1}}}, "settings are no JSON .*; give texts, numbers"),
        ({"reads": "teacher"}, "reads='teacher' is one text; give a tuple"),
    ],
)
def test_a_wrong_stage_is_one_line(fields, message):
    with pytest.raises(ConfigError, match=message):
        Stage(**{"name": "b", "make": training()} | fields)


def test_a_right_plan_is_outlined_without_numbers():
    found = check_stages([FIRST, Stage("b", training("second"), "weights", "first")])
    assert [outline.steps for outline in found.values()] == [STEPS, STEPS]
    leaves = jax.tree.leaves([outline.state for outline in found.values()])
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
