"""Modules that are commands start without a warning, and say how they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mpjax

ROOT = Path(mpjax.__file__).resolve().parent
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)


def test_no_package_imports_a_module_that_is_a_command():
    """`python -m` warns of a module that its own package has imported already."""
    assert {"mpjax.doctor", "mpjax.replay"} <= set(COMMANDS)
    parents = {name.rpartition(".")[0] for name in COMMANDS}
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(parents)}: importlib.import_module(name)\n"
        f"print(*(name for name in {COMMANDS} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
