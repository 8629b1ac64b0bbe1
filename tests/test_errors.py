"""How an error says what to install, by how mpjax was installed; and who lacks what."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mpjax import errors
from mpjax.errors import ConfigError, install_command, need

# Examples of `direct_url.json` in PEP 610 and the PyPA specification of direct URLs.
NOTED = [
    (None, "pip install 'mpjax[hub]'"),
    (
        {"url": "file:///home/user/project", "dir_info": {}},
        "pip install 'mpjax[hub] @ file:///home/user/project'",
    ),
    (
        {
            "url": "https://github.com/owner/name.git",
            "vcs_info": {"vcs": "git", "requested_revision": "1.3.1", "commit_id": "7921be1537ea"},
        },
        "pip install 'mpjax[hub] @ git+https://github.com/owner/name.git@1.3.1'",
    ),
    (
        {
            "url": "https://github.com/owner/name.git",
            "vcs_info": {"vcs": "git", "commit_id": "7921be1537ea"},
        },
        "pip install 'mpjax[hub] @ git+https://github.com/owner/name.git@7921be1537ea'",
    ),
    (
        {"url": "file:///tmp/mpjax-1.0-py3-none-any.whl", "archive_info": {}},
        "pip install 'mpjax[hub] @ file:///tmp/mpjax-1.0-py3-none-any.whl'",
    ),
]


@pytest.mark.parametrize(("noted", "command"), NOTED)
def test_an_installed_package_is_installed_as_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noted: Any, command: str
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if noted is None else json.dumps(noted)

    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages/mpjax/errors.py"))
    monkeypatch.setattr(errors.importlib.metadata, "distribution", lambda _: Distribution())
    assert install_command("hub") == command


def test_a_clone_is_installed_from_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "mpjax/errors.py"))
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert install_command("hub") == f"cd {tmp_path} && pip install -e '.[hub]'"
    (tmp_path / "constraints.txt").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.chdir(tmp_path)
    assert install_command("hub") == ".venv/bin/pip install -c constraints.txt -e '.[hub]'"


def test_a_package_that_lacks_something_itself_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "half_a_package.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"half_a_package cannot be .*no_such_module_at_all"):
        need("half_a_package", "hub", "this")
    with pytest.raises(ConfigError, match=r"package no_such_module_at_all.*\[hub\]'") as caught:
        need("no_such_module_at_all.part", "hub", "this")
    assert caught.value.__suppress_context__


ODD = "\x1b[2J\x07\r\u202e\x9b\ud800\u2028\x00\x7f"


def test_a_message_is_one_short_line_that_a_terminal_only_shows() -> None:
    said = str(ConfigError(f"a.json: the field {ODD}; drop it"))
    assert said.isprintable() and "\\x1b[2J" in said and "\\u202e" in said and "\\ud800" in said
    assert not f"{ODD}".isprintable()
    for text in ("x" * 50_000_000, ODD * 10**5, "\n" * 10**6):
        said = str(ConfigError(f"a.json: the field {text} is unknown; drop it"))
        assert said.startswith("a.json: the field") and said.endswith("is unknown; drop it")
        assert said.isprintable() and len(said) <= 2000
    whole = "a.json: " + "x" * 1900
    assert str(ConfigError(whole)) == whole, "a line of the usual length is left alone"


def test_a_value_in_a_message_is_brief_and_costs_little() -> None:
    class Untold(str):
        def __repr__(self) -> str:
            raise AssertionError("nobody reads so far")

    assert errors.brief(list(range(10**6))).endswith(" ...")
    for value in ("x" * 10**7, b"x" * 10**7, {i: i for i in range(10**5)}, 10**5000, -(10**400)):
        assert len(errors.brief(value)) <= 60
    assert errors.brief(10**70) == str(10**70)[:56] + " ..." and errors.brief(7) == "7"
    assert errors.brief("\x1b[2J") == r"'\x1b[2J'"
    assert errors.brief([1] * 70 + [Untold()]) == errors.brief([1] * 70)


def test_lists_of_names_are_cut() -> None:
    names = [f"n{i}" for i in range(200_000)]
    assert errors.listed(names) == "n0, n1, n2, n3, n4, n5, n6, n7 and 199992 more"
    assert len(errors.listed(["n" * 10**6] * 9)) < 2100
