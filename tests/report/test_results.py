"""Outcomes of records and of runs' folders, and what is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.report import Outcome, csv_table, plot_loss, plot_loss_scale, rich_table
from mpjax.report.runs import folders_in
from mpjax.train import write_manifest
from mpjax.train.report import to_line


def write_run(folder: Path, losses: list[float], final: float, **config: object) -> Path:
    """A run as the scripts leave it: a record a step, then that of the validation."""
    folder.mkdir(parents=True)
    write_manifest(folder, {"config": config, "precision_text": "fp32"})
    lines = [
        {"step": n, "loss": loss, "tokens_per_s": 10.0 * n, "loss_scale": 2.0, "skipped": 0}
        for n, loss in enumerate(losses, 1)
    ]
    # a score may be called as the loss is
    lines.append({"step": len(losses), "validation_loss": final, "loss": 99.0, "accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(to_line(line) + "\n" for line in lines))
    return folder


def test_records_of_a_loop_with_a_loss_alone_are_enough(tmp_path):
    run = [{"step": jnp.int32(n), "loss": jnp.float32(4 - n)} for n in range(1, 4)]
    made = Outcome.from_records("mine", run)
    assert [r["loss"] for r in made.records[0]] == [3.0, 2.0, 1.0]
    assert made.reference == "mine" and math.isnan(made.validation_loss[0])
    assert (made.skipped, made.loss_scale) == ((0,), (1.0,))
    for show in (plot_loss, plot_loss_scale, csv_table, lambda outcomes: rich_table(outcomes, "")):
        show([made])


def test_a_validation_goes_into_the_record_of_its_step():
    run = [{"step": n, "loss": 1.0} for n in (10, 20, 30)]
    judged = [{"step": 0, "validation_loss": 9.0}, {"step": 20, "validation_loss": 5.0}]
    made = Outcome.from_records("a", [judged[0], *run[:2], judged[1], run[2]])
    assert [r.get("validation_loss") for r in made.records[0]] == [9.0, 5.0, None]
    assert made.validation_loss == (5.0,)


def test_seeds_of_a_run_are_one_outcome(tmp_path):
    for seed in (0, 1, 10):  # as numbers, 10 is after 1
        folder = tmp_path / "bf16" / f"seed{seed}"
        write_run(folder, [3.0, 2.0, 1.0], 1.5 + seed, seed=seed, lr=0.1, out=str(folder))
    made = Outcome.from_run(tmp_path / "bf16", reference="fp32")
    assert (made.label, made.reference) == ("bf16", "fp32")
    assert made.validation_loss == (1.5, 2.5, 11.5)
    assert made.tokens_per_s == 30.0  # after the first two steps
    assert [[r["loss"] for r in run] for run in made.records] == [[3.0, 2.0, 1.0]] * 3
    assert made.records[0][-1]["accuracy"] == 0.5
    several = [tmp_path / "bf16" / f"seed{seed}" for seed in (0, 1, 10)]
    found = Outcome.from_run(several, "bf16", "fp32")
    # From Python 3.13 on a NaN makes a dataclass differ from its own copy.
    known = [dataclasses.replace(one, bytes_per_parameter=0.0) for one in (found, made)]
    assert known[0] == known[1]
    assert all(math.isnan(one.bytes_per_parameter) for one in (found, made))
    assert Outcome.from_run(several[1]).validation_loss == (2.5,)
    assert folders_in(tmp_path, ["bf16", "fp32"]) == {"bf16": tuple(several)}


def test_a_kill_may_cut_the_last_line(tmp_path):
    folder = write_run(tmp_path / "a", [2.0, 1.0], 1.5)
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')
    assert len(Outcome.from_run(folder).records[0]) == 2
    path.write_text('{"step": 3, "lo\n' + whole)
    with pytest.raises(ConfigError, match="damaged: 1 of its lines"):
        Outcome.from_run(folder)


def test_what_is_no_run_is_one_line(tmp_path):
    write_run(tmp_path / "sweep" / "arm" / "seed0", [1.0], 1.0, lr=0.1)
    write_run(tmp_path / "other", [1.0], 1.0, lr=0.2)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "tokens_per_s": 2.0}\n')
    damaged = write_run(tmp_path / "damaged", [1.0], 1.0)
    (damaged / "manifest.json").write_text('{"config": ')
    two = [tmp_path / "sweep/arm/seed0", tmp_path / "other"]
    for folder, parts in [
        (tmp_path / "gone", ("gone is no folder", "--out")),
        (tmp_path / "sweep", ("holds no metrics.jsonl", "arm/seed0", "name one")),
        (bare, ("'bare'", "no record has a loss")),
        (damaged, ("manifest.json is damaged", "resume")),
        (two, ("no seeds of one arm", "lr 0.1 and 0.2")),
        ([], ("at least one",)),
        (3, ("outcome: 3 is no folder",)),
    ]:
        with pytest.raises(ConfigError) as found:
            Outcome.from_run(folder)
        assert all(part in str(found.value) for part in parts), found.value


@pytest.mark.parametrize(
    ("label", "records", "part"),
    [
        ("a", [], "no record has a loss"),
        ("a", [[], []], "no record has a loss"),
        ("a", {"loss": 1.0}, "give a list of dicts"),
        ("a", [{"loss": 1.0}], "no step"),
        ("a", [{"step": 1, "loss": "low"}], "loss 'low' at step 1"),
        ("a", [{"step": 2, "loss": 1.0}, {"step": 2, "loss": 1.0}], "step 2 follows step 2"),
        ("a", [{"step": 1, "loss": np.ones(2)}], "its mean"),
        ("", [{"step": 1, "loss": 1.0}], "give the arm a name"),
    ],
)
def test_records_that_are_none_are_one_line(label, records, part):
    with pytest.raises(ConfigError) as found:
        Outcome.from_records(label, records)
    assert part in str(found.value)


def test_validation_losses_are_one_a_seed():
    run = [{"step": 1, "loss": 1.0}]
    assert Outcome.from_records("a", [run, run], validation_loss=[1, 2]).validation_loss == (1, 2)
    with pytest.raises(ConfigError, match="1 validation losses of 2 seeds"):
        Outcome.from_records("a", [run, run], validation_loss=1.0)


def test_an_outcome_that_was_written_is_read(tmp_path):
    folder = write_run(tmp_path / "a", [1.0], 1.0)
    assert math.isnan(Outcome.from_run(folder).bytes_per_parameter)
    (folder / "outcome.json").write_text(json.dumps({"bytes_per_parameter": 12.5}))
    assert Outcome.from_run(folder).bytes_per_parameter == 12.5
