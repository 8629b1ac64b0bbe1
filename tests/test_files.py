"""The one writer of files: whole or not at all, no link followed, permissions as any file's."""

from __future__ import annotations

import ast
import os
import re
import stat
from pathlib import Path

import pytest

from mpjax import files
from mpjax.files import is_temporary, write_file, write_text

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_written_is_there_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "öld")
    write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "ours", "")
        (tmp_path / "usual").write_text("")
    finally:
        os.umask(before)
    ours, usual = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "usual"))
    assert ours == usual == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError("mine")])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(file) -> None:
        file.write(b"ne")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_file(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    path.write_text("old")
    real, found = getattr(os, call), []

    def seen(*args):
        fresh = next(p for p in tmp_path.iterdir() if p != path)
        found.append((path.read_text(), fresh.read_text(), is_temporary(fresh)))
        return real(*args)

    monkeypatch.setattr(os, call, seen)
    write_text(path, "new")
    assert found == [("old", "new", True)] and path.read_text() == "new"


def test_a_link_that_lies_in_wait_is_not_followed(tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    victim.write_text("mine")
    # At every name that was ever guessable, at the file itself, and at the name that is drawn.
    for name in ("a.json", "a.json.tmp", "a.tmp", ".a.json.tmp", "a.json.draft"):
        (folder / name).symlink_to(victim)
    write_text(folder / "a.json", "{}")
    assert (folder / "a.json").read_text() == "{}" and not (folder / "a.json").is_symlink()
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    (folder / f".{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(folder / "b.json", "{}")
    (folder / f".{'0' * 16}.tmp").unlink()
    (folder / f".{'0' * 16}.tmp").symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError):
        write_text(folder / "b.json", "{}")
    assert victim.read_text() == "mine" and not (tmp_path / "absent").exists()


def test_each_temporary_name_is_drawn(tmp_path, monkeypatch):
    real, names = os.replace, []
    monkeypatch.setattr(os, "replace", lambda old, new: (names.append(old.name), real(old, new)))
    for _ in range(3):
        write_text(tmp_path / "a.txt", "")
    assert len(set(names)) == 3


# Where files are written past `mpjax.files`, and why they may be.
EXCEPT = {
    "mpjax/files.py",  # itself
    "experiments/common/datasets/assets.py",  # into a private folder, which is renamed when whole
    "experiments/common/datasets/package.py",  # the same
    "mpjax/models/hf/save.py",  # the same
}


def direct_writes(source: str) -> list[str]:
    """Calls that put a file at its name before it is whole."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node)
        name = ast.unparse(node.func).split(".")[-1]
        if name in ("write_text", "write_bytes") and isinstance(node.func, ast.Attribute):
            found.append(call)
        if name == "open" and re.search(r"""['"][wx]b?\+?['"]""", call):
            found.append(call)
        if name in ("savefig", "savez", "save_file", "mkstemp") or call.startswith("os.replace("):
            if "file" not in {a.id for a in node.args if isinstance(a, ast.Name)}:
                found.append(call)
    return found


def test_nothing_is_written_in_another_way():
    paths = [p for part in ("mpjax", "experiments") for p in sorted((ROOT / part).rglob("*.py"))]
    found = {p.relative_to(ROOT).as_posix(): direct_writes(p.read_text()) for p in paths}
    assert {name for name, calls in found.items() if calls} == EXCEPT
    for call in (
        "p.write_text('')",
        "open('a.txt', 'w')",
        "p.open('wb')",
        "figure.savefig('x.png')",
    ):
        assert direct_writes(call) == [call]
    assert not direct_writes(
        "write_text(p, ''); open('a.txt'); p.open('a'); f.savefig(file, dpi=1)"
    )
