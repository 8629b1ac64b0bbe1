"""Processes agree before they train: what differs is named, with the process that it differs in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mpjax.errors import ConfigError
from mpjax.train.processes import agreement
from mpjax.train.processes.agreement import code_hash, exchange, require_agreement

ROOT = Path(__file__).resolve().parents[3]
PAGE = {"settings": {"seed": 0, "shape": {"width": 8}}, "code": "a"}
# An experiment that trains nothing.
SCRIPT = """
import sys
sys.path.insert(0, "experiments")
from common import launch
import dataclasses, pathlib

@dataclasses.dataclass(frozen=True)
class Config:
    '''Nothing.'''
    seed: int = 0
    '''Number.'''
    distributed: str = ""
    '''Processes.'''
    out: pathlib.Path = pathlib.Path("x")
    '''Folder.'''

launch.command(lambda config: print("trained"), Config)
"""


@pytest.fixture
def others(monkeypatch):
    """Lets other processes say what they would: a list of their pages."""
    pages: list[dict] = []

    def answer(text: str) -> list[str]:
        texts = [json.dumps(page, sort_keys=True) for page in pages]
        if len(text) == 64:  # the hash
            texts = [agreement.hashlib.sha256(t.encode()).hexdigest() for t in texts]
        return [text, *texts]

    monkeypatch.setattr(agreement, "exchange", answer)
    return pages


def test_what_differs_is_named_with_its_process(others):
    others += [PAGE, PAGE]
    require_agreement(PAGE)
    others[1] = {"settings": {"seed": 1, "shape": {"width": 8}}, "code": "a", "extra": None}
    with pytest.raises(ConfigError) as found:
        require_agreement(PAGE)
    assert str(found.value) == (
        "distributed: extra is not set in process 0, null in process 2; settings.seed is 0 in"
        " process 0, 1 in process 2; start all processes with the same command, code and"
        " environment"
    )
    others[0] = {"settings": {f"s{n}": n for n in range(20)}}
    with pytest.raises(ConfigError, match=r"; and \d+ more; start all"):
        require_agreement(PAGE)


@pytest.mark.parametrize("text", ["", "a", "ö" * 1000])
def test_a_process_hears_itself(text):
    assert exchange(text) == [text]


def test_processes_with_other_numbers_of_devices_are_one_line(monkeypatch):
    devices = [SimpleNamespace(process_index=n) for n in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ConfigError, match="devices: 2 in process 0, 1 in process 1; give each"):
        exchange("")


def test_the_code_is_known_by_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert code_hash(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    second = code_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, code_hash(tmp_path)}) == 3


def pair(out: Path, *typed: tuple[str, ...], **env: str) -> list[tuple[int, str, str]]:
    """Two processes that join; `env` is the second's alone. Status and streams of both."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=1"
    own = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, "--out", str(out), *typed[index], "--distributed",
             f"127.0.0.1:{port},{index},2"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=own | (env if index else {}),
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        streams = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *found) for p, found in zip(processes, streams, strict=True)]


def test_two_processes_that_were_started_differently_train_nothing(tmp_path):
    flags = "--xla_force_host_platform_device_count=1 --xla_cpu_enable_fast_math=true"
    found = pair(tmp_path / "run", (), ("--seed", "1"), JAX_ENABLE_X64="1", XLA_FLAGS=flags)
    for code, out, err in found:
        assert code == 2 and "trained" not in out and err.startswith("error: distributed: "), err
        for part in (
            'environment.--xla_cpu_enable_fast_math is not set in process 0, "true" in process 1',
            "environment.jax_enable_x64 is false in process 0, true in process 1",
            "settings.seed is 0 in process 0, 1 in process 1",
            "start all processes with the same command",
        ):
            assert part in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()
