"""Every experiment runs from its command line with tiny settings, and keeps what it promises."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "train_lm", "generate", "sweep", "compare_precisions", "low_bit_weights", "low_bit_adam",
    "bench_step", "formats", "low_bit_products", "bench_recipes", "autocast_any",
    "image_cnn", "rnn_lm", "distil", "finetune_classifier", "finetune_tagger", "translate",
    "pretrain_bert", "chat", "stages", "augment", "recommend",
    "adversarial", "multitask", "anneal", "finetune", "preflight", "compress_gradients",
)  # fmt: skip
FLAGS = (
    "precision rule data tokenizer model mesh lr schedule optimizer weight-decay clip seed"
    " loss-scale update moments steps batch seq accumulate eval-every eval-precision resume out"
    " layers width heads kv-heads norm position activation tied dropout"
).split()
SMALL = "--layers 1 --width 32 --heads 2 --seq 32 --batch 8 --eval-batches 2 --warmup 2".split()
# What could break a resume: a scale that moves, dropout keys, microbatches.
HARD = [
    *SMALL, *"--precision fp16 --loss-scale dynamic:init=16777216,interval=20".split(),
    *"--dropout 0.1".split(),
    *"--accumulate 2 --steps 400 --eval-every 100 --save-every 150 --sample 20 --lr 1e-2".split(),
]  # fmt: skip


def start(script: str, *args: Any, devices: int = 1, **env: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    own = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "COLUMNS": "100"}
    # A smoke run is not about XLA's rewrites: compiling takes most of its time.
    env = os.environ | own | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | env
    return subprocess.Popen(
        [sys.executable, f"experiments/{script}.py", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env,
    )  # fmt: skip


def start_module(module: str, *args: Any) -> subprocess.Popen[str]:
    """A command line of the package."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Waits; returns what it wrote to both streams."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, f"status {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def run(script: str, *args: Any, devices: int = 1, code: int = 0) -> tuple[str, str]:
    return finish(start(script, *args, devices=devices), code)


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path, *names: str) -> list[tuple[Any, ...]]:
    """The step and other numbers of each step's record, in order."""
    names = ("step", "loss", *names)
    return [tuple(r[name] for name in names) for r in read(out) if "loss" in r]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"line {i}: the quick brown fox and number {i * i}\n" for i in range(800))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of 400 steps under the settings HARD, never stopped."""
    out = tmp_path_factory.mktemp("trained") / "run"
    stdout, stderr = run("train_lm", *HARD, "--data", text, "--prompt", "line 7", "--out", out)
    return out, stdout, stderr


# The command line.


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_readable(script):
    out, err = run(script, "--help")
    assert not err and all(len(line) <= 100 for line in out.splitlines() if "usage:" not in line)
    assert "None" not in out, "defaults and types are words that a user knows"
    flags = re.findall(r"^│ --([\w-]+)", out, re.MULTILINE)
    assert len(flags) > 3 and not [flag for flag in flags if "." in flag]
    if script == "train_lm":
        assert not set(FLAGS) - set(flags)


# What a run leaves behind.


def test_metrics_hold_one_object_a_step(trained):
    records = read(trained[0])
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 401))
    for record in steps:
        assert {"step", "loss", "tokens_per_s", "loss_scale", "skipped"} <= record.keys()
        assert record["tokens_per_s"] > 0 and record["loss_scale"] > 0
    scales = [r["loss_scale"] for r in steps]
    assert steps[-1]["skipped"] > 0 and len(set(scales)) > 2, "the scale moved, or HARD is easy"
    assert [r["step"] for r in records if "validation_loss" in r] == [100, 200, 300, 400]
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_the_manifest_says_what_the_outcome_depends_on(trained):
    manifest = json.loads((trained[0] / "manifest.json").read_text())
    assert manifest["precision"]["name"] == "fp16" and manifest["precision"]["rules"]
    assert manifest["precision"]["loss_scale"] == "dynamic:init=16777216,interval=20"
    assert manifest["config"]["shape"]["width"] == 32 and manifest["config"]["lr"] == 1e-2
    assert {"jax", "jaxlib", "flax", "optax", "mpjax", "python"} <= manifest["versions"].keys()
    assert manifest["commit"] and "cpu" in manifest["device"]
    assert "--xla_force_host_platform_device_count=1" in manifest["xla_flags"]
    assert manifest["command"][0] == "train_lm.py" and "--dropout" in manifest["command"]


def events(folder: Path) -> list[Any]:
    """The records of TensorBoard files: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def test_tensorboard_holds_scalars_and_the_precision_as_hparam(trained):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    values = [(e.step, v) for e in events(trained[0] / "tensorboard") for v in e.summary.value]
    scalars = {v.tag for _, v in values if v.HasField("simple_value")}
    assert {"loss", "loss_scale", "skipped", "validation_loss"} <= scalars
    losses = dict(curve(trained[0]))
    points = {s: v.simple_value for s, v in values if v.tag == "loss"}
    assert len(points) >= 40 and all(p == pytest.approx(losses[s]) for s, p in points.items())
    plugins = [v.metadata.plugin_data for _, v in values if v.metadata.plugin_data.content]
    found = [HParamsPluginData.FromString(p.content) for p in plugins if p.plugin_name == "hparams"]
    settings = next(p.session_start_info.hparams for p in found if p.HasField("session_start_info"))
    assert settings["precision"].string_value.startswith("fp16 base:**/softmax=")
    assert settings["width"].number_value == 32


def test_the_screen_shows_precision_state_machine_and_sample(trained):
    _, out, err = trained
    assert "Precision fp16" in out and "XLA_FLAGS=" in out
    assert "bytes / " in out and "validation loss" in out
    assert "\nline 7" in out, "the sample begins with the prompt"
    assert "loss" in err and "tokens/s" in err and "scale 2^" in err and "skipped" in err


# Stopping and going on.


def wait_for_steps(process: subprocess.Popen[str], out: Path, count: int) -> None:
    path = out / "metrics.jsonl"
    until = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None and time.monotonic() < until, "no steps"
        time.sleep(0.002)


def test_a_run_stopped_by_sigterm_resumes_to_the_same_bits(trained, text, tmp_path):
    whole, at = trained[0], random.SystemRandom().randrange(5, 200)
    args = [*HARD, "--data", text, "--prompt", "line 7", "--out", tmp_path / "run"]
    process = start("train_lm", *args)
    wait_for_steps(process, tmp_path / "run", at)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    stopped = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert at <= stopped < 400, f"asked to stop at {at}, stopped at {stopped}"
    assert "stopped by SIGTERM" in out and "--resume latest" in out and "SIGTERM: stopping" in err
    assert curve(tmp_path / "run")[-1][0] == stopped
    out, _ = run("train_lm", *args, "--resume", "latest")
    names = ("loss_scale", "skipped", "grad_norm")
    assert curve(tmp_path / "run", *names) == curve(whole, *names), f"stopped at {stopped}"
    at_end = [[r for r in read(f) if "validation_loss" in r][-1] for f in (whole, tmp_path / "run")]
    assert at_end[0] == at_end[1]
    assert out[out.index("\nline 7") :] == trained[1][trained[1].index("\nline 7") :]


