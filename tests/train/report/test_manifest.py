"""The manifest: enough to run again, whole on disk, honest about what it does not know."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mpjax.precision import get_precision
from mpjax.train.report import manifest as module
from mpjax.train.report.manifest import manifest, write_manifest

ROOT = Path(__file__).resolve().parents[3]
PRECISION = get_precision("fp16", rules=["**/norm*=fp32"], moments="first=bf16")
PATHS = ["decoder/layers/norm_mlp", "decoder/layers/mlp/up"]


def test_it_survives_json_and_gives_the_precision_back():
    content = json.loads(json.dumps(manifest(PRECISION, {"lr": 1e-3}, PATHS, {})))
    assert get_precision(content["precision"]) == PRECISION
    assert get_precision(content["precision_text"]) == PRECISION
    assert content["config"] == {"lr": 1e-3}
    assert content["policies"] == json.loads(json.dumps(PRECISION.layout(PATHS)))
    assert "norm_mlp" in json.dumps(content["policies"])


def test_it_says_what_the_outcome_depends_on(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--some_flag=1")
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_lm.py", "--lr", "0.1"])
    content = manifest(PRECISION, {}, PATHS, {"fp8": {"fprop": "emulated"}})
    assert content["xla_flags"] == "--some_flag=1"
    assert content["products"]["fp8"] == {"fprop": "emulated"}
    assert content["command"] == ["train_lm.py", "--lr", "0.1"]
    assert content["device"] == f"{jax.device_count()} x cpu (cpu)"
    assert content["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "grain", "numpy"} <= set(content["versions"])
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(content["started"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)


def test_a_package_that_is_missing_is_said_to_be():
    assert module._version("no-such-package-of-ours") == "not installed"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of its own with the module's file in it."""
    copy = tmp_path / "manifest.py"
    copy.write_text("x = 1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "manifest.py"], [*identity, "commit", "-q", "-m", "m"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, env=_clean())
    monkeypatch.setattr(module, "__file__", str(copy))
    return tmp_path


def _clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def _head(folder: Path) -> str:
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_code_and_changes_are_told(repository):
    head = _head(repository)
    assert len(head) == 40 and module._commit() == head
    (repository / "manifest.py").write_text("x = 2\n")
    assert module._commit() == head + "+changes"


def test_a_repository_around_an_installed_package_is_not_its_commit(repository, monkeypatch):
    installed = repository / "site-packages" / "manifest.py"
    installed.parent.mkdir()
    installed.write_text("x = 1\n")
    monkeypatch.setattr(module, "__file__", str(installed))
    assert module._commit() == "unknown"


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert module._commit() == "unknown"


def test_it_is_replaced_whole(tmp_path, monkeypatch):
    write_manifest(tmp_path, {"run": 1})
    write_manifest(tmp_path, {"run": 2})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"run": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path, {"run": 3})
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"run": 2}
