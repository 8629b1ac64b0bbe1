"""How an experiment starts, whatever it trains: its folder, its processes, its terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import pytest
from rich.console import Console

from mpjax.errors import ConfigError
from mpjax.train.checkpoint.lock import LOCK, hold_folder

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = (
    "train_lm", "sweep", "compare_precisions", "low_bit_weights", "low_bit_adam",
    "low_bit_products", "rnn_lm", "image_cnn", "finetune_classifier", "finetune_tagger",
    "pretrain_bert", "translate", "formats", "adversarial", "augment", "distil", "multitask",
    "recommend", "stages", "anneal", "preflight", "compress_gradients",
)  # fmt: skip


@pytest.fixture(scope="module")
def scripts():
    """The experiments as modules; what their import and `command` change is put back."""
    level = logging.getLogger("mpjax").level
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "path", [str(ROOT / "experiments"), *sys.path]),
        mock.patch.object(sys, "unraisablehook"),
    ):
        names = ("common.launch", "common.finished", "common.processes", *TRAINERS)
        found = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
        yield SimpleNamespace(**found)
    logging.getLogger("mpjax").setLevel(level)


@dataclasses.dataclass(frozen=True)
class Settings:
    """An experiment that trains nothing."""

    out: Path = Path("runs/none")
    """Folder."""
    prompt: str = ""
    """Text."""


@pytest.fixture
def begin(scripts, monkeypatch, capsys):
    """Runs a `main` as an experiment's command line does; returns status and stderr."""

    def run(main, *typed: str, config=Settings):
        monkeypatch.setattr(sys, "argv", ["experiment.py", *typed])
        code = 0
        try:
            scripts.launch.command(main, config)
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().err

    return run


# One run, one folder.


def test_a_run_holds_its_folder_until_it_ends(begin, tmp_path):
    def main(config: Settings) -> None:
        (config.out / "manifest.json").write_text("{}")
        with pytest.raises(ConfigError, match="in use by pid"), hold_folder(config.out):
            raise AssertionError("two in one folder")

    assert begin(main, "--out", str(tmp_path / "run")) == (0, "")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("script", TRAINERS)
def test_no_experiment_starts_in_a_folder_that_is_in_use(begin, scripts, tmp_path, script):
    def never(config: object) -> None:
        raise AssertionError("it has started")

    config = getattr(scripts, script).Config
    with hold_folder(tmp_path):
        typed = ["--plan", "plan.toml"] if script == "stages" else []  # which it cannot do without
        code, err = begin(never, *typed, "--out", str(tmp_path), config=config)
        assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith(f"error: out: {tmp_path} is in use by pid {os.getpid()} on ")


def test_those_are_all_experiments_with_a_folder():
    found = {
        p.stem
        for p in (ROOT / "experiments").glob("*.py")
        if "launch.command(" in (text := p.read_text()) and "\n    out: Path" in text
    }
    assert found | {"train_lm"} == set(TRAINERS)  # its settings are a module of their own


