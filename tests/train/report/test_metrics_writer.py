"""Where numbers go: valid JSON lines, dropped and torn records, TensorBoard events, W&B."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from mpjax.errors import ConfigError
from mpjax.train.report.metrics_writer import MetricsWriter, read_metrics, to_line

SETTINGS = {"lr": 1e-3, "precision": "fp16 rule:**/norm*=fp32", "steps": 9, "update": None}


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens_per_s": 100.5, "loss": 1 / step, "skipped": 0} | more


def write(out: Path, records: list[dict[str, Any]], **more: Any) -> Path:
    writer = MetricsWriter(out, SETTINGS, **more)
    for each in records:
        writer.write(each)
    writer.close()
    return out / "metrics.jsonl"


def events(out: Path) -> list[Event]:
    """All events of a folder: length (8 bytes), its CRC (4), the message, its CRC (4), repeated."""
    found = []
    for path in sorted((out / "tensorboard").iterdir()):
        raw = path.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            found.append(Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
    return found


def points(out: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(out)
        for value in event.summary.value
        if not value.tag.startswith("_hparams_")
    ]


def strict(text: str) -> Any:
    """Parses JSON as RFC 8259 has it: Python's reader takes NaN and Infinity unless told."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_written_is_read(tmp_path):
    records = [record(1), record(2, grad_norm=0.1), {"step": 2, "validation_loss": 1.25}]
    assert read_metrics(write(tmp_path, records)) == records


def test_a_record_can_be_read_before_the_writer_closes(tmp_path):
    writer = MetricsWriter(tmp_path, SETTINGS)
    writer.write(record(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(1)]
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path, value):
    path = write(tmp_path, [record(1, grad_norm=value)])
    with pytest.raises(ValueError, match="NaN|Infinity"):  # the plain way is no JSON
        strict(json.dumps(record(1, grad_norm=value)))
    (line,) = path.read_text().splitlines()
    assert float(strict(line)["grad_norm"]) == pytest.approx(value, nan_ok=True)
    (back,) = read_metrics(path)
    assert isinstance(back["grad_norm"], float)
    assert back["grad_norm"] == pytest.approx(value, nan_ok=True)
    assert back["loss"] == 1.0


def test_finite_numbers_keep_all_their_bits():
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float(np.float32(0.1)), -0.0]
    back = strict(to_line({str(i): value for i, value in enumerate(values)}))
    assert [v.hex() for v in back.values()] == [v.hex() for v in values]


def test_resuming_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = write(tmp_path, [record(n, grad_norm=math.nan) for n in range(1, 8)])
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    write(tmp_path, [record(n, loss=-1.0) for n in range(5, 8)], start=4)
    back = read_metrics(path)
    assert [r["step"] for r in back] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in back[4:]] == [-1.0] * 3
    assert math.isnan(back[0]["grad_norm"])
    assert all(strict(line) for line in path.read_text().splitlines())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_new_run_over_the_remains_of_one_without_a_checkpoint_starts_empty(tmp_path):
    write(tmp_path, [record(1), record(2)])
    assert read_metrics(write(tmp_path, [record(1, loss=9.0)])) == [record(1, loss=9.0)]


def test_no_metrics_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: no metrics here"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_gets_every_nth_step_and_every_validation(tmp_path):
    records = [record(n) for n in range(1, 8)] + [{"step": 7, "validation_loss": 0.5}]
    write(tmp_path, records, every=3)
    assert points(tmp_path) == [
        (3, "tokens_per_s", 100.5), (3, "loss", pytest.approx(1 / 3)), (3, "skipped", 0.0),
        (6, "tokens_per_s", 100.5), (6, "loss", pytest.approx(1 / 6)), (6, "skipped", 0.0),
        (7, "validation_loss", 0.5),
    ]  # fmt: skip


def test_tensorboard_shows_nan_and_nobody_is_warned(tmp_path, caplog):
    write(tmp_path, [record(1, grad_norm=math.nan)], every=1)
    assert math.isnan(dict((tag, value) for _, tag, value in points(tmp_path))["grad_norm"])
    assert not caplog.records


