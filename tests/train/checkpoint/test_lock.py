"""One run, one folder: who comes second is told who is first, and nothing is touched."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mpjax.errors import ConfigError
from mpjax.train.checkpoint import lock, store
from mpjax.train.checkpoint.checkpointer import Checkpointer
from mpjax.train.checkpoint.lock import LOCK, hold_folder
from mpjax.train.checkpoint.reader import CheckpointReader

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time
from mpjax.train.checkpoint.lock import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
STATE = {"w": jnp.arange(3.0)}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_second_is_told_who_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/train_lm.py", "--out", "my runs"])
    with hold_folder(tmp_path):
        (tmp_path / "file").write_text("first's")
        before = everything(tmp_path)
        for _ in range(2):  # being refused takes nothing away from who holds it
            with pytest.raises(ConfigError) as found, hold_folder(tmp_path):
                raise AssertionError("two in one folder")
        assert everything(tmp_path) == before
    text = str(found.value)
    parts = (f"out: {tmp_path} is in use by", f"pid {os.getpid()} on ", "since 2", "+00:00: ",
             "train_lm.py --out 'my runs'", "choose another --out")  # fmt: skip
    assert all(part in text for part in parts) and "\n" not in text, text
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with hold_folder(tmp_path):
        pass


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by pid {process.pid} on "):
            with hold_folder(tmp_path):
                raise AssertionError("two in one folder")
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert (tmp_path / LOCK).exists(), "a killed process removes nothing"
        with hold_folder(tmp_path):
            assert f"pid {os.getpid()} " in (tmp_path / LOCK).read_text()
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    out = tmp_path / "runs" / "a"
    with hold_folder(out):
        assert out.is_dir()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    with hold_folder(out):
        (out / "manifest.json").write_text("{}")
    assert [p.name for p in out.iterdir()] == ["manifest.json"]
    with hold_folder(tmp_path / "runs" / "b"):
        pass
    assert (tmp_path / "runs").is_dir(), "it was there before"


def test_a_lock_file_that_its_owner_removed_in_between_locks_nothing(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def late(fd, how):
        real(fd, how)
        calls.append(fd)
        if len(calls) == 1:  # its owner leaves after our open and before our lock
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with hold_folder(tmp_path):
        with pytest.raises(ConfigError, match="in use"), hold_folder(tmp_path):
            raise AssertionError("the lock was taken on a file that nobody finds")
    assert len(calls) == 2


def test_what_an_owner_wrote_is_shown_short_and_steers_no_terminal(tmp_path):
    with hold_folder(tmp_path):
        (tmp_path / LOCK).write_bytes(b"\x1b[2J\xff" + b"x" * 10_000)
        with pytest.raises(ConfigError) as found, hold_folder(tmp_path):
            pass
        (tmp_path / LOCK).write_bytes(b"")
        with pytest.raises(ConfigError, match="in use by another process"), hold_folder(tmp_path):
            pass
    assert str(found.value).isprintable() and len(str(found.value)) < 700


@pytest.mark.parametrize("why", ["No locks available", "Function not implemented"])
def test_without_locks_a_run_is_told_once_and_goes_on(tmp_path, monkeypatch, caplog, why):
    def none(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    lock._no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", none)
    if why == "Function not implemented":  # a system without the module
        monkeypatch.setattr(lock, "fcntl", None)
    with caplog.at_level(logging.WARNING, "mpjax.train"):
        with hold_folder(tmp_path / "a"), Checkpointer(tmp_path / "a" / "checkpoints"):
            pass
    lock._no_locks.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        f"lock: the file system of the run's folder has no locks ({why}); see to it"
        " that one run alone writes there"
    ]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path, kind):
    if kind == "file":
        (tmp_path / "out").write_text("")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="out: .* cannot be written .*; choose another --out"):
        with hold_folder(tmp_path / "out"):
            pass
    assert not (tmp_path / "victim").exists()


# Checkpoints.


def test_a_second_writer_of_checkpoints_touches_nothing(tmp_path):
    with Checkpointer(tmp_path, asynchronous=False) as first:
        first.save(1, STATE, {})
        unfinished = tmp_path / f"2{store.TEMPORARY}"  # a save that is under way
        unfinished.mkdir()
        with pytest.raises(ConfigError, match="another run writes its checkpoints here"):
            Checkpointer(tmp_path)
        assert unfinished.is_dir() and CheckpointReader(tmp_path).steps() == [1]
        unfinished.rmdir()
    with Checkpointer(tmp_path) as again:
        assert again.steps() == [1]


def test_steps_that_another_run_wrote_since_are_never_dropped(tmp_path):
    """Where there are no locks: another process has resumed from step 2 too, and is faster."""
    with Checkpointer(tmp_path, keep=9, asynchronous=False) as mine:
        for step in (1, 2, 3):
            mine.save(step, STATE, {})
        mine.restore(jax.eval_shape(lambda: STATE), step=2)
        for step in ("5", "6"):
            shutil.copytree(tmp_path / "3", tmp_path / step)
        with pytest.raises(ConfigError, match=r"steps \[5, 6\] were written by another run"):
            mine.save(7, STATE, {})
        assert mine.steps() == [1, 2, 3, 5, 6]
        for step in ("5", "6"):
            shutil.rmtree(tmp_path / step)
        mine.save(7, STATE, {})  # step 3 was this run's own
        assert mine.steps() == [1, 2, 7]


def test_what_can_be_no_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "nowhere", "file/a", "nowhere/a"):
        with pytest.raises(ConfigError, match="cannot be written"), hold_folder(tmp_path / name):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "nowhere"]


def test_never_two_at_once_while_folder_and_lock_come_and_go(tmp_path):
    out, inside, most, taken = tmp_path / "runs" / "a", [], [0], [0]

    def contend() -> None:
        for _ in range(150):
            try:
                with hold_folder(out):
                    inside.append(1)
                    most[0] = max(most[0], len(inside))
                    time.sleep(0.0001)
                    inside.pop()
                    taken[0] += 1
            except ConfigError as error:
                assert "in use" in str(error), error

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(contend) for _ in range(6)]:
            done.result()
    assert most == [1] and taken[0] > 20
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