@pytest.mark.parametrize("index", [0, 1])
def test_all_processes_say_who_holds_the_folder(scripts, tmp_path, monkeypatch, index):
    sent: list[str] = []
    for name in ("join", "require_agreement"):
        monkeypatch.setattr(scripts.processes, name, lambda _: None)
    monkeypatch.setattr(scripts.processes, "watched", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(scripts.processes, "of_first", lambda own: sent.append(own) or "first's")
    monkeypatch.setattr(jax, "process_index", lambda: index)
    config = dataclasses.make_dataclass("Several", ["out", "distributed"])(tmp_path, "auto")
    with hold_folder(tmp_path), pytest.raises(ConfigError, match="^first's$"):
        with scripts.processes.one_run(config):
            raise AssertionError("two in one folder")
    assert len(sent) == 1 and ("in use" in sent[0]) == (index == 0), "the first alone locks"


def test_a_mistake_leaves_no_folder(begin, tmp_path):
    def main(config: Settings) -> None:
        raise ConfigError("lr: wrong")

    code, err = begin(main, "--out", str(tmp_path / "runs" / "a"))
    assert (code, err) == (2, "error: lr: wrong\n") and not (tmp_path / "runs").exists()


# Runs of a comparison whose files are damaged.


@pytest.fixture
def ended(scripts, tmp_path):
    """A run of a comparison that came to its end, and a function that asks for it again."""
    folder = tmp_path / "arm" / "seed0"
    page = {"config": {"lr": 1, "fresh": False}}

    def begin(**changes: object):
        asked = page | changes
        return scripts.finished.begin(folder, asked, (), Console(quiet=True))

    assert begin() is None
    steps = [{"step": n, "loss": 1.0} for n in (1, 2, 3)]
    lines = [*steps, {"step": 3, "validation_loss": 0.5, "loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scripts.finished.end(folder, {"validation_loss": 0.5})
    assert begin() == ({"validation_loss": 0.5}, steps)
    return folder, begin


@pytest.mark.parametrize("name", ["outcome.json", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["absent", "empty", "noise", "cut", "line"])
def test_a_run_whose_files_are_damaged_is_trained_again(ended, caplog, name, how):
    (folder, begin), content = ended, (ended[0] / name).read_bytes()
    (folder / name).unlink()
    lines = content.splitlines(keepends=True)
    damaged = {"empty": b"", "noise": b"\xff" * 9, "cut": content[:-3], "line": b"".join(lines[1:])}
    if how != "absent":
        (folder / name).write_bytes(damaged[how])
    assert begin() is None
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]
    if (name, how) != ("outcome.json", "absent"):  # that is how an interrupted run looks
        assert "is damaged; it is trained again" in caplog.text


def test_a_run_whose_manifest_is_damaged_is_set_aside(ended, caplog):
    folder, begin = ended
    (folder / "manifest.json").write_text('{"config": {"lr"')
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert begin() is None
    aside = folder.parent / "damaged-seed0-1"
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == before
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]
    assert "its manifest is damaged; moved to damaged-seed0-1" in caplog.text


def test_a_run_under_another_environment_is_not_taken(ended):
    _, begin = ended
    with pytest.raises(ConfigError, match="environment.jax_enable_x64 was .* is true now"):
        begin(environment={"jax_enable_x64": True})


# The terminal.


@pytest.mark.parametrize("sick", ["ascii", "closed", "broken pipe"])
def test_a_sick_terminal_kills_nothing_that_trains(begin, tmp_path, monkeypatch, sick):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    if sick == "closed":
        stream.close()
    if sick == "broken pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")

    def main(config: Settings) -> None:
        print("validation loss 0.5 ± 0.1 · 3", flush=True)
        Console().print("0.5 ± 0.1 ·")
        (config.out / "done").touch()

    monkeypatch.setattr(sys, "stdout", stream)
    assert begin(main, "--out", str(tmp_path / "run")) == (0, "")
    assert (tmp_path / "run" / "done").exists()
    stream.close()


CLOSED = """
import sys
sys.path.insert(0, "experiments")
from common import launch
import dataclasses, os, pathlib

@dataclasses.dataclass(frozen=True)
class Config:
    '''Nothing.'''
    out: pathlib.Path = pathlib.Path("x")
    '''Folder.'''

def main(config):
    with open(config.out / "metrics.jsonl", "w") as file:
        assert file.fileno() > 2
        print("on the screen")
        print("an error", file=sys.stderr)
        os.write(2, b"what a library prints")
        file.write("mine")

launch.command(main, Config)
"""


def test_what_is_printed_without_a_terminal_goes_into_no_file(tmp_path):
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", CLOSED, "--out",
         str(tmp_path / "run")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--out", "--prompt"])
def test_what_is_no_utf8_is_one_line_before_anything_is_written(begin, tmp_path, flag):
    def never(config: Settings) -> None:
        raise AssertionError("it has started")

    word = os.fsdecode(os.fsencode(tmp_path / "run") + b"-\xff")
    code, err = begin(never, flag, word)
    assert code == 2 and err.count("\n") == 1 and not list(tmp_path.iterdir()), err
    assert err.startswith(f"error: {flag}: b'") and "\\xff' is not UTF-8; " in err
    seen = []
    assert begin(lambda config: seen.append(config.prompt), "--prompt", "ö", "--out",
                 str(tmp_path / "ü")) == (0, "")  # fmt: skip
    assert seen == ["ö"]


def test_a_folder_in_one_that_is_no_utf8_is_one_line(begin, tmp_path, monkeypatch):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    place.mkdir()
    monkeypatch.chdir(place)
    code, err = begin(lambda config: None, "--out", "run")
    assert code == 2 and "is not UTF-8; choose another --out" in err and err.count("\n") == 1
    assert not list(place.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_compiled_programs_of_others_are_not_run(begin, scripts, tmp_path, monkeypatch):
    home = tmp_path / "home" / "mpjax"
    monkeypatch.setenv("MPJAX_CACHE", str(home))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "xla"))
    assert begin(lambda config: None, "--out", str(tmp_path / "a")) == (0, "")
    assert [p.stat().st_mode & 0o777 for p in (home, home / "xla")] == [0o700, 0o700]
    (home / "xla").chmod(0o755)  # as an older version made it
    begin(lambda config: None, "--out", str(tmp_path / "a"))
    assert (home / "xla").stat().st_mode & 0o777 == 0o700
    for one in (home, home / "xla"):
        one.chmod(0o777)
        status, said = begin(lambda config: pytest.fail("ran"), "--out", str(tmp_path / "b"))
        assert status == 2 and said.startswith(
            f"error: cache folder {one}: can be written by every"
        )
        assert said.count("\n") == 1 and f"chmod 700 {one}, or set MPJAX_CACHE" in said
        one.chmod(0o700)
    named = tmp_path / "named"
    named.mkdir(mode=0o755)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(named))
    assert begin(lambda config: None, "--out", str(tmp_path / "c"))[0] == 0
    assert named.stat().st_mode & 0o777 == 0o755  # the user's own choice
    named.chmod(0o770)
    assert begin(lambda config: None, "--out", str(tmp_path / "d"))[0] == 2
