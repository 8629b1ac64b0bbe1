"""How an experiment starts, whatever it trains: its folder, its processes, its terminal."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from mpjax.errors import ConfigError
from mpjax.train.lock import LOCK, hold_folder

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = (
    "train_lm", "sweep", "compare_precisions", "low_bit_weights", "low_bit_adam",
    "low_bit_products", "rnn_lm", "image_cnn", "finetune_classifier", "finetune_tagger",
    "pretrain_bert", "translate", "formats",
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
        names = ("launch", *TRAINERS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
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
        code, err = begin(never, "--out", str(tmp_path), config=config)
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


def test_a_mistake_leaves_no_folder(begin, tmp_path):
    def main(config: Settings) -> None:
        raise ConfigError("lr: wrong")

    code, err = begin(main, "--out", str(tmp_path / "runs" / "a"))
    assert (code, err) == (2, "error: lr: wrong\n") and not (tmp_path / "runs").exists()
