"""The stop flag: both signals, the second Ctrl-C, restored handlers, other threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from mpjax.train.report.interrupt import Interrupt

ROOT = Path(__file__).resolve().parents[3]

LOOP = """
    import sys, time
    from mpjax.train.report.interrupt import Interrupt
    with Interrupt() as interrupt:
        print("ready", flush=True)
        while not interrupt.requested:
            time.sleep(0.01)
        print(interrupt.requested, flush=True)
        {after}
    print("left", flush=True)
"""
HANG = """
        import threading
        threading.Thread(target=time.sleep, args=(60,)).start()  # not waited for
        time.sleep(60)
"""
# A long call into C that releases the lock: Python runs no handler before it returns.
IN_C = """
    import hashlib, threading
    from mpjax.train.report.interrupt import Interrupt
    with Interrupt():
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha512", b"p", b"s", 500_000_000)
"""


def start(code: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_the_process_leaves_by_itself(number):
    process = start(LOOP.format(after="pass"))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"{number.name}\nleft\n", 0)
    assert err == f"\n{number.name}: stopping; Ctrl-C again leaves at once\n"


def test_the_second_ctrl_c_leaves_at_once():
    process = start(LOOP.format(after=HANG.strip()))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert (out, process.returncode) == ("", 130)


def test_the_second_ctrl_c_leaves_a_call_into_c():
    process = start(IN_C)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() + process.stderr.readline() != ""  # it has been seen
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_sigterm_is_never_the_second_ctrl_c():
    process = start(LOOP.format(after="time.sleep(0.5)"))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("left\n", 0)


def test_handlers_come_back(request):
    # A shell that starts a job in the background lets it ignore SIGINT; pytest may be that job.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interrupt() as interrupt:
        inside = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert interrupt.requested is None
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert before == after and not set(map(id, inside)) & set(map(id, before))
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_off_the_main_thread_it_does_nothing():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with Interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, True)]


# A terminal that is closed.


def test_sighup_is_a_request_too_and_never_the_second_ctrl_c():
    process = start(LOOP.format(after="time.sleep(0.3)"))
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "SIGHUP\n"
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("left\n", 0) and "SIGHUP: stopping" in err


def test_nohup_stays_what_it_is(request):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
        assert interrupt.requested is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_terminal_that_is_gone_keeps_nothing_from_stopping():
    code = """
        import os, signal, time
        from mpjax.train.report.interrupt import Interrupt
        with Interrupt() as interrupt:
            print("ready", flush=True)
            os.close(2)  # what the message is written to
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.2)
            print(interrupt.requested, interrupt._watcher.is_alive(), flush=True)
    """
    out, _ = start(code).communicate(timeout=30)
    assert out == "SIGHUP True\n", "the thread still waits for a second Ctrl-C"
