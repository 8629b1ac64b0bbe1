"""A process that is lost ends the others: one line says who, and no error of theirs hides it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpjax.train.processes import coordinator, peers
from mpjax.train.processes.peers import Roll

ROOT = Path(__file__).resolve().parents[3]
HOST = socket.gethostname()


def page(beat: int, **more) -> dict:
    return {"host": "h", "beat": beat} | more


def test_a_process_that_beats_is_not_lost():
    roll = Roll(0, 3, 0.0)
    for now in range(100):
        roll.hear({0: page(now), 1: page(now), 2: page(now // 20)}, now)
        assert roll.lost(now) == ""


@pytest.mark.parametrize("begun", [True, False])
def test_a_process_that_is_silent_is_named(begun):
    roll = Roll(0, 3, 0.0)
    for now in range(100):
        roll.hear({2: page(now)} | ({1: page(0)} if begun else {}), now)
        if said := roll.lost(now):
            break
    assert said == f"process 1{' on h' * begun} has not answered for 30 s" and 30 < now < 33


def test_a_service_that_is_silent_is_the_first_processs():
    roll = Roll(2, 3, 0.0)
    roll.hear({0: page(1), 1: page(1)}, 0.0)
    said = [roll.lost(now) for now in range(40)]
    assert said[30] == "" and said[31] == "process 0 on h has not answered for 30 s"


def test_who_has_left_says_why_after_a_moment_for_what_fails_everywhere():
    roll = Roll(0, 2, 0.0)
    for now in range(10):
        roll.hear({1: page(now, left="data: no such file")}, now)
        if said := roll.lost(now):
            break
    assert said == "process 1 on h has left (data: no such file)" and 3 < now < 6


def test_who_has_found_out_is_believed():
    roll = Roll(2, 3, 0.0)
    roll.hear({0: page(1, lost="process 1 on h has not answered for 30 s"), 1: page(1)}, 1.0)
    assert roll.lost(1.0) == "process 1 on h has not answered for 30 s"


def test_who_is_done_may_be_silent():
    roll = Roll(0, 2, 0.0)
    for now in range(100):
        roll.hear({1: page(7, done=True)}, now)
        assert roll.lost(now) == ""


def test_a_process_that_stood_still_itself_blames_nobody():
    roll = Roll(0, 2, 0.0)
    roll.hear({1: page(1)}, 0.0)
    assert roll.lost(0.0) == "" and roll.lost(1000.0) == ""
    assert [bool(roll.lost(1000.0 + now)) for now in (5, 14, 23, 29, 32)] == [0, 0, 0, 0, 1]


def test_all_have_failed():
    roll = Roll(0, 3, 0.0)
    roll.hear({0: page(1, broken=True), 1: page(1, broken=True), 2: page(1)}, 0.0)
    assert not roll.all_broken()
    roll.hear({1: page(2, broken=True), 2: page(2, broken=True)}, 1.0)
    assert roll.all_broken()
    roll.hear({1: page(2, broken=True), 2: page(2, broken=True, left="a bug")}, 1.0)
    assert not roll.all_broken()  # the others' errors may come of its end


def test_the_service_takes_no_port_of_another(tmp_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert coordinator.in_use(port) and coordinator.connections(port) == 0
        with socket.create_connection(("127.0.0.1", port)):
            assert coordinator.connections(port) == 1
        with pytest.raises(RuntimeError, match=f"port {port} is in use; give another"):
            peers._Coordinator(f"[::]:{port}", 2, heartbeat_timeout=10)


ALONE = """
import sys
from mpjax.train.processes import initialize
initialize(sys.argv[1], 3, int(sys.argv[2]), wait=2)
"""


def _alone(address: str, index: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", ALONE, address, str(index)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_coordinator_that_is_not_there_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begun = time.monotonic()
        done = _alone(address, 1)
    assert f"RuntimeError: nothing answers at {address} for 2 s" in done.stderr
    assert time.monotonic() - begun < 30


def test_processes_that_do_not_come_are_counted():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = _alone(address, 0)
    assert done.returncode == 2 and "Check failure" not in done.stderr
    assert f"1 of 3 processes have come to {address} in 2 s" in line(done.stderr)


# An experiment that trains nothing; a shorter silence, so that the test is short.
SCRIPT = """
import sys
sys.path.insert(0, "experiments")
from common import launch
import dataclasses, pathlib, time
from mpjax.train.processes import peers
from mpjax.errors import ConfigError
peers.SILENCE = 5.0

@dataclasses.dataclass(frozen=True)
class Config:
    '''Nothing.'''
    mode: str = "train"
    '''What happens.'''
    distributed: str = ""
    '''Processes.'''
    out: pathlib.Path = pathlib.Path("x")
    '''Folder.'''

