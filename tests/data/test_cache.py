"""Cache: whole files or none, whatever happens to the process or the disk."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mpjax.data import load_corpus
from mpjax.data.cache import Cache
from mpjax.errors import ConfigError


def put(cache, name, data):
    cache.store(name, lambda file: file.write(data))


def test_what_was_stored_is_found(tmp_path, caplog):
    cache = Cache(tmp_path / "deep" / "folder")
    assert cache.find("a") is None
    put(cache, "a", b"one")
    assert cache.find("a").read_bytes() == b"one"
    put(cache, "a", b"two")
    assert Cache(tmp_path / "deep" / "folder").find("a").read_bytes() == b"two"
    assert sorted(p.name for p in cache.folder.iterdir()) == ["a", "a.sha256"]
    assert not caplog.messages


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "longer", "another's", "no sum", "torn sum", "odd"]
)
def test_a_damaged_file_is_absent_and_logged_once(tmp_path, caplog, damage):
    cache = Cache(tmp_path)
    put(cache, "a", bytes(range(256)) * 10)
    path, sum_path = tmp_path / "a", tmp_path / "a.sha256"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "longer":
        path.write_bytes(data + b"\0")
    elif damage == "another's":  # whole, but made of something else
        put(cache, "b", data)
        path.write_bytes(data)
        sum_path.write_bytes((tmp_path / "b.sha256").read_bytes())
    elif damage == "no sum":
        sum_path.unlink()
    elif damage == "torn sum":
        sum_path.write_bytes(sum_path.read_bytes()[:5])
    else:
        sum_path.write_bytes(b"\xff")
    assert cache.find("a") is None
    assert len(caplog.messages) == 1 and str(path) in caplog.text and "rebuilding" in caplog.text
    assert not path.exists() and (tmp_path / "a.broken").exists() and "a.broken" in caplog.text
    put(cache, "a", data)
    assert cache.find("a").read_bytes() == data


def test_a_killed_writer_leaves_no_whole_looking_file(tmp_path):
    program = (
        "import os, signal, sys; from mpjax.data.cache import Cache\n"
        "def write(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "Cache(sys.argv[1]).store('a', write)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    })  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert any(tmp_path.iterdir())  # it died inside the write
    assert Cache(tmp_path).find("a") is None


@pytest.mark.parametrize("why", ["folder is a file", "disk is full"])
def test_without_a_writable_folder_the_work_goes_on(tmp_path, caplog, why):
    def full(file):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / ("file" if why == "folder is a file" else "cache"))
    write = full if why == "disk is full" else lambda file: file.write(b"x")
    cache.store("a", write)
    cache.store("b", write)
    assert cache.find("a") is None
    assert len(caplog.messages) == 1 and "going on without" in caplog.text
    assert not list((tmp_path / "cache").glob("*"))


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MPJAX_CACHE", "/named")
    assert str(Cache().folder) == "/named"
    monkeypatch.delenv("MPJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(Cache().folder) == "/xdg/mpjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(Cache().folder) == "/home/someone/.cache/mpjax"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(
    ("mode", "words"),
    [(0o777, "by everyone"), (0o1777, "by everyone"), (0o770, "by its group"), (0o702, "by every")],
)
def test_a_folder_that_others_may_write_is_refused(tmp_path, mode, words):
    folder = tmp_path / "cache"
    put(Cache(folder), "a", b"x")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(mode)
    (tmp_path / "link").symlink_to(folder)
    for where in (folder, tmp_path / "link"):
        for use in (lambda: Cache(where).find("a"), lambda: put(Cache(where), "b", b"y")):  # noqa: B023
            with pytest.raises(ConfigError, match=f"cache folder .*{words}.*chmod 700 .*MPJAX_CAC"):
                use()
    assert not (folder / "b").exists()
    folder.chmod(0o755)
    assert Cache(folder).find("a").read_bytes() == b"x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="needs root")
@pytest.mark.parametrize("whose", ["folder", "link"])
def test_somebody_elses_folder_is_refused(tmp_path, whose):
    folder = tmp_path / "cache"
    put(Cache(folder), "a", b"x")
    (tmp_path / "link").symlink_to(folder)
    os.chown(tmp_path / "link" if whose == "link" else folder, 12345, -1, follow_symlinks=False)
    with pytest.raises(ConfigError, match="belongs to user 12345, .*remove it, or set MPJAX_CACHE"):
        Cache(tmp_path / "link").find("a")


@pytest.mark.parametrize("damage", ["flipped", "another's", "half"])
def test_ids_and_tokenizers_are_never_read_damaged(tmp_path, caplog, damage):
    text = tmp_path / "a.txt"
    text.write_text("one two three one two three\n" * 50)
    good = load_corpus(str(text), "bpe:260", cache_dir=tmp_path / "cache")
    other = tmp_path / "b.txt"
    other.write_text("four five four five\n" * 80)
    load_corpus(str(other), "bpe:260", cache_dir=tmp_path / "other")
    others = sorted((tmp_path / "other").glob("*[!6]"))
    for path in sorted((tmp_path / "cache").iterdir()):
        if path.suffix == ".sha256":
            continue
        data = path.read_bytes()
        if damage == "another's":  # a whole one of another text, its sum with it
            path.write_bytes(others[0].read_bytes())
            sum_of = others.pop(0)
            path.with_name(f"{path.name}.sha256").write_bytes(
                sum_of.with_name(f"{sum_of.name}.sha256").read_bytes()
            )
        else:
            path.write_bytes(data[: len(data) // 2] + b"?" * (damage == "flipped"))
    again = load_corpus(str(text), "bpe:260", cache_dir=tmp_path / "cache")
    assert again.tokenizer.to_text() == good.tokenizer.to_text()
    assert np.array_equal(again.train, good.train)
    said = [line for line in caplog.messages if "rebuilding" in line]
    assert len(said) == 3  # the tokenizer and both sides
