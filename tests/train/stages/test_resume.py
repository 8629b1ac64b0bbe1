"""A plan that is stopped anywhere ends in the same bits, and its folder is that of one plan."""

from __future__ import annotations

import dataclasses
import json
from typing import Any
from unittest import mock

import pytest

from mpjax.errors import ConfigError
from mpjax.train.stages import Stage, run_stages
from mpjax.train.stages import run_stages as package
from tests.train.stages.toy import PLAN, STEPS, Data, bits, run, training

pytestmark = pytest.mark.usefixtures("fast_compile")


class Killed(BaseException):
    """Stands for a signal that cannot be caught."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Any:
    """A plan that was never stopped: its folder, and its bits."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder, bits(folder)


def kill_at(name: str, step: int) -> Any:
    def report(stage: str, record: Any) -> None:
        if stage == name and record["step"] == step:
            raise Killed

    return report


def test_each_stage_is_logged_once_and_skips_are_among_its_steps(whole):
    for name in ("first", "then"):
        records = [json.loads(line) for line in whole[1][f"{name} log"]]
        assert [r["step"] for r in records] == [*range(1, STEPS + 1), STEPS]
        assert "validation_loss" in records[-1] and "loss" not in records[-1]
    (record,) = whole[1]["small log"]
    assert json.loads(record)["step"] == 0
    then = [json.loads(line) for line in whole[1]["then log"]][:-1]
    assert 0 < then[-1]["skipped"] < STEPS, "else the loss scale says nothing"


@pytest.mark.parametrize(
    ("name", "step"), [("first", 1), ("first", 5), ("small", 0), ("then", STEPS)]
)
def test_a_killed_plan_goes_on_to_the_same_bits(whole, tmp_path, name, step):
    with pytest.raises(Killed):
        run(tmp_path, report=kill_at(name, step))
    assert not (tmp_path / name / "done.json").exists()
    run(tmp_path)
    assert bits(tmp_path) == whole[1]


@pytest.mark.parametrize("name", ["then", "small"])
def test_a_kill_between_the_last_save_and_the_marker_loses_nothing(whole, tmp_path, name):
    module = package.__globals__
    write = module["write_text"]

    def die(path: Any, text: str) -> None:
        if path.name == "done.json" and path.parent.name == name:
            raise Killed
        write(path, text)

    with mock.patch.dict(module, write_text=die), pytest.raises(Killed):
        run(tmp_path)
    run(tmp_path)
    assert bits(tmp_path) == whole[1]


def test_a_position_that_is_lost_is_noticed(whole, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, report=kill_at("then", 5))
    with mock.patch.object(Data, "set_state", lambda self, state: None):
        run(tmp_path)
    found = bits(tmp_path)
    odd = {key.split("/")[0].split()[0] for key in found if found[key] != whole[1][key]}
    assert odd == {"then"}


def test_a_plan_stops_when_asked_and_is_taken_as_it_is_when_it_has_ended(whole, tmp_path):
    asked: list[int] = []

    def stop() -> str | None:
        asked.append(1)
        return "SIGTERM" if len(asked) == STEPS + 3 else None

    assert list(run(tmp_path, stop=stop)) == ["first", "small"]
    ended = run(tmp_path)
    assert bits(tmp_path) == whole[1]
    with mock.patch.object(Data, "__next__", None):  # nothing is trained again
        again = run(tmp_path)
    assert again == ended and list(again) == [stage.name for stage in PLAN]


def test_stages_can_be_added_behind_and_nothing_else_changed(whole, tmp_path):
    run(tmp_path, PLAN[:2])
    run(tmp_path)
    assert bits(tmp_path) == whole[1]
    before = (tmp_path / "plan.json").read_bytes()
    first = PLAN[0]
    other: dict[str, Any] = {
        "first.lr was 0.01 at the save, is 0.1 now": dataclasses.replace(
            first, settings={"lr": 0.1}
        ),
        "the stages were first small then and are second small": dataclasses.replace(
            first, name="second"
        ),
    }
    for part, stage in other.items():
        rest = [dataclasses.replace(PLAN[1], reads=(stage.name,)), PLAN[2]]
        with pytest.raises(ConfigError, match=part):
            run(tmp_path, [stage, *rest])
    with pytest.raises(ConfigError, match="the stages were first small then and are first"):
        run(tmp_path, PLAN[:1])
    saved = json.loads(before)
    saved["environment"]["jax_enable_x64"] = True
    (tmp_path / "plan.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="jax_enable_x64 was true at the save, is false now"):
        run(tmp_path)
    for text in ("{", "[]", '{"stages": []}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match="put back the file as it was"):
            run(tmp_path)


def test_a_damaged_checkpoint_is_passed_over_and_named_where_none_is_whole(whole, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, report=kill_at("first", 5))
    digests = sorted(tmp_path.glob("first/checkpoints/*/digest.json"))
    assert [path.parent.name for path in digests] == ["2", "4"]
    digests[1].unlink()
    run(tmp_path)
    assert bits(tmp_path) == whole[1]
    with pytest.raises(Killed):
        run(tmp_path / "b", report=kill_at("first", 5))
    for path in tmp_path.glob("b/first/checkpoints/*/digest.json"):
        path.unlink()
    with pytest.raises(ConfigError, match="'first': the checkpoint at its end is damaged; remove"):
        (tmp_path / "first/checkpoints/6/digest.json").unlink()
        run(tmp_path)["first"].weights()
    with pytest.raises(ConfigError, match="no checkpoint in .* is whole; remove .*first, and"):
        run(tmp_path / "b")


def test_nothing_is_written_where_a_plan_is_wrong_or_the_folder_is_not_its_own(tmp_path):
    wrong = [*PLAN, Stage("more", training(), "weights", "frist")]
    with pytest.raises(ConfigError, match="'frist', which no stage before it makes; did you mean"):
        run(tmp_path / "a", wrong)
    assert not (tmp_path / "a").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds notes.txt and is no folder of a plan's run"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="notes.txt.* cannot be written"):
        run_stages(PLAN, tmp_path / "notes.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_several_processes_are_refused(tmp_path):
    with (
        mock.patch("jax.process_count", lambda: 2),
        pytest.raises(ConfigError, match="runs in one"),
    ):
        run(tmp_path)