def save(out):
    import resource
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from mpjax.train import Checkpointer
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    rows = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    numbers = np.random.default_rng(0).normal(size=(2, 100_000)).astype(np.float32)
    state = {"w": jax.make_array_from_callback(numbers.shape, rows, lambda i: numbers[i])}
    with Checkpointer(out / "checkpoints") as checkpointer:
        checkpointer.save(1, state, {})

def main(config):
    import jax
    from jax.experimental import multihost_utils
    if config.mode == "prepare" and jax.process_index() == 1:
        raise ConfigError("data: no such file; name another")
    if config.mode == "bug" and jax.process_index() == 1:
        raise KeyError("a bug")
    if config.mode == "full":
        save(config.out)
    print("ready", flush=True)
    for _ in range(30 if config.mode == "finish" else 10**9):
        if config.mode == "alone" and jax.process_index() == 1:
            time.sleep(1000)  # in no collective, as in a long preparation
        multihost_utils.process_allgather(jax.numpy.ones(3))
        time.sleep(0.05)
    print("finished", flush=True)

launch.command(main, Config)
"""


class Group:
    """Processes of `SCRIPT`."""

    def __init__(self, out: Path, mode: str, count: int, cache: Path | None = None) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = os.environ | {
            "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"
        }  # fmt: skip
        last = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, "--out", str(out), "--mode", mode, "--distributed",
                 f"127.0.0.1:{port},{i},{count}"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                env=env | (last if i == count - 1 else {}),
            )
            for i in range(count)
        ]  # fmt: skip

    def ready(self, *which: int) -> None:
        for i in which:
            assert "ready\n" in self.all[i].stdout, i  # Gloo says something before

    def end(self, *which: int, seconds: float = 60) -> list[tuple[int, str]]:
        """Status and errors of those that are still there."""
        streams = [self.all[i].communicate(timeout=seconds) for i in which]
        return [(self.all[i].returncode, err) for i, (_, err) in zip(which, streams, strict=True)]


@pytest.fixture
def group(tmp_path):
    made = []

    def make(mode: str, count: int = 2, cache: Path | None = None) -> Group:
        made.append(Group(tmp_path / "run", mode, count, cache))
        return made[-1]

    yield make
    for one in made:
        for process in one.all:
            process.kill()
            process.communicate()


def line(err: str) -> str:
    """The line of the end; Gloo and XLA may have said something before."""
    assert "Traceback" not in err and "Terminating process" not in err, err
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("sent", "who", "mode"),
    [
        (signal.SIGKILL, 0, "train"), (signal.SIGKILL, 1, "train"), (signal.SIGSTOP, 0, "train"),
        (signal.SIGSTOP, 1, "alone"), (signal.SIGKILL, 1, "alone"),
    ],
)  # fmt: skip
def test_the_others_say_who_is_lost_and_leave(group, sent, who, mode):
    run = group(mode, 3)
    run.ready(0, 1, 2)
    time.sleep(1)
    run.all[who].send_signal(sent)
    begun = time.monotonic()
    for code, err in run.end(*{0, 1, 2} - {who}):
        assert code == 2
        assert line(err) == (
            f"error: distributed: process {who} on {HOST} has not answered for 5 s; start all"
            " processes again with --resume latest"
        )
    assert time.monotonic() - begun < 60


def test_the_others_hear_why_a_process_left_while_it_prepared(group):
    run = group("prepare", 3)
    found = run.end(0, 1, 2)
    assert [code for code, _ in found] == [2, 2, 2]
    assert line(found[1][1]) == "error: data: no such file; name another"
    for _, err in (found[0], found[2]):
        assert f"process 1 on {HOST} has left (data: no such file; name another); start" in line(
            err
        )


def test_the_others_hear_that_a_process_refuses_its_cache(group, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    (first, said), (second, own) = group("finish", cache=cache).end(0, 1)
    assert (first, second) == (2, 2) and "can be written by everyone" in line(own)
    assert f"process 1 on {HOST} has left (cache folder" in line(said)


def test_a_bug_of_one_is_its_traceback_and_the_others_line(group):
    run = group("bug")
    (first, said), (second, trace) = run.end(0, 1)
    assert (first, second) == (2, 1)
    assert f"process 1 on {HOST} has left (KeyError: 'a bug')" in line(said)
    assert re.search(r"Traceback(.|\n)*KeyError: 'a bug'\n$", trace)


def test_a_disk_that_is_full_for_one_is_its_line_and_the_others(group, tmp_path):
    (first, said), (second, own) = group("full").end(0, 1)
    assert (first, second) == (2, 2)
    assert "no room for the checkpoint of step 1" in line(own) and "free some space" in line(own)
    assert f"process 1 on {HOST} has left (" in line(said) and "no room" in line(said)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))  # neither whole nor half


def test_processes_that_finish_end_well(group):
    run = group("finish")
    assert [code for code, _ in run.end(0, 1)] == [0, 0]
