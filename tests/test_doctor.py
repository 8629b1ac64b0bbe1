"""The report, its JSON, its text, and what happens when the probing process dies."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
import rich.console

from mpjax import doctor, probe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def piped() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpjax.doctor", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_json_says_what_this_process_sees(piped: subprocess.CompletedProcess[str]) -> None:
    assert piped.returncode == 0, piped.stderr
    found = json.loads(piped.stdout)
    assert found["versions"]["jax"] == jax.__version__
    assert found["machine"]["backend"] == jax.default_backend()
    assert len(found["machine"]["devices"]) == jax.device_count()
    assert found["settings"]["JAX_NUMPY_DTYPE_PROMOTION"] == "strict"
    assert set(found["formats"]) == set(doctor.FORMATS)
    for name in ("float32", "bfloat16"):
        for op in ("storage", "elementwise"):
            assert found["formats"][name][op] == probe.probe(name, op)
    matmul = found["formats"]["float32"]["matmul"]
    assert matmul["status"] == probe.probe("float32", "matmul")["status"]
    assert matmul["gflops"] > 0


def test_text_is_plain_when_piped_and_coloured_on_a_terminal(
    piped: subprocess.CompletedProcess[str],
) -> None:
    found = json.loads(piped.stdout)
    plain, coloured = io.StringIO(), io.StringIO()
    doctor.render(found, rich.console.Console(file=plain, width=130))
    doctor.render(found, rich.console.Console(file=coloured, width=130, force_terminal=True))
    assert "\x1b[" not in plain.getvalue()
    assert plain.getvalue().isascii()
    assert "\x1b[" in coloured.getvalue()
    for name, verdicts in found["formats"].items():
        starts = [ln for ln in plain.getvalue().splitlines() if ln.startswith(f"| {name} ")]
        row = next(line for line in starts if line.count("|") == len(probe.OPS) + 2)
        assert [cell.split()[0].rstrip(":") for cell in row.split("|")[2:-1]] == [
            verdicts[op]["status"] for op in probe.OPS
        ]


def test_a_process_that_dies_costs_one_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    abort = tmp_path / "abort.py"
    abort.write_text(
        "import os, sys\n"
        "for line in sys.stdin:\n"
        "    if 'int4' in line:\n"
        "        print('LLVM ERROR: cannot select', file=sys.stderr, flush=True)\n"
        "        os.abort()\n"
        '    print(\'{"status": "native", "detail": ""}\', flush=True)\n'
    )
    monkeypatch.setattr(probe, "__file__", str(abort))
    with doctor._Child() as child:
        assert child("int8", "matmul")["status"] == "native"
        died = child("int4", "matmul")
        assert died["status"] == "unsupported"
        assert died["detail"] == "the process ended with code -6: LLVM ERROR: cannot select"
        assert child("int8", "matmul")["status"] == "native"


def test_a_backend_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    with doctor._Child() as child:
        found = doctor.report(child)
    assert "no_such_platform" in found["machine"]["error"]
    assert found["formats"] == {}
    text = io.StringIO()
    doctor.render(found, rich.console.Console(file=text, width=130))
    assert "cannot start" in text.getvalue()


def test_extras_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(declared)
    of = importlib.metadata.packages_distributions()
    for extra, modules in doctor.EXTRAS.items():
        if extra in ("cuda12", "cuda13", "tpu"):
            continue  # one package stands for the several that jax's own extra brings
        names = {line.split(">=")[0] for line in declared[extra]}
        assert len(modules) == len(names)
        for module in modules:
            if module in of:
                known = {name.lower().replace("_", "-") for name in of[module]}
                assert names & (known | set(of[module])), module


def test_missing_extras_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "wandb", ("no_such_module_at_all",))
    monkeypatch.setitem(doctor.EXTRAS, "dev", ("pytest",))
    missing = doctor.missing_extras()
    assert missing["wandb"].endswith("pip install -c constraints.txt -e '.[wandb]'")
    assert "dev" not in missing
