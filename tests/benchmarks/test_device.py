"""The prepared run for a borrowed GPU: to the end on a CPU, stopped on its way, and its checks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.on_device import cells, page, record, worker, workers
from benchmarks.on_device.measures import compare, products, right
from mpjax.precision import recipe_names

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence" / "device.md"


def start(*args: Any, **env: str) -> subprocess.Popen[str]:
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.Popen(
        [sys.executable, "benchmarks/device.py", "--size", "tiny", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | own | env, start_new_session=True,
    )  # fmt: skip


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "device.json").read_text()))


def test_it_runs_to_the_end_at_tiny_size(tmp_path: Path) -> None:
    committed = PAGE.read_bytes()
    process = start("--minutes", 15, "--out", tmp_path)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    data = read(tmp_path)
    torch = {c["name"] for c in data["cells"] if c.get("why") == "torch is not installed"}
    states = {c["name"]: c["state"] for c in data["cells"] if c["name"] not in torch}
    assert set(states.values()) == {"done"}, out + err
    assert {c["part"] for c in data["cells"]} == set(cells.PARTS)
    rows = [row for c in data["cells"] for row in c.get("result", {}).get("rows", [])]
    assert len(rows) > 150 and all(row["ok"] for row in rows)
    assert sum(row["differ"] or 0 for row in rows) == 0
    text = (tmp_path / "device.md").read_text()
    assert "cpu" in text.splitlines()[0] and "Not measured on an accelerator" in text
    assert text.count("not measured |") == len(page.bars(None))
    assert PAGE.read_bytes() == committed, "a CPU's results are no device's"


@pytest.mark.parametrize("already", [0, 1, 4])
def test_killed_on_its_way_it_leaves_whole_results(already: int, tmp_path: Path) -> None:
    process = start("--minutes", 5, "--out", tmp_path, "--only", "right")
    give_up = time.monotonic() + 120

    def done() -> int:
        if not (tmp_path / "device.md").exists():  # written after device.json
            return -1
        return sum(cell["state"] == "done" for cell in read(tmp_path)["cells"])

    while done() < already and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    data, text = read(tmp_path), (tmp_path / "device.md").read_text()
    assert done() >= already
    assert all(cell["result"]["rows"] for cell in data["cells"] if cell["state"] == "done")
    missing = [c["name"] for c in data["cells"] if c["state"] == "to come"]
    assert missing and all(f"| {name} | to come |" in text for name in missing)


def test_what_does_not_fit_is_skipped_and_named(tmp_path: Path) -> None:
    process = start("--minutes", 0.1, "--out", tmp_path, "--only", "b", "stochastic")
    out, err = process.communicate(timeout=120)
    skipped = [c for c in read(tmp_path)["cells"] if c["state"] == "skipped"]
    assert skipped, out + err
    text = (tmp_path / "device.md").read_text()
    assert all(c["name"] in text and "s were left" in c["why"] for c in skipped)


def test_a_cpu_is_not_measured_at_full_size(tmp_path: Path) -> None:
    process = start("--size", "full", "--minutes", 1, "--out", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "JAX sees no accelerator" in out, out + err
    assert "JAX sees no accelerator" in (tmp_path / "device.md").read_text()


def test_a_cell_that_raises_is_one_line_and_one_that_hangs_is_stopped(tmp_path: Path) -> None:
    request = {"call": "fast:product", "arguments": {"kind": "fp3"}, "size": "tiny"}
    found = worker.answer(request)
    assert found["state"] == "failed" and found["why"].startswith("KeyError: 'fp3' (fast.py:")
    pool = workers.Workers([], tmp_path, "tiny")
    try:
        slow = cells.Cell("fast", "slow", "right:rounding")
        found = pool.run(slow, "tiny", time.monotonic() + 0.2)
        assert found["state"] == "stopped"
        found = pool.run(
            cells.Cell("fast", "no", "machine:nothing"), "tiny", time.monotonic() + 120
        )
        assert found["state"] == "failed" and "AttributeError" in found["why"], (
            "a new one took over"
        )
    finally:
        pool.stop()


# Part a must be able to fail: what the device computes is made wrong, the CPU's is not.


def twice(find: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any) -> Any:
        scales, whole = find(*args)
        return scales * 2, whole

    return wrong


def doubled(spread: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: 2 * spread(*args)


def not_rounded(values: Callable[..., Any]) -> Callable[..., Any]:
    del values
    return lambda x, scales, format, tile, *rest: x.astype(jnp.float32) / jnp.max(scales)


MUTANTS = {
    "a scale twice as large": ("mpjax.ops.products.quantized_operand._spread", doubled),
    "a dropped cast": ("mpjax.ops.products.quantized_operand.scaled_values", not_rounded),
}


def mutate(monkeypatch: pytest.MonkeyPatch, target: str, wrong: Any, sides: set[str]) -> None:
    """Makes a function of mpjax wrong where programs of these sides are traced and run."""
    module, _, name = target.rpartition(".")
    usual = compare.compiled

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        jax.clear_caches()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[module], name, wrong(getattr(sys.modules[module], name)))
            yield
        jax.clear_caches()

    def compiled(function: Any, side: str) -> Any:
        run = usual(function, side)

        def here(*args: Any) -> Any:
            with patched() if side in sides else contextlib.nullcontext():
                return run(*args)

        return here

    monkeypatch.setattr(compare, "compiled", compiled)


@pytest.fixture
def loose() -> Iterator[None]:
    """As the script runs: without the tests' own strictness."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


