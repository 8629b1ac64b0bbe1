"""Wrong calls from Python: one line that says what, where and the remedy; nothing goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("wrong_calls.py")


def test_a_wrong_call_is_one_line_and_a_right_one_is_taken() -> None:
    """All in one process, which has nothing of the tests' own checks."""
    from tests.wrong_calls import CASES, RIGHT  # its arrays and models take a second to make

    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    done = json.loads(run.stdout)
    assert set(done["wrong"]) == set(CASES) and set(done["right"]) == set(RIGHT)
    odd = {}
    for name, (kind, message, tracebacks) in done["wrong"].items():
        missing = [word for word in CASES[name][1].split() if word not in message]
        if kind != "ConfigError" or "\n" in message or len(message) >= 500 or missing:
            odd[name] = f"{kind}: {message} (lacks {missing})"
        if tracebacks != 1:  # what went before says nothing more
            odd[name] = f"{tracebacks} tracebacks: {message}"
    odd |= {name: result for name, result in done["right"].items() if result != "True"}
    assert not odd