def test_a_run_that_cannot_go_on_names_the_gradient(text, tmp_path):
    args = [*SMALL, "--data", text, "--out", tmp_path / "run", "--patience", 3, "--steps", 50]
    args += ["--precision", "pure-fp16", "--loss-scale", "static:16777216"]
    _, err = run("train_lm", *args, code=2)
    last = err.splitlines()[-1]
    assert re.match(r"error: decoder/\S+: gradient is not finite, 3 steps in a row", last), err
    assert "16777216" in last.replace("1.67772e+07", "16777216") and "--rule" in last
    assert 3 <= len(curve(tmp_path / "run")) <= 4


def test_a_run_leaves_a_page_and_goes_on_without_an_audit(text, tmp_path):
    args = [*SMALL, "--data", text, "--schedule", "constant", "--sample", 0, "--out", tmp_path]
    out, _ = run("train_lm", *args, "--steps", 4, "--audit")
    page = (tmp_path / "report.html").read_text()
    assert f"report: {tmp_path / 'report.html'}" in out
    assert all(part in page for part in ("4 steps", 'id="audit"', "bytes/parameter", "No leaks"))
    run("train_lm", *args, "--steps", 6, "--resume", "latest")
    assert "6 steps" in (tmp_path / "report.html").read_text()


def test_packed_documents_train_and_resume_to_the_same_bits(tmp_path):
    draw, folder = random.Random(0), tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text("".join(f"text {i}\n" * draw.randrange(1, 30)))
    args = [*SMALL, "--data", folder, "--pack", "--steps", 6, "--save-every", 3, "--sample", 0]
    out, err = run("train_lm", *args, "--out", tmp_path / "whole")
    share = re.search(r"packed documents: (\d+\.\d\d)% of the rows is padding", out)
    assert share and 0 < float(share[1]) < 10 and "are longer than 32 tokens; split" in err
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    run("train_lm", *args, "--out", tmp_path / "again", "--resume", 3)
    assert len(curve(tmp_path / "again")) == 6
    assert curve(tmp_path / "again", "grad_norm") == curve(tmp_path / "whole", "grad_norm")


# Other starting points, other devices.


def test_a_bf16_run_starts_one_stored_low_and_says_what_it_cast(text, tmp_path):
    args = [*SMALL, "--data", text, "--sample", 0, "--lr", "1e-2"]
    run("train_lm", *args, "--precision", "bf16", "--steps", 60, "--out", tmp_path / "bf16")
    first, *_, last = curve(tmp_path / "bf16")
    for precision, update in (("pure-bf16", "bfloat16"), ("O2", "float16")):
        _, err = run(
            "train_lm", *args, "--precision", precision, "--steps", 3, "--out",
            tmp_path / precision, "--init-from", tmp_path / "bf16", "--lr", "1e-4",
        )  # fmt: skip
        shown = " ".join(err.split())
        weight = "params/decoder/layers/mlp/up/kernel"
        assert f"init_from: {weight}: float32 -> {update}" in shown
        if precision == "O2":
            assert f"master/decoder/layers/mlp/up/kernel: from {weight}" in shown
        begin = curve(tmp_path / precision)[0]
        assert begin[0] == 1 and abs(begin[1] - last[1]) < 0.3 * (first[1] - last[1])


def test_a_run_that_died_before_its_first_save_keeps_where_it_came_from(text, tmp_path):
    page = {"config": {"init_from": str(tmp_path / "old")}}
    (tmp_path / "manifest.json").write_text(json.dumps(page))
    args = [*SMALL, "--data", text, "--out", tmp_path, "--resume", "latest"]
    _, err = run("train_lm", *args, code=2)
    assert "resume: init_from was" in err and not (tmp_path / "metrics.jsonl").exists()


def test_a_schedule_of_precision_is_in_what_a_run_leaves(text, tmp_path):
    args = [*SMALL, "--data", text, "--sample", 4, "--steps", 8, "--eval-every", 0]
    _, err = run(
        "train_lm", *args, "--precision-schedule", "late:fp16:bf16:0.25", "--out", tmp_path
    )
    assert "step 7: fp16 -> bf16: the last 0.25 of 8 steps" in err
    records = [r for r in read(tmp_path) if "loss" in r]
    assert [r["precision"] for r in records] == [0] * 6 + [1] * 2
    assert records[6]["switch"].startswith("fp16 -> bf16") and records[6]["loss_scale"] == 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["precision_schedule"]["labels"] == ["fp16", "bf16"]
    assert manifest["precision_schedule"]["steps"] == 8 and manifest["precision"]["name"] == "fp16"


def test_a_mesh_of_eight_trains_and_resumes_onto_another(text, tmp_path):
    args = [*SMALL, "--data", text, "--sample", 0, "--precision", "fp32", "--dropout", 0]
    args += ["--schedule", "constant"]
    mesh, one = tmp_path / "mesh", tmp_path / "one"
    run("train_lm", *args, "--steps", 8, "--out", one)
    cube = "data=2,fsdp=2,tensor=2"
    out, _ = run("train_lm", *args, "--steps", 4, "--out", mesh, "--mesh", cube, devices=8)
    assert "8 x cpu" in out
    run("train_lm", *args, "--steps", 8, "--out", mesh, "--mesh", "data=2,fsdp=4", "--resume",
        "latest", devices=8)  # fmt: skip
    whole, cut = curve(one), curve(mesh)
    assert [step for step, _ in cut] == list(range(1, 9))
    assert cut[0][1] == pytest.approx(whole[0][1], rel=1e-5)  # one sum in another order
    assert [x for _, x in cut] == pytest.approx([x for _, x in whole], rel=1e-3)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_are_one_process_of_two_devices(text, tmp_path):
    args = [*SMALL, "--data", text, "--sample", 4, "--precision", "fp16"]
    port, two, one = free_port(), tmp_path / "two", tmp_path / "one"
    pair = [
        start("train_lm", *args, "--steps", 6, "--out", two, "--distributed",
              f"127.0.0.1:{port},{index},2")
        for index in (0, 1)
    ]  # fmt: skip
    (out, _), (silent, _) = (finish(process) for process in pair)
    assert "Precision fp16" in out and "Precision" not in silent, "the first process speaks"
    run("train_lm", *args, "--steps", 6, "--out", one, devices=2)
    assert curve(two, "loss_scale") == curve(one, "loss_scale") and len(curve(two)) == 6


def test_a_signal_to_one_process_stops_both_at_the_same_step(text, tmp_path):
    args = [*SMALL, "--data", text, "--sample", 4, "--steps", 5000, "--eval-every", 0]
    port, folder = free_port(), tmp_path / "run"
    pair = [
        start("train_lm", *args, "--out", folder, "--distributed", f"127.0.0.1:{port},{index},2")
        for index in (0, 1)
    ]
    wait_for_steps(pair[0], folder, 10)
    pair[1].send_signal(signal.SIGTERM)
    (out, _), _ = (finish(process) for process in pair)
    step = curve(folder)[-1][0]
    assert "stopped by a signal" in out and 10 <= step < 5000
    assert str(step) in os.listdir(folder / "checkpoints")


