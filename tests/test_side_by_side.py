"""Our way of each job runs as its page has it, and takes no more steps and lines than the others.

The pages are docs/guides/side_by_side; the blocks under "Data" and "mpjax" run in one folder each,
a command or a Python block a process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tools.side_by_side import (
    COLUMNS,
    DATA,
    FOLDER,
    JOBS,
    OURS,
    Block,
    best_of_others,
    commands,
    count,
    sections,
    tables,
    typed,
    ways,
    with_table,
)
from mpjax.train import read_metrics
from tests.compiling import plain_code

ROOT = Path(__file__).resolve().parent.parent
ADDS, CTRL_C = "CI adds ", "CI presses Ctrl-C at the first checkpoint"
TYPED = "which number is it?\n\n"  # what a command reads that asks for something


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    flags = ["--xla_force_host_platform_device_count=1",
             *(f"--{name}={value}".lower() for name, value in plain_code().items())]  # fmt: skip
    own = {
        "PYTHONPATH": str(ROOT), "COLUMNS": "100", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": " ".join(flags),  # compiling takes most of the time
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    env = {name: x for name, x in os.environ.items() if not name.startswith("JAX_NUMPY")}
    return subprocess.Popen(
        command, cwd=folder, env=env | own, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(block: Block, folder: Path) -> str:
    """Runs a block; returns what its last command printed."""
    if block.kind == "python":
        (folder / "block.py").write_text(block.code)
        todo = [(["python", "block.py"], False)]
    else:
        todo = []
        for notes, text in commands(block.code):
            adds = [note.removeprefix(ADDS) for note in notes if note.startswith(ADDS)]
            assert all(note.startswith(ADDS) or note == CTRL_C for note in notes)
            todo.append(
                (shlex.split(" ".join([text.replace("\\\n", " "), *adds])), CTRL_C in notes)
            )
    for command, cut in todo:
        process = start(command, folder)
        try:
            if cut:
                checkpoints = folder / "runs" / "finetune" / "checkpoints"
                while process.poll() is None and not any(checkpoints.glob("*")):
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(TYPED, timeout=240)
        finally:
            process.kill()
        assert process.returncode == (130 if cut else 0), f"{command}\n{out}\n{err}"
        assert not cut or "stopped by SIGINT" in err
    return out


def check_csv(folder: Path, printed: str) -> None:
    answer = json.loads(printed)
    assert answer["input"] == "what a fine soup" and set(answer["probability"]) == {"bad", "good"}
    names = json.loads((folder / "my-model" / "config.json").read_text())["id2label"]
    assert names == {"0": "bad", "1": "good"} and (folder / "my-model/tokenizer.json").is_file()


def check_chat(folder: Path, printed: str) -> None:
    assert printed.startswith("> ") and printed.count("> ") == 2  # a question, and the empty line
    lines = json.loads((folder / "runs/finetune/run.json").read_text())["lines"]
    assert ["around a prompt", "the model's chat template"] in lines


def check_resume(folder: Path, printed: str) -> None:
    steps = [r["step"] for r in read_metrics(folder / "runs/finetune/metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 49)) and "best weights, of step" in printed


def check_sweep(folder: Path, printed: str) -> None:
    assert len(list((folder / "runs/sweep").glob("*/seed*"))) == 18
    assert "best: bf16" in printed and (folder / "runs/sweep/report.html").is_file()


CHECKS: dict[str, Callable[[Path, str], None]] = {
    "own_csv": check_csv, "own_chat": check_chat, "resume": check_resume, "sweep": check_sweep,
}  # fmt: skip


@pytest.mark.notebook
@pytest.mark.parametrize("job", JOBS)
def test_our_way_runs_as_the_page_has_it(job: str, tmp_path: Path) -> None:
    for extra in ("safetensors", "jinja2", "sklearn"):
        pytest.importorskip(extra)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    found = sections((FOLDER / f"{job}.md").read_text())
    printed = ""
    for block in [*found[DATA], *found[OURS]]:
        printed = run(block, tmp_path)
    CHECKS[job](tmp_path, printed)


@pytest.mark.parametrize("job", JOBS)
def test_our_way_takes_no_more_than_the_best_of_the_others(job: str) -> None:
    found = ways(job)
    best = best_of_others(found)
    assert len(found) > 3 and found[OURS].steps <= best.steps and found[OURS].lines <= best.lines


def test_the_tables_are_what_is_counted() -> None:
    made = tables()
    assert set(made) == {path.stem for path in FOLDER.glob("*.md")}
    for name, one in made.items():
        text = (FOLDER / f"{name}.md").read_text()
        assert with_table(text, one) == text, "python -m benchmarks.tools.side_by_side"


@pytest.mark.parametrize("job", JOBS)
def test_all_are_written_by_the_same_rules(job: str) -> None:
    for blocks in sections((FOLDER / f"{job}.md").read_text()).values():
        for kind, code in blocks:
            assert kind in ("python", "sh", "yaml")
            assert all(len(line) <= COLUMNS for line in typed(code))
            assert not re.search(r";(?! do\b)(?! done\b)|&&", code), "a line a command"
            if kind == "python":  # `ruff format --check` sees to its form
                compile(code, job, "exec")


def test_what_a_step_and_a_line_are() -> None:
    shell = "# why\nfor x in 1 2; do for y in 3; do\n  a $x \\\n    $y\ndone; done\n\nb\n"
    assert [c.text.split("\n")[0] for c in commands(shell)] == [
        "for x in 1 2; do for y in 3; do",
        "b",
    ]
    assert commands(shell)[0].notes == ("why",) and commands(shell)[1].notes == ()
    blocks = [
        Block("sh", shell),
        Block("python", "import a\n\n# why\na.b()  # c\n"),
        Block("yaml", "a: b\n"),
    ]
    assert count(blocks) == (4, 5 + 2 + 1)