SIZE = cells.SIZES["tiny"]


@pytest.mark.usefixtures("loose", "unoptimized")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_device_that_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(row["ok"] for row in products.recipe(SIZE, "fp8")["rows"]), "the control"
    mutate(monkeypatch, *MUTANTS[name], {"device"})
    rows = products.recipe(SIZE, "fp8")["rows"]
    wrong = [row["name"] for row in rows if not row["ok"]]
    assert {"normal, fprop", "normal, dgrad", "normal, wgrad"} <= set(wrong), wrong
    found = {"part": "right", "name": name, "state": "done", "result": {"rows": rows}}
    assert page.is_wrong(found) and "WRONG" in page.line(found)


@pytest.mark.usefixtures("loose", "unoptimized")
def test_a_cast_that_both_sides_drop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTANTS["a dropped cast"], {"device", "cpu"})
    rows = products.recipe(SIZE, "fp8")["rows"]
    assert sum(row["differ"] or 0 for row in rows) == 0, "both are wrong alike"
    assert [row["name"] for row in rows if not row["ok"]] == [
        "normal, fprop, something was rounded"
    ]


@pytest.mark.usefixtures("loose", "unoptimized")
def test_a_scale_that_both_sides_double_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "mpjax.formats.quantize.find_scales", twice, {"device", "cpu"})
    rows = right.quantized(SIZE)["rows"]
    wrong = [row["name"] for row in rows if not row["ok"]]
    assert "e4m3, row: scales against amax / max" in wrong


def test_every_recipe_is_compared() -> None:
    assert set(cells.RECIPES) == set(recipe_names())
    assert len({cell.name for cell in cells.CELLS}) == len(cells.CELLS), "results go by names"


# The page.


def rate(value: float) -> dict[str, float]:
    return {"median": value, "q1": value, "q3": value, "n": 5}


def results(platform: str = "gpu") -> dict[str, Any]:
    """What a run on some device might have found."""

    def train(name: str, tokens: float, peak: float) -> dict[str, Any]:
        found = {
            "tokens_per_s": rate(tokens), "step_s": rate(1.0), "compile_s": 1.0, "batch": 8,
            "tokens": 2048, "parameters": 10**9, "flops_per_token": 6e9, "mfu": 0.5,
            "peak_bytes": peak, "program_bytes": None, "first_loss": 2.0, "last_loss": 1.0,
        }  # fmt: skip
        return {"part": "fast", "name": name, "state": "done", "result": found}

    header = {
        "date": "a day", "command": "c", "commit": "unknown", "host": "h", "python": "3",
        "versions": {"jax": "1"}, "clocks": {}, "platform": platform, "device": "Some GPU",
        "memory": None, "runtime": "r",
    }  # fmt: skip
    rows = [train("train bf16", 100.0, 10e9), train("train fp8", 110.0, 9e9)]
    rows.append({"part": "tools", "name": "autocast", "state": "failed", "why": "it broke"})
    return {"schema": 1, "size": "full", "minutes": 8.0, "header": header, "cells": rows}


def test_bars_are_met_missed_or_not_measured() -> None:
    found = {name.split(":")[0]: state for name, _, state in page.bars(results())}
    assert list(found.values()) == ["not measured", "met", "MISSED", "met"]
    assert {state for _, _, state in page.bars(results("cpu"))} == {"not measured"}


def test_a_page_says_what_is_missing_and_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "DOCS", tmp_path / "docs")
    with pytest.raises(SystemExit, match="no accelerator"):
        page.publish(results("cpu"), None)
    page.publish(results("cpu"), tmp_path / "out")
    assert not (tmp_path / "docs").exists()
    assert "Not measured on an accelerator" in (tmp_path / "out" / "device.md").read_text()
    page.publish(results() | {"size": "tiny"}, tmp_path / "out")
    page.publish(results(), tmp_path / "out", docs=False)
    assert not (tmp_path / "docs").exists(), "no part of the measurements, and nothing tiny"
    page.publish(results(), None)
    text = (tmp_path / "docs" / "device.md").read_text()
    assert text.startswith("# mpjax on Some GPU") and "Not measured" not in text
    assert "| d | autocast | failed | it broke |" in text


def test_the_committed_page_is_of_an_accelerator_or_says_that_there_was_none() -> None:
    text = PAGE.read_text()
    assert "cpu" not in text.splitlines()[0]
    if "Not measured on an accelerator" in text:
        assert text == page.text(None), "python benchmarks/device.py --page"


def test_results_of_two_runs_are_joined(tmp_path: Path) -> None:
    first, second = results(), results()
    second["cells"][2] |= {"state": "done", "result": {"time": {"a / b": rate(1.0)}}}
    second["cells"][0] = {"part": "fast", "name": "train bf16", "state": "skipped", "why": "time"}
    for name, data in (("1", first), ("2", second)):
        (tmp_path / name).write_text(json.dumps(data))
    joined = record.Record.joined([tmp_path / "1", tmp_path / "2"])
    assert joined is not None and {c["state"] for c in joined["cells"]} == {"done"}