@pytest.mark.parametrize("given", ["node0:1234", "node0:1234,2,2", "auto"])
def test_processes_that_cannot_be_joined_are_one_line(tmp_path, given):
    _, err = run("train_lm", "--distributed", given, "--out", tmp_path / "run", code=2)
    assert err.startswith(f"error: distributed: '{given}'") and len(err.splitlines()) == 1
    assert "COORDINATOR:PORT,INDEX,COUNT" in err and not (tmp_path / "run").exists()


# The other experiments.


def test_sampling_is_deterministic_when_greedy_and_follows_its_seed(trained):
    args = ["--run", trained[0], "--prompt", "line 12", "--tokens", 30]
    greedy = [run("generate", *args, "--temperature", 0, "--seed", seed)[0] for seed in (0, 1)]
    assert greedy[0] == greedy[1] and greedy[0].startswith("line 12")
    other = run("generate", *args, "--temperature", 2, "--step", 150, "--precision", "fp32")[0]
    assert other.startswith("line 12") and other != greedy[0]


def require_report(
    out: Path, plots: tuple[str, ...], arms: tuple[str, ...], page: bool = True
) -> None:
    """The report of a comparison, with a page and its table unless it has no curves of runs."""
    report = (out / "report.md").read_text()
    for name in plots:
        assert f"({name})" in report
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    if page:
        shown = (out / "report.html").read_text()
        with (out / "results.csv").open(newline="") as file:
            table = [row[0] for row in csv.reader(file)]
        assert all(f">{arm}<" in shown and arm in table for arm in arms)
    for arm in arms:
        assert f"| {arm} |" in report
        runs = list((out / arm.replace(" ", "_")).iterdir())
        assert runs and all((r / "metrics.jsonl").exists() for r in runs)
        assert all((r / "manifest.json").exists() for r in runs)


TINY = [*SMALL, "--steps", "4", "--seeds", "2"]


def test_the_sweep_writes_its_report(text, tmp_path):
    out, _ = run("sweep", *TINY, "--data", text, "--precision", "fp32", "bf16", "--lr", "1e-3",
                 "1e-2", "--out", tmp_path)  # fmt: skip
    arms = tuple(f"{p} lr={lr}" for p in ("fp32", "bf16") for lr in ("0.001", "0.01"))
    require_report(tmp_path, ("loss.png", "loss_scale.png"), arms)
    first, second = (curve(tmp_path / "bf16_lr=0.01" / f"seed{seed}") for seed in (0, 1))
    paired = curve(tmp_path / "bf16_lr=0.001" / "seed0")
    assert first[0] == paired[0] != second[0] and first != paired, "seeds are paired over arms"
    assert "best: fp32 lr=0.01" in out and f"report: {tmp_path}" in out.replace("\n", "")


def test_an_arm_that_diverges_does_not_end_the_sweep(text, tmp_path):
    args = [
        *TINY,
        "--data",
        text,
        "--steps",
        60,
        "--seeds",
        1,
        "--warmup",
        0,
        "--precision",
        "fp32",
    ]
    out, err = run("sweep", *args, "--lr", "1e30", "1e-3", "--out", tmp_path)
    require_report(tmp_path, ("loss.png", "loss_scale.png"), ("fp32 lr=1e+30", "fp32 lr=0.001"))
    assert "best: fp32 lr=0.001" in out and "fp32 lr=1e+30, seed 0 stopped" in " ".join(err.split())
    for shown in (out, (tmp_path / "report.md").read_text()):
        assert "Failed: fp32 lr=1e+30, seed 0: " in shown, "with its reason"


def test_a_sweep_that_was_killed_goes_on(text, tmp_path):
    args = [*TINY, "--data", text, "--steps", 30, "--seeds", 1, "--precision", "fp32", "--lr",
            "1e-3", "--sweep", "width=16,24", "--mesh", "data=2"]  # fmt: skip
    killed = start("sweep", *args, "--out", tmp_path / "killed", devices=2)
    first, second = (
        tmp_path / "killed" / f"fp32_lr=0.001_width={width}" / "seed0" for width in (16, 24)
    )
    limit = time.monotonic() + 120
    while not (second / "metrics.jsonl").is_file() and time.monotonic() < limit:
        time.sleep(0.005)
    killed.kill()
    finish(killed, -signal.SIGKILL)
    assert (first / "outcome.json").is_file() and not (second / "outcome.json").is_file()
    before = {path: path.read_bytes() for path in first.iterdir() if path.is_file()}
    _, err = run("sweep", *args, "--out", tmp_path / "killed", devices=2)
    assert err.count("has ended before") == 1
    assert {path: path.read_bytes() for path in before} == before
    assert len(curve(second)) == 30 and (second / "outcome.json").is_file()


def test_the_comparison_writes_its_report(text, tmp_path):
    out, _ = run("compare_precisions", *TINY, "--data", text, "--seeds", 1, "--out", tmp_path)
    arms = ("fp32", "bf16", "fp16", "fp32 lr=0.0002", "pure-bf16 lr=0.0002", "fp32 x 2^-8",
            "fp16 x 2^-8", "fp16 unscaled x 2^-8")  # fmt: skip
    require_report(tmp_path, ("loss.png", "loss_scale.png", "gradients.png"), arms)
    assert "pure-bf16" in out


def test_the_update_rules_write_their_report(text, tmp_path):
    out, _ = run("low_bit_weights", *TINY, "--data", text, "--update", "nearest", "stochastic",
                 "--out", tmp_path)  # fmt: skip
    arms = ("fp32", "bf16 nearest", "bf16 stochastic", "e4m3 nearest", "e4m3 stochastic")
    require_report(tmp_path, ("loss.png",), arms)
    assert out.count("% of the gap between fp32 and") == 2
    _, err = run("low_bit_weights", "--storage", "e3m2", "--data", text, "--out", tmp_path, code=2)
    assert err.startswith("error: rule '**/kernel=p=e3m2'") and len(err.splitlines()) == 1


def test_low_bit_states_write_their_report(text, tmp_path):
    out, _ = run("low_bit_adam", *TINY, "--data", text, "--seeds", 1, "--moments", "int8-linear",
                 "int4,keep=**/embed", "--others", "lion", "--out", tmp_path)  # fmt: skip
    arms = ("Adam f32", "Adam int8-linear", "Adam int4,keep=embed", "lion first=int8@256")
    require_report(tmp_path, ("loss.png",), arms)
    assert "Bytes of optimizer state" in (tmp_path / "report.md").read_text() and "lion" in out


def test_compressed_gradients_write_their_report(text, tmp_path):
    out, _ = run("compress_gradients", *TINY, "--data", text, "--lr", "1e-3", "2e-3",
                 "--compression", "none", "int8@64,min=0", "sign@64,momentum=0.9,min=0",
                 "none every=2", "--mesh", "data=4", "--out", tmp_path, devices=4)  # fmt: skip
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 4
    shares = [float(row[6]) for row in rows]
    assert shares[0] == 1 and shares[1] < 0.3 and shares[2] < 0.1 and shares[3] == 0.5
    assert (tmp_path / "sent.png").exists() and "rates tried" in (
        tmp_path / "report.md"
    ).read_text()
    (page,) = tmp_path.glob("sign*lr=0.001/seed0/manifest.json")
    manifest = json.loads(page.read_text())
    assert manifest["config"]["optimizer"] == "one-bit-adam"
    assert manifest["precision"]["compression"] == "sign@64,momentum=0.9,warmup=2,min=0"


