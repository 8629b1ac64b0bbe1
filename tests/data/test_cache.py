"""Cache: whole files or none, whatever happens to the process or the disk."""

import os
import signal
import subprocess
import sys

import pytest

from mpjax.data.cache import Cache


def put(cache, name, data):
    cache.store(name, lambda file: file.write(data))


def test_what_was_stored_is_found(tmp_path, caplog):
    cache = Cache(tmp_path / "deep" / "folder")
    assert cache.find("a") is None
    put(cache, "a", b"one")
    assert cache.find("a").read_bytes() == b"one"
    put(cache, "a", b"two")
    assert Cache(tmp_path / "deep" / "folder").find("a").read_bytes() == b"two"
    assert sorted(p.name for p in cache.folder.iterdir()) == ["a", "a.crc32"]
    assert not caplog.messages


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer", "no sum", "torn sum", "odd sum"])
def test_a_damaged_file_is_absent_and_logged_once(tmp_path, caplog, damage):
    cache = Cache(tmp_path)
    put(cache, "a", bytes(range(256)) * 10)
    path, sum_path = tmp_path / "a", tmp_path / "a.crc32"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "longer":
        path.write_bytes(data + b"\0")
    elif damage == "no sum":
        sum_path.unlink()
    elif damage == "torn sum":
        sum_path.write_bytes(sum_path.read_bytes()[:5])
    else:
        sum_path.write_bytes(b"\xff")
    assert cache.find("a") is None
    assert len(caplog.messages) == 1 and str(path) in caplog.text and "rebuilding" in caplog.text
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
