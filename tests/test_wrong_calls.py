"""Wrong calls from Python: one line that says what, where and the remedy; nothing goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.wrong_calls import CASES, RIGHT

SCRIPT = Path(__file__).with_name("wrong_calls.py")
# Each test reads what one process did.
pytestmark = pytest.mark.xdist_group("wrong_calls")


@pytest.fixture(scope="module")
def done() -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_call_is_one_line(name: str, done: dict[str, Any]) -> None:
    kind, message = done["wrong"][name]
    assert kind == "ConfigError", f"{kind}: {message}"
    assert "\n" not in message and len(message) < 500, message
    missing = [word for word in CASES[name][1].split() if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", RIGHT)
def test_a_call_that_means_something_is_taken(name: str, done: dict[str, Any]) -> None:
    assert done["right"][name] == "True"