def test_replicas_train_apart_and_resume(text, tmp_path):
    common = [*SMALL, "--data", text, "--mesh", "data=4", "--compression", "int4@64,min=0",
              "--diloco", "every=3", "--save-every", 4, "--schedule", "constant",
              "--sample", 8]  # fmt: skip
    for name, more in (("a", [8]), ("b", [4]), ("b", [8, "--resume", "latest"])):
        run("train_lm", *common, "--out", tmp_path / name, "--steps", *more, devices=4)
    losses = [[r["loss"] for r in read(tmp_path / name) if "loss" in r] for name in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    out, _ = run("generate", "--run", tmp_path / "a", "--tokens", 4)
    assert out


def test_the_recipes_write_their_report(text, tmp_path):
    out, _ = run("low_bit_products", *TINY, "--data", text, "--seeds", 2, "--most-seeds", 2,
                 "--recipe", "fp8-delayed", "int8", "--out", tmp_path)  # fmt: skip
    assert "of the product FLOPs quantised" in out and "native int8 product" in out
    assert (tmp_path / "report.md").exists() and (tmp_path / "loss.png").exists()
    manifest = json.loads((tmp_path / "int8" / "seed1" / "manifest.json").read_text())
    assert manifest["products"]["int8"]["wgrad"] == "native int8 product"
    _, err = run("low_bit_products", "--recipe", "fp9", "--data", text, "--out", tmp_path, code=2)
    assert "unknown recipe 'fp9'" in err


def test_the_cost_of_a_recipe_is_a_ratio_to_bf16():
    args = ("--recipe", "fp8", "--size", "tiny", "--layers", 1, "--batch", 1, "--seq", 16)
    out, _ = run("bench_recipes", *args, "--rounds", 2)
    assert "time / bf16" in out and "bfloat16 product of exact values" in out.replace("\n", " ")


def test_the_benchmark_finds_the_same_program():
    args = "--size tiny --layers 1 --batch 2 --seq 128 --rounds 2".split()
    out, _ = run("bench_step", *args)
    assert out.count("same products and casts: yes") == 2 and "NO" not in out
    assert out.count("time ours/careful") == 2 and "XLA_FLAGS=" in out


def test_the_formats_write_their_report(tmp_path):
    args = "--longest 6 --rows 8 --channels 128 --tokens 16 --seeds 2 --size 1 100 10000".split()
    names = ("int8-block", "int8-tensor", "e4m3-block", "e4m3-tensor")
    out, _ = run("formats", *args, "--recipe", "fp8", "mxfp4", "--pair", *names, "--out", tmp_path)
    require_report(tmp_path, ("sqnr_length.png", "sqnr_outliers.png", "distinct.png"), (), False)
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in report for name in ("fp8", "mxfp4", *names))
    assert "| > 20 dB |" in report and "| >= 10 dB |" in report and "int8" in out
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["lengths"]) == 2 * 3 * 3 and len(found["distinct"]) == 2 * 6
    _, err = run("formats", "--recipe", "fp9", "--out", tmp_path / "none", code=2)
    assert err.startswith("error: recipe: unknown recipe 'fp9'; did you mean fp8") and (
        not (tmp_path / "none").exists()
    )


def test_models_of_other_libraries_train_as_they_are(text, tmp_path):
    args = "--layers 1 --width 16 --heads 2 --seq 16 --batch 4 --steps 4 --eval-batches 2".split()
    args += ["--data", text, "--precision", "bf16"]
    out, _ = run("autocast_any", *args, "--rule", "**/attention=fp32")
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [
        [model, precision] for model in ("equinox", "nnx") for precision in ("fp32", "bf16")
    ]
    shares = [float(row[5].removesuffix("%")) for row in rows]
    assert shares[0] == shares[2] == 0 and 60 < shares[1] < 95 and 60 < shares[3] < 95
    _, err = run("autocast_any", *args, "--rule", "**/atention=fp32", "--model", "nnx", code=2)
    assert err.startswith("error: autocast: rule") and "matches no path" in err
    (tmp_path / "equinox.py").write_text("raise ModuleNotFoundError('absent', name='equinox')")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    _, err = finish(start("autocast_any", *args, PYTHONPATH=path), code=2)
    assert err.startswith("error: model: equinox needs a package") and len(err.splitlines()) == 1
    assert "pip install equinox, or run --model nnx" in err