def test_settings_are_hparams_numbers_as_numbers(tmp_path):
    write(tmp_path, [])
    contents = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    (start,) = [c.session_start_info.hparams for c in contents if c.HasField("session_start_info")]
    assert set(start) == set(SETTINGS)
    assert start["precision"].string_value == SETTINGS["precision"]
    assert (start["lr"].number_value, start["steps"].number_value) == (1e-3, 9)
    assert start["update"].string_value == "None"
    (experiment,) = [c.experiment for c in contents if c.HasField("experiment")]
    assert [info.name.tag for info in experiment.metric_infos] == ["validation_loss"]


def test_a_resumed_run_tells_tensorboard_to_drop_later_points(tmp_path):
    write(tmp_path, [record(n) for n in range(1, 4)], every=1, start=2)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [3]


def test_wandb_is_asked_for_and_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb: .* not installed; .*pip install .*\[wandb\]'"):
        MetricsWriter(tmp_path, SETTINGS, wandb="project")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, [record(1)])  # not asked for: not needed


class FakeWandb:
    """Stands for the module wandb, and notes what it is told."""

    class Error(Exception):
        """As wandb's."""

    def __init__(self, calls: list[Any], reachable: bool = True) -> None:
        self.calls, self.reachable = calls, reachable

    def init(self, **kinds: Any) -> SimpleNamespace:
        if not self.reachable:
            raise self.Error("api_key not configured\n(no-tty)")
        self.calls.append(kinds | {"there": Path(kinds["dir"]).is_dir()})
        return SimpleNamespace(
            id=kinds.get("id", f"run{len(self.calls)}"),
            log=lambda numbers, step: self.calls.append((step, numbers)),
            finish=lambda: self.calls.append("finish"),
        )


def test_wandb_gets_settings_and_points(tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(calls))
    out = tmp_path / "new"
    write(out, [record(1), record(2)], every=2, wandb="project")
    assert calls == [
        {"project": "project", "config": SETTINGS, "dir": str(out), "there": True},
        (2, {"tokens_per_s": 100.5, "loss": 0.5, "skipped": 0}),
        "finish",
    ]


def test_a_run_that_resumes_is_the_same_one_in_wandb(tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(calls))
    write(tmp_path, [record(1)], wandb="project")
    write(tmp_path, [record(2)], start=1, wandb="project")
    write(tmp_path, [record(1)], wandb="project")  # anew: another run
    begun = [one for one in calls if isinstance(one, dict)]
    assert [one.get("id") for one in begun] == [None, "run1", None]
    assert begun[1]["resume"] == "allow" and "resume" not in begun[2]


def test_wandb_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb([], reachable=False))
    with pytest.raises(ConfigError, match=r"wandb: api_key .*; run `wandb login`, or set WANDB_"):
        MetricsWriter(tmp_path, SETTINGS, wandb="project")


# What is no record.


def test_scalars_of_jax_and_numpy_are_numbers_in_a_folder_that_was_not_there(tmp_path):
    values = {
        "loss": jnp.float32(0.5), "low": jnp.bfloat16(1.5), "half": np.float16(0.25),
        "count": np.int64(7), "flag": jnp.array(True), "none": None, "text": "a",
        "bad": jnp.float32(jnp.nan),
    }  # fmt: skip
    out = tmp_path / "new" / "run"
    write(out, [{"step": jnp.int32(10)} | values])
    (found,) = read_metrics(out / "metrics.jsonl")
    assert math.isnan(found.pop("bad"))
    assert found == {
        "step": 10, "loss": 0.5, "low": 1.5, "half": 0.25, "count": 7, "flag": True, "none": None,
        "text": "a",
    }  # fmt: skip
    assert (10, "low", 1.5) in points(out)


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"loss": 1.0}, ("no step", "{'step': n")),
        ({"step": 1.5}, ("step 1.5", "whole number")),
        ({"step": True}, ("step True", "whole number")),
        ({"step": 1, "loss": np.zeros(3)}, ("'loss'", "shape (3,)", "its mean")),
        ({"step": 1, "loss": [1.0]}, ("'loss'", "[1.0]", "its mean")),
        ({"step": 1, "loss": {"a": 1}}, ("'loss'", "its mean")),
        ([1, 2], ("no step",)),
    ],
)
def test_what_is_no_record_is_one_line_and_nothing_is_written(tmp_path, wrong, parts):
    writer = MetricsWriter(tmp_path, SETTINGS)
    writer.write(record(1))
    with pytest.raises(ConfigError) as found:
        writer.write(wrong)
    writer.close()
    assert all(part in str(found.value) for part in parts), found.value
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]
