"""Modules that are commands start without a warning, and say how they are used."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mpjax
from mpjax import export, predict, replay
from mpjax.errors import ConfigError
from mpjax.precision import get_precision

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


MINE = """
import dataclasses
from mpjax.precision import get_precision, register_preset
register_preset(dataclasses.replace(get_precision("bf16"), name="command-test"))
"""


@pytest.mark.parametrize("command", [replay, predict, export])
def test_commands_on_a_run_import_the_users_file_and_return_their_status(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {export: [str(tmp_path), "out"], predict: [str(tmp_path), "--text", "a"]}
    given = words.get(command, [str(tmp_path)])
    assert command.main([*given, "--import", str(tmp_path / "none.py")]) == 2
    assert "none.py is no file; give a Python file" in capsys.readouterr().err
    mine = tmp_path / f"own_{command.__name__.rpartition('.')[2]}.py"
    mine.write_text(MINE.replace("command-test", f"command-test-{mine.stem}"))
    with pytest.raises(ConfigError, match="command-test"):
        get_precision(f"command-test-{mine.stem}")
    assert command.main([*given, f"--import={mine}"]) == 2  # there is no run
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(tmp_path) in said and said.count("\n") == 1
    assert get_precision(f"command-test-{mine.stem}") == dataclasses.replace(
        get_precision("bf16"), name=f"command-test-{mine.stem}"
    )


def test_a_file_that_fails_is_one_line_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_own.py").write_text("\n1 / 0\n")
    assert predict.main([str(tmp_path), "--import", str(tmp_path / "broken_own.py")]) == 2
    assert "broken_own.py, line 2: ZeroDivisionError" in capsys.readouterr().err