def test_a_network_tells_images_apart(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2  # a bright row or a bright column
    images = rng.normal(size=(200, 6, 6))
    images[labels == 0, 3] += 2
    images[labels == 1, :, 3] += 2
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    args = ["--data", tmp_path / "x.npz", *"--batch 32 --steps 30 --seeds 1 --warmup 2".split()]
    out, _ = run("image_cnn", *args, "--precision", "bf16-x16", "--out", tmp_path / "a")
    require_report(tmp_path / "a", ("loss.png",), ("bf16-x16",))
    rows = [line.split(" | ") for line in (tmp_path / "a/report.md").read_text().splitlines()]
    (row,) = (row for row in rows if row[0] == "| bf16-x16")
    assert row[1] == "bf16 * bf16 -> bf16; bf16 * bf16 -> f32"  # the latter of weight gradients
    assert float(row[2]) > 0.9 and "40 held-out images" in out
    changed = ["--precision", "bf16-x16", "--augment", "crop", "colour"]
    run("image_cnn", *args, *changed, "--out", tmp_path / "c")
    plain, augmented = (read(tmp_path / name / "bf16-x16" / "seed0") for name in "ac")
    assert len(plain) == len(augmented) and plain[0]["loss"] != augmented[0]["loss"]
    _, err = run("image_cnn", *args, "--augment", "crp", "--out", tmp_path / "d", code=2)
    assert err.startswith("error: augment: unknown 'crp'; did you mean crop? known: crop flip")
    _, err = run("image_cnn", *args, "--precision", "bf61", "--out", tmp_path / "b", code=2)
    assert err.startswith("error: precision: unknown preset 'bf61'; did you mean bf16")
    assert len(err.splitlines()) == 1 and not (tmp_path / "b").exists()


def test_a_language_model_answers_and_is_exported(text, tmp_path):
    args = [*SMALL, "--data", text, "--steps", 4, "--sample", 0, "--tokenizer", "bpe:300"]
    run("train_lm", *args, "--out", tmp_path / "run")
    out, _ = finish(
        start_module("mpjax.predict", tmp_path / "run", "--text", "line", "--tokens", 3)
    )
    assert set(json.loads(out)) == {"input", "text"}
    finish(start_module("mpjax.export", tmp_path / "run", tmp_path / "model", "--dtype", "bf16"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "bfloat16"
    assert (tmp_path / "model" / "tokenizer.json").is_file() and "eos_token_id" in config


def test_from_a_table_to_answers_and_an_export(tmp_path):
    path, out = tmp_path / "own.csv", tmp_path / "run"
    rows = [
        f"{n},soup {n} was {('stale', 'fine')[n % 2]},{('bad', 'good')[n % 2]}\n" for n in range(60)
    ]
    path.write_text("id,review,stars\n" + "".join(rows))
    args = ["--data", path, *"--text review --label stars --layers 1 --width 16 --heads 2".split()]
    args += "--vocabulary 200 --longest 16 --batch 8 --steps 30 --lr 1e-2".split()
    told, _ = run("finetune", *args, "--out", out)
    assert "bad 27, good 27" in told and "best weights, of step" in told
    assert (out / "report.html").is_file() and "report: " in told
    asked = ["soup 7 was fine", "soup 8 was stale"]
    said, _ = finish(start_module("mpjax.predict", out, "--text", *asked))
    answers = [json.loads(line) for line in said.splitlines()]
    assert [(a["input"], a["label"]) for a in answers] == list(
        zip(asked, ("good", "bad"), strict=True)
    )
    same, _ = finish(start_module("mpjax.predict", out, "--data", path, "--weights", "int8"))
    assert len(same.splitlines()) == 60
    said, _ = finish(start_module("mpjax.export", out, tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"} and "weights of step" in said
    _, err = run("finetune", *args, "--out", out, code=2)
    assert err.startswith("error: out: ") and "go on with it by resume" in err
    for module, bad, message in (
        ("mpjax.predict", [tmp_path, "--text", "a"], "no run here (run.json)"),
        ("mpjax.predict", [out], "give either --text or --data"),
        ("mpjax.predict", [out, "--data", path, "--column", "body"], "no column 'body'"),
        ("mpjax.predict", [out, "--text", "a", "--weights", "int9"], "int9"),
        ("mpjax.export", [out, tmp_path / "model"], "export needs a new or empty folder"),
    ):
        _, err = finish(start_module(module, *bad), code=2)
        assert message in err and len(err.splitlines()) == 1, err


def test_annealing_is_compared_at_equal_operations(text, tmp_path):
    args = [
        "--data",
        text,
        *"--layers 1 --width 16 --heads 2 --seq 16 --batch 4 --steps 12".split(),
    ]
    args += "--lr 1e-3 1e-2 --scale 1e-3 --descend 3 --seeds 2 --methods descent alternate".split()
    run("anneal", *args, "--out", tmp_path / "a")
    require_report(tmp_path / "a", ("loss.png",), ("descent fp32", "alternate fp32"))
    rows = [line.split(" | ") for line in (tmp_path / "a/report.md").read_text().splitlines()]
    (first, second) = (row for row in rows if row[0][2:] in ("descent fp32", "alternate fp32"))
    # 12 = 3 cycles of 3 gradient steps and a proposal, which costs two thirds of one, and a bit
    assert first[2:4] == ["12", "0"] and second[2:4] == ["10", "3"]
    assert first[5] == "–" and first[6] == "–" and second[6].endswith(" %")
    arms = [tmp_path / "a" / f"{name}_fp32" / "seed1" for name in ("descent", "alternate")]
    assert [len(curve(arm)) - 1 for arm in arms] == [12, 13]  # the last one is the judge's
    for bad, message in (
        (["--methods", "alternate"], "methods: alternate is first"),
        (["--methods", "descent", "sgdsa"], "methods: unknown 'sgdsa'; known: descent"),
    ):
        _, err = run("anneal", *args, *bad, "--out", tmp_path / "none", code=2)
        assert message in err and len(err.splitlines()) == 1 and not (tmp_path / "none").exists()


def test_recurrent_models_write_their_report(text, tmp_path):
    args = "--width 16 --seq 16 --batch 4 --steps 4 --eval-batches 2 --warmup 2 --seeds 2".split()
    args += ["--data", text]
    arms = ("fp32", "bf16, state bf16")
    out, _ = run("rnn_lm", *args, "--cell", "gru", "--precision", *arms, "--out", tmp_path / "a")
    require_report(tmp_path / "a", ("loss.png",), arms)
    assert "95 % interval" in out and "nats a token on one passage" in " ".join(out.split())
    _, err = run("rnn_lm", *args, "--cell", "grou", "--out", tmp_path / "none", code=2)
    assert err == "error: model: cell='grou' is unknown; known: lstm gru\n"
    assert not (tmp_path / "none").exists()


FRESH = "--checkpoint none --layers 1 --width 16 --heads 2 --vocabulary 90 --batch 16".split()


def test_a_classifier_is_compared_by_precision_and_slice(tmp_path):
    draw, words = random.Random(0), ("tasty fresh lovely great", "stale awful bitter poor")
    path, out_folder = tmp_path / "a.tsv", tmp_path / "out"
    rows = [
        f"{('good', 'bad')[i % 2]}\t{' '.join(draw.choices(words[i % 2].split(), k=5))} n{i}\n"
        for i in range(160)
    ]
    path.write_text("".join(rows))
    args = [*FRESH, "--data", path, *"--lengths 16 --steps 40 --warmup 1 --seeds 1".split()]
    args += ["--precision", "fp32", "bf16", "--lr", "1e-2", "--dropout", 0]
    out, _ = run("finetune_classifier", *args, "--out", out_folder)
    require_report(out_folder, ("loss.png",), ("fp32", "bf16"))
    found = json.loads((out_folder / "results.json").read_text())["arms"]
    assert all(one["accuracy"] > 0.8 for scores in found.values() for one in scores)
    report = (out_folder / "report.md").read_text()
    assert "| naive Bayes |" in report and "TF-IDF logistic regression" in report
    assert "## bf16 by class" in report and "| bad |" in report and "## bf16 by length" in report
    assert "points above" in out
    for bad, message in (
        (["--data", tmp_path / "none.tsv"], "error: data "),
        (["--precision", "fp32", "late:fp8:bf61:0.5"], "error: precision schedule"),
        (
            ["--precision", "fp32", "late:fp8:bf16:0.001"],
            "error: precision schedule: late: 0.001 of 40",
        ),
        (
            ["--precision", "fp32", "fixed:fp8:bf16"],
            "error: precision: fixed:fp8:bf16 is judged in",
        ),
    ):
        _, err = run("finetune_classifier", *args, *bad, "--out", tmp_path / "none", code=2)
        assert err.splitlines()[-1].startswith(message), err
        assert not (tmp_path / "none").exists()


def test_a_student_is_compared_alone_and_distilled(tmp_path):
    draw, words = random.Random(0), ("tasty fresh lovely great", "stale awful bitter poor")
    path, out_folder = tmp_path / "a.tsv", tmp_path / "out"
    rows = [
        f"{('good', 'bad')[i % 2]}\t{' '.join(draw.choices(words[i % 2].split(), k=5))} n{i}\n"
        for i in range(96)
    ]
    path.write_text("".join(rows))
    args = [*FRESH, "--data", path, *"--lengths 16 --steps 6 --warmup 1 --seeds 1".split()]
    args += ["--precision", "fp32", "--teacher-weights", "int8", "--student-layers", 1]
    run("distil", *args, "--hidden", 1, "--relations", 1, "--out", out_folder)
    require_report(out_folder, ("loss.png",), ("alone", "fp32 of int8"))
    assert "| teacher, int8 |" in (out_folder / "report.md").read_text()
    few = tmp_path / "few"
    run("distil", *args, "--labelled", 20, "--hard", 0, "--out", few)
    require_report(few, ("loss.png",), ("alone", "fp32 of int8"))
    assert ", 20 of them with labels, " in (few / "report.md").read_text()
    for bad, message in (
        (
            ["--labelled", "20"],
            "error: hard: 1, but of all but 20 texts no label is known; set --h",
        ),
        (["--labelled", "999", "--hard", "0"], "error: labelled: 999, the data has"),
        (["--labelled", "9", "--task", "lm"], "error: labelled: 9, but every token of `lm` is"),
        (["--labelled", "-1"], "error: labelled: -1"),
        (["--teacher-weights", "int9"], "error: teacher_weights: 'int9'"),
        (["--temperature", "0"], "error: temperature: 0"),
        (["--student-layers", "7"], "error: distillation: the student has 7 layers, the teacher 1"),
        (["--soft", "0"], "error: distillation: soft=0 leaves the teacher out"),
    ):
        _, err = run("distil", *args, *bad, "--out", tmp_path / "none", code=2)
        assert err.splitlines()[-1].startswith(message), err
        assert not (tmp_path / "none").exists()


def test_a_student_of_language_learns_from_stored_answers(text, tmp_path):
    args = [*FRESH, "--task", "lm", "--data", text, "--batch", 4, "--lengths", 16, "--steps", 4]
    args += "--vocabulary 300 --warmup 1 --seeds 1 --precision fp32".split()
    args += "--teacher-weights f32 --top 8 --student-width 16".split()
    run("distil", *args, "--out", tmp_path / "a")
    arms = ("alone", "fp32 of f32", "fp32 of stored top 8")
    require_report(tmp_path / "a", ("loss.png",), arms)


def test_augmentations_are_compared_with_none(tmp_path):
    draw, words = random.Random(0), ("tasty fresh lovely great", "stale awful bitter poor")
    rows = [
        f"{('good', 'bad')[i % 2]}\t{' '.join(draw.choices(words[i % 2].split(), k=5))} n{i}\n"
        for i in range(120)
    ]
    path, list_of_words = tmp_path / "a.tsv", tmp_path / "words.txt"
    path.write_text("".join(rows))
    list_of_words.write_text("tasty: lovely, fresh\nawful: bitter\n")
    args = [*FRESH, "--data", path, "--synonyms", list_of_words, "--texts", 40]
    args += "--lengths 16 --steps 6 --warmup 1 --seeds 2 --dropout 0".split()
    names = ("eda", "contextual", "mixup", "word-mixup")
    out, _ = run("augment", *args, "--augment", *names, "--out", tmp_path / "out")
    require_report(tmp_path / "out", ("gain.png",), ("none", *names))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert set(found) == {"none", *names} and len({s[0]["loss"] for s in found.values()}) == 5
    assert "40 training and" in out and "Of the 90% intervals of 4 arms" in " ".join(out.split())
    pages = [json.loads(p.read_text()) for p in tmp_path.glob("out/*/seed1/manifest.json")]
    assert len(pages) == 5 and all(page["config"]["seed"] == 1 for page in pages)


def test_methods_are_compared_clean_and_under_attack(tmp_path):
    draw, words = random.Random(0), ("tasty fresh lovely great", "stale awful bitter poor")
    path = tmp_path / "a.tsv"
    rows = [
        f"{('good', 'bad')[i % 2]}\t{' '.join(draw.choices(words[i % 2].split(), k=5))} n{i}\n"
        for i in range(120)
    ]
    path.write_text("".join(rows))
    args = [*FRESH, "--data", path, *"--lengths 16 --steps 20 --warmup 1 --seeds 1".split()]
    args += ["--lr", "1e-2", "--texts", 64, "--attack-steps", 2, "--copies", 1]
    out, _ = run("adversarial", *args, "--method", "none", "fgm", "--out", tmp_path / "a")
    report = (tmp_path / "a" / "report.md").read_text()
    assert "| none fp32 |" in report and "| fgm fp32 |" in report and "fgm 2.67" in out
    found = json.loads((tmp_path / "a" / "results.json").read_text())["arms"]
    for (scores,) in found.values():
        assert 0 <= scores["pgd accuracy"] <= scores["accuracy"] <= 1
        assert scores["accuracy"] > 0.8 and not scores["pgd nonfinite"]
    _, err = run("adversarial", *args, "--method", "fgsm", "--out", tmp_path / "none", code=2)
    assert err.startswith("error: method: unknown 'fgsm'; known: none longer fgm pgd freelb")
    assert len(err.splitlines()) == 1 and not (tmp_path / "none").exists()


def test_several_tasks_are_compared_with_each_alone(tmp_path):
    draw, kinds = random.Random(0), {"cat": "N", "dog": "N", "runs": "V", "red": "J", "the": "D"}
    words, texts = tmp_path / "words.tsv", tmp_path / "texts.tsv"
    sentences = [draw.choices(list(kinds), k=4) + [f"n{i}"] for i in range(80)]
    tagged = ["".join(f"{w}\t{kinds.get(w, 'X')}\n" for w in s) for s in sentences]
    long = "".join(f"word{i}\tN\n" for i in range(40))
    words.write_text("\n".join([*tagged, long]))
    texts.write_text("".join(
        f"{('good', 'bad')[i % 2]}\t{('fine', 'poor')[i % 2]} {' '.join(s)}\n"
        for i, s in enumerate(sentences)
    ))  # fmt: skip
    args = ["--tasks", f"tags=token:{words}", f"mood=class:{texts}"]
    args += "--layers 1 --width 16 --heads 2 --vocabulary 90 --batch 16 --lengths 16".split()
    args += "--steps 40 --warmup 1 --seeds 1 --lr 1e-2 --dropout 0 --methods fixed".split()
    out = tmp_path / "out"
    _, err = run("multitask", *args, "--out", out)
    assert "tags: 1 of " in err and "more than 16 tokens and are left out" in err
    arms, report = ("single, fp32", "fixed, fp32"), (out / "report.md").read_text()
    assert (out / "loss.png").stat().st_size > 10_000
    assert all(f"| {arm} |" in report for arm in (*arms, "most frequent"))
    found = json.loads((out / "results.json").read_text())
    for arm in arms:
        assert all(one["tags"] > 0.8 and one["mood"] > 0.6 for one in found["arms"][arm])
    assert {"gradient, tags", "gradient, cosine"} <= found["arms"]["fixed, fp32"][0].keys()
    names = ("single-tags", "single-mood", "fixed")
    # the last record is that of the held-out texts
    steps = [len(curve(out / name / "fp32" / "seed0")) - 1 for name in names]
    assert steps[0] + steps[1] == steps[2] == 40
    for bad, message in (
        (["--tasks", f"tags=token:{words}"], "alone is no mixture; give two or more"),
        (["--tasks", "pos", f"tags=token:{words}"], "error: tasks: 'pos'; known: pos-oanc"),
        (["--tasks", f"a=token:{words}", f"a=class:{texts}"], "two tasks are named 'a'"),
    ):
        _, err = run("multitask", *args, *bad, "--out", tmp_path / "none", code=2)
        assert message in err.splitlines()[-1], err
        assert not (tmp_path / "none").exists()


def test_a_tagger_is_compared_with_the_most_frequent_tag(tmp_path):
    draw, path = random.Random(0), tmp_path / "a.txt"
    sentences = [
        [(word, "O") for word in draw.choices(("go", "to", "see"), k=draw.randint(1, 4))]
        + [(f"city{i % 40}", "B-city"), ("town", "I-city")]
        for i in range(160)
    ]
    path.write_text("\n".join("".join(f"{w}\t{t}\n" for w, t in s) for s in sentences))
    args = [*FRESH, "--data", path, "--task", "ner", *"--lengths 16 --steps 12".split()]
    args += "--warmup 1 --seeds 1 --precision fp32 --lr 3e-2 --dropout 0".split()
    out, _ = run("finetune_tagger", *args, "--out", tmp_path / "out")
    require_report(tmp_path / "out", ("loss.png",), ("fp32",))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert all(one["entity f1"] > 0.8 for scores in found.values() for one in scores)
    assert "of entity f1 above the most frequent tag" in out
    path.write_text("word without a tag\n")
    _, err = run("finetune_tagger", *args, "--out", tmp_path / "none", code=2)
    assert "line 1: 'word without a tag'; expected word<TAB>tag" in err


def test_chinese_words_are_scored_whole(tmp_path):
    draw, path = random.Random(0), tmp_path / "a.txt"
    words = (("我们", "r"), ("喜欢", "v"), ("书", "n"), ("书店", "n"))
    lines = []
    for i in range(120):
        for word, tag in [*draw.choices(words, k=draw.randint(2, 4)), (chr(0x4E00 + i), "x")]:
            lines += [f"{c}\t{'I' if n else 'B'}-{tag}\n" for n, c in enumerate(word)]
        lines.append("\n")
    path.write_text("".join(lines), encoding="utf-8")
    args = [*FRESH, "--data", path, "--task", "chinese", *"--lengths 16 --steps 12".split()]
    args += "--warmup 1 --seeds 1 --precision fp32 --lr 3e-2 --dropout 0".split()
    run("finetune_tagger", *args, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for scores in (*found["arms"]["fp32"], found["baselines"]["most frequent tag"]):
        assert 1 >= scores["word f1"] >= scores["entity f1"] > 0.3


def test_a_recommender_is_compared_with_popularity(tmp_path):
    draw, path = random.Random(0), tmp_path / "a.tsv"
    rows = [
        f"u{user}\t{'war love'.split()[user % 2]} film{2 * film + user % 2}\t{time}\n"
        for user in range(24)
        for time, film in enumerate(draw.sample(range(12), 6))
    ]
    path.write_text("".join(rows))
    args = [*FRESH, "--data", path, *"--lengths 24 --steps 30 --warmup 1 --seeds 1".split()]
    args += "--precision fp32 fp16 --lr 3e-2 --item-length 8 --history 3".split()
    out, _ = run("recommend", *args, "--out", tmp_path / "out")
    require_report(tmp_path / "out", ("loss.png",), ("fp32", "fp16"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    (scores,), popularity = found["arms"]["fp32"], found["baselines"]["popularity"]
    assert scores["hr@10"] > popularity["hr@10"] and len(found["baselines"]) == 2
    assert "points of NDCG@10 above popularity (95 % interval over 24 users)" in out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## fp16 by likes of the user" in report and "| truncated SVD" in report


def test_bert_learns_both_tasks_and_is_exported(tmp_path):
    pytest.importorskip("safetensors", reason="the extra hub is not installed")
    draw, folder = random.Random(0), tmp_path / "text"
    folder.mkdir()
    for i in range(20):  # ten words a file: a second segment of other words is not the next one
        own = [f"{c}{i % 4}" for c in "abcdefghij"]
        lines = "".join(f"{' '.join(draw.choices(own, k=5))}\n" for _ in range(40))
        (folder / f"{i}.txt").write_text(lines)
    args = [*FRESH, "--data", folder, *"--lengths 16 --steps 12 --warmup 1 --seeds 1".split()]
    args += ["--precision", "fp32", "bf16", "--lr", "1e-2", "--eval-batches", 1, "--lines", 10]
    out, _ = run("pretrain_bert", *args, "--out", tmp_path / "a", "--export", tmp_path / "bert")
    require_report(tmp_path / "a", ("loss.png",), ("fp32", "bf16"))
    found = json.loads((tmp_path / "a" / "results.json").read_text())["arms"]
    for (scores,) in found.values():
        assert scores["gradient, masked"] + scores["gradient, next"] == pytest.approx(1)
        assert scores["masked"] < np.log(90) and 0 <= scores["next accuracy"] <= 1
    report = (tmp_path / "a" / "report.md").read_text()
    assert "| counting |" in report and "times in training" in report
    assert "held-out losses against fp32: masked" in out and "cosine" in out
    for arm in ("fp32", "bf16"):
        kept = {path.name for path in (tmp_path / "bert" / arm).iterdir()}
        assert kept == {"config.json", "model.safetensors", "tokenizer.json"}
    again = ["--checkpoint", tmp_path / "bert" / "bf16", "--steps", 1, "--warmup", 0]
    run("pretrain_bert", *args, *again, "--precision", "fp32", "--out", tmp_path / "b")
    (more,) = json.loads((tmp_path / "b" / "results.json").read_text())["arms"]["fp32"]
    assert more["masked"] == pytest.approx(found["bf16"][0]["masked"], rel=0.1)
    tagged = tmp_path / "tagged.txt"  # a tagger leaves the pooler and all heads of it out
    tagged.write_text("".join(f"a{i % 9}\tA\nb{i}\tB\n\n" for i in range(60)))
    headed = tmp_path / "bert" / "fp32" / "model.safetensors"
    classifier = {"classifier.weight": np.ones((5, 16), np.float32), "classifier.bias": np.ones(5)}
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(numpy.load_file(headed) | classifier, headed)
    tune = ["--checkpoint", tmp_path / "bert" / "fp32", "--data", tagged, "--lengths", 16]
    tune += "--batch 8 --steps 1 --warmup 0 --seeds 1 --precision fp32".split()
    run("finetune_tagger", *tune, "--out", tmp_path / "c")
    _, err = run("pretrain_bert", *args, "--out", tmp_path / "none", "--export", tmp_path / "bert",
                 code=2)  # fmt: skip
    assert "bert: export needs a new or empty folder" in err and not (tmp_path / "none").exists()


def test_an_encoder_decoder_is_compared_with_a_lexicon(tmp_path):
    draw, path, spelled = random.Random(0), tmp_path / "a.tsv", str.maketrans("abcd", "XYZW")
    words = ["".join(draw.choices("abcd", k=draw.randint(1, 5))) for _ in range(200)]
    path.write_text("".join(f"{w}\t{w.translate(spelled)}\n" for w in dict.fromkeys(words)))
    args = "--layers 1 --width 16 --heads 2 --batch 16 --lengths 8 --steps 6 --warmup 1".split()
    args += ["--data", path, "--seeds", 1, "--beams", 2, "--precision", "fp32", "bf16"]
    out, _ = run("translate", *args, "--out", tmp_path / "out")
    require_report(tmp_path / "out", ("loss.png",), ("fp32", "bf16"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert all({"cer", "exact", "chrf", "loss"} <= one.keys() for s in found.values() for one in s)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| lexicon and spelling | 0.00 | – | 100.00 |" in report, "it was spelled by a table"
    assert "## bf16 by words of the source" in report and "points of exact from" in report
    for bad, message in (
        (["--data", "nams"], "error: data 'nams': no such source or file"),
        (["--precision", "fp32", "bf61", "--cache", "int8"], "error: precision: unknown preset"),
    ):
        _, err = run("translate", *args, *bad, "--out", tmp_path / "none", code=2)
        assert err.splitlines()[-1].startswith(message), err
        assert not (tmp_path / "none").exists()


PLAN = """
[model]
family = "encoder"
size = "bert-tiny"
layers = 1
width = 16
heads = 2

[[stage]]
name = "pretrain"
kind = "masked"
data = "{texts}"
tokenizer = "wordpiece:90"
precision = "bf16"
steps = 4
batch = 4
lengths = [16]
lines = 10

[[stage]]
name = "tune"
kind = "classify"
data = "{labelled}"
precision = "fp16"
steps = 6
batch = 8
lengths = [16]

[[stage]]
name = "int8"
kind = "quantise"
"""


def test_a_plan_of_stages_writes_its_report(tmp_path):
    draw, texts, labelled = random.Random(0), tmp_path / "texts", tmp_path / "a.tsv"
    texts.mkdir()
    for i in range(8):
        own = [f"{c}{i % 4}" for c in "abcdefghij"]
        lines = "".join(f"{' '.join(draw.choices(own, k=5))}\n" for _ in range(30))
        (texts / f"{i}.txt").write_text(lines)
    labelled.write_text("".join(f"{'xy'[i % 2]}\ta{i % 4} b{i % 2} c{i}\n" for i in range(80)))
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.format(texts=texts, labelled=labelled))
    out = tmp_path / "out"
    _, err = run("stages", "--plan", plan, "--out", out, "--save-every", 3)
    report = (out / "report.md").read_text()
    assert "| tune | classify | weights of pretrain | fp16 | 6 |" in report
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "results.json").read_text())
    assert all(0 < one["validation_loss"] < 20 for one in found.values())
    assert 0 <= found["int8"]["accuracy"] <= 1 and "masked_accuracy" in found["pretrain"]
    kinds = {path: what for path, what, _ in found["tune"]["taken"]}
    assert kinds["encoder/layers"] == "taken" and kinds["encoder/masked"] == "dropped"
    assert kinds["encoder/class"] == "anew"
    assert "| encoder/class | anew |" in err and "| moments | anew |" in err
    transformers_folder, again = tmp_path / "exported", ("--plan", plan, "--out", out)
    run("stages", *again, "--save-every", 3, "--export", transformers_folder, "--stage", "tune")
    config = json.loads((transformers_folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "x", "1": "y"}
    assert (transformers_folder / "tokenizer.json").is_file()
    for name, steps in (("pretrain", 4), ("tune", 6), ("int8", 0)):
        numbers = [r["step"] for r in read(out / name) if "loss" in r]
        assert numbers == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A checkpoint that draws its answers from random weights, with tokenizer and template."""
    pytest.importorskip("safetensors", reason="the extra hub is not installed")
    pytest.importorskip("jinja2", reason="the extra chat is not installed")
    import jax
    import tokenizers

    from mpjax.models import decoder
    from mpjax.models.hf import save_checkpoint

    folder = tmp_path_factory.mktemp("talker") / "checkpoint"
    model = decoder("tiny", layers=1, width=32, heads=2, vocabulary=258, context=128)
    save_checkpoint(folder, model, model.init(jax.random.key(0)))
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>"
    page = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(page))
    return folder


def test_a_checkpoint_answers_in_any_storage(talker):
    args = ["--checkpoint", talker, "--prompt", "hello", "--tokens", 6]
    out, err = run("chat", *args, "--weights", "int4", "--cache", "int8")
    assert out.endswith("\n") and "MB of weights in int4@32+offset (float32:" in err
    assert re.search(r"[1-6] tokens, the first after [\d.]+ s, then ", err)


def test_a_checkpoint_is_rounded_by_a_text(talker, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a calibration text of some length. " * 10)
    args = ["--checkpoint", talker, "--prompt", "hello", "--tokens", 6, "--weights", "int4@8"]
    _, err = run("chat", *args, "--calibration", text)
    assert "MB of weights in int4@8 (float32:" in err


def test_a_chat_that_cannot_begin_is_one_line(talker, tmp_path):
    args = ["--checkpoint", talker, "--prompt", "hello", "--tokens", 6]
    short = tmp_path / "short.txt"
    short.write_text("short")
    for bad, message in (
        (["--weights", "int5"], "error: weights: 'int5': format: unknown name"),
        (["--tokens", 500], "error: prompt: "),
        (["--weights", "bf16", "--calibration", "stdlib"], "error: calibration: weights=bf16 are"),
        (
            ["--calibration", short],
            f"error: calibration: {short} has 5 tokens where a window takes",
        ),
        (["--checkpoint", tmp_path], f"error: {tmp_path}: no checkpoint in it"),
        ([tmp_path], "error: checkpoint="),
        (["--tokens", -1], "error: tokens: -1 is out of range"),
    ):
        _, err = run("chat", *args, *bad, code=2)
        assert err.splitlines()[-1].startswith(message), err


def test_beams_and_stored_weights_continue_a_prompt(trained):
    args = ["--run", trained[0], "--prompt", "line 12", "--tokens", 8]
    found = [run("generate", *args, "--beams", 3, *more)[0] for more in
             ((), ("--weights", "int8", "--cache", "int8"))]  # fmt: skip
    assert all(text.startswith("line 12") for text in found)
    _, err = run("generate", *args, "--beams", 3, "--top-k", 5, code=2)
    assert err.startswith("error: top_k: beam search draws nothing")


# A step for chips that are not here.


def test_preflight_writes_what_a_step_needs(tmp_path):
    out, _ = run(
        "preflight", *"--model tiny --layers 1 --precision bf16 int8 --target cpu:2".split(),
        *"--mesh data=2 --batch 2 --seq 16".split(), "--out", tmp_path / "out",
    )  # fmt: skip
    assert "| peak |" in out and "all-reduce" in out
    found = json.loads((tmp_path / "out" / "forecast.json").read_text())
    assert [one["precision"] for one in found] == ["bf16", "int8"]
    assert found[1]["flops"]["int8"] > 0 and found[0]["mesh"]["data"] == 2
    assert (tmp_path / "out" / "report.md").read_text() in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--target v5e:16", "error: target 'v5e:16': a topology of v5e has 2 axes"),
        ("--target cpu:2 --mesh fsdp=3", "error: mesh: data=1 x fsdp=3"),
        ("--target cpu:2 --precision bf61", "bf16"),
        ("--target cpu:2 --remat ful", "full"),
        ("--target cpu:2 --batch 0", "error: batch"),
    ],
)
def test_a_mistake_of_preflight_is_one_line(flags, said, tmp_path):
    out, err = run(
        "preflight", "--model", "tiny", "--seq", "16", *flags.split(), "--out", tmp_path / "o",
        code=2,
    )  # fmt: skip
    assert said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()
