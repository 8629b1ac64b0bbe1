"""Feeds damaged and hostile files to every reader of foreign formats, in children with limits.

Run:       python -m benchmarks.fuzz [--formats torch-zip gguf] [--cases 2000] [--seed 0]
           python -m benchmarks.fuzz --minutes 4 --workers 2, which is `make fuzz-part`
Expected:  every file is read or refused in one printable line of a ConfigError; nothing is run,
           nothing is written beside the case's folder, none takes more than 5 s of CPU or more
           memory than 10 times its bytes and 100 MB. Exit code 1 where one does; `--keep FOLDER`
           keeps those.

A format is a `Format` in `formats.FORMATS`: good files, how to damage them, hostile ones, and
the reader. Its mutants depend on seed, format and number alone, so that each can be made again.
With `--minutes` no case begins once they are over: hostile files come first, then mutants, each
time of the format that has had the least time so far.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common.page import ROOT

SECONDS, SHARE, SPARE = 5.0, 10, 100 * 10**6  # the bars: time, times the file's size, bytes on top
# When a child is ended: by the time of its cores, which a busy machine does not lengthen, and by a
# clock for one that waits, which runs longer than those of the readers.
MOST_CORE, MOST_CLOCK = 4 * SECONDS, 150.0
MOST_ADDRESSES = 4 * 2**30  # of a child, beyond what it has once the reader is imported
LONGEST_MESSAGE = 2000
GOOD = ("read", "refused")


class Child:
    """A process that reads case after case, of any format; a new one takes over where it dies."""

    def __init__(self, scratch: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        env |= {"TMPDIR": str(scratch), "MPJAX_CACHE": str(scratch / "cache")}
        self._errors = (scratch / "stderr").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz", "--child"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, env=env,
        )  # fmt: skip
        if (found := self._answer())["outcome"] != "ready":  # it has imported what it needs
            said = (scratch / "stderr").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"a child of the fuzzer did not start: {found} {said}")

    def read(self, name: str, folder: Path) -> dict[str, Any]:
        """Returns what became of a case of a format."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {folder}\n".encode())
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        before, end = self._cores(), time.monotonic() + MOST_CLOCK
        while not select.select([out], [], [], 0.25)[0]:
            seconds = self._cores() - before
            if seconds > MOST_CORE or time.monotonic() > end:
                self.stop()
                return {"outcome": "hang", "seconds": seconds, "grown": 0}
        line = out.readline()
        if not line:
            return {"outcome": f"died {self._process.wait()}", "seconds": 0.0, "grown": 0}
        return dict(json.loads(line))

    def _cores(self) -> float:
        """Seconds of cores that it has taken, and what it has started and waited for."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    @property
    def alive(self) -> bool:
        """Whether it can take another case."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def serve() -> None:
    """What a child does: reads formats and folders from its input, answers with a line each."""
    from benchmarks.fuzz import limits
    from benchmarks.fuzz.formats import FORMATS

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what readers print is no answer
    watch = limits.Watch(MOST_ADDRESSES)
    print(json.dumps({"outcome": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        name, _, folder = line.strip().partition(" ")
        found = watch.outcome(FORMATS[name].read, Path(folder))
        print(json.dumps(found), file=answers, flush=True)


def cases(form: Any, name: str, count: int, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the files of a format's cases: hostile ones, then mutants."""
    import numpy as np

    good = form.good()
    yield "good", good
    for title, files in form.hostile(good).items():
        yield f"hostile {title}", good | files
    for number in range(count):
        rng = np.random.default_rng([seed, *name.encode(), number])
        yield f"mutant {number}", good | form.mutant(good, rng)


def judged(case: str, files: dict[str, bytes], found: dict[str, Any]) -> str:
    """Returns what is wrong with what became of a case, or read or refused."""
    size, outcome = sum(map(len, files.values())), str(found["outcome"])
    message = str(found.get("message", ""))
    if found.get("run"):
        return "executed"
    if found.get("written"):
        return "written outside"
    if outcome == "read" and case.startswith("hostile") and not case.startswith("hostile fine"):
        return "taken"
    if outcome not in GOOD:
        return outcome
    if found["seconds"] > SECONDS:
        return "slow"
    if found["grown"] > SHARE * size + SPARE:
        return "memory"
    if case == "good" and outcome != "read":
        return "good file refused"
    if not message.isprintable() or len(message) > LONGEST_MESSAGE:
        return "message"
    return outcome


class Task:
    """The cases of a format, and what became of those that were run.

    Args:
      name: of the format.
      count: mutants.
      seed: of them.
      keep: where to keep the files of bad cases, or None.
    """

    def __init__(self, name: str, count: int, seed: int, keep: Path | None) -> None:
        self.name, self._keep, self._count, self._seed = name, keep, count, seed
        self._cases: Iterator[tuple[str, dict[str, bytes]]] | None = None
        self.counts: Counter[str] = Counter()
        self.lines: list[str] = []
        self.busy, self.ended, self.spent = False, False, 0.0
        self._seconds, self._grown = 0.0, 0

    def step(self, child: Child | None, scratch: Path) -> Child | None:
        """Runs the next case, in a new child where the last one died, and returns the child."""
        if self._cases is None:
            from benchmarks.fuzz.formats import FORMATS

            self._cases = cases(FORMATS[self.name], self.name, self._count, self._seed)
        case, files = next(self._cases, ("", {}))
        if not case:
            self.ended = True
            return child
        folder = scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        if child is None or not child.alive:
            child = Child(scratch)
        begun = time.monotonic()  # to make files and to start a child is no format's share
        found = child.read(self.name, folder)
        self.spent += time.monotonic() - begun
        end = judged(case, files, found)
        self.counts.update((end, case.split()[0]))
        self._seconds = max(self._seconds, found["seconds"])
        self._grown = max(self._grown, found["grown"])
        if end not in GOOD:
            said = {k: v for k, v in found.items() if k != "outcome" and v}
            self.lines.append(f"{self.name}: {case}: {end}: {said}"[:1500])
            if self._keep is not None:
                shutil.copytree(folder, self._keep / self.name / case.replace("/", "_"))
        return child

    def row(self) -> tuple[Any, ...]:
        """The cells of its row of the table."""
        kinds = (self.counts[kind] for kind in ("hostile", "mutant", *GOOD))
        slowest = f"{1000 * self._seconds:.0f} ms"
        return self.name, *kinds, len(self.lines), slowest, f"{self._grown // 10**6} MB"


def work(tasks: list[Task], lock: threading.Lock, end: float) -> None:
    """Runs cases until there are none, or until a moment of the clock."""
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    child: Child | None = None
    try:
        while time.monotonic() < end:
            with lock:
                free = [task for task in tasks if not task.busy and not task.ended]
                if not free:
                    break
                task = free[0]
                if end < math.inf:
                    task = min(free, key=lambda one: (one.counts["mutant"] > 0, one.spent))
                task.busy = True
            child = task.step(child, scratch)
            task.busy = False
            if task.ended:
                print(ROW.format(*task.row()), flush=True)
    finally:
        if child is not None:
            child.stop()
        shutil.rmtree(scratch, ignore_errors=True)


ROW = "| {:14} | {:>7} | {:>7} | {:>7} | {:>7} | {:>5} | {:>8} | {:>7} |"


def main() -> int:
    """Prints a table of formats and a line for each case that did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--formats", nargs="+", help="by default all")
    parser.add_argument("--cases", type=int, default=2000, help="mutants of each format")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then no case begins")
    parser.add_argument("--workers", type=int, default=1, help="children at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to keep the files of bad cases")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        serve()
        return 0
    if not Path("/proc/self/clear_refs").exists():
        print("fuzz: time and memory of a reader can be measured on Linux alone; nothing was run")
        return 0
    end = time.monotonic() + 60 * asked.minutes
    from benchmarks.fuzz.formats import FORMATS

    if unknown := set(asked.formats or ()) - set(FORMATS):
        parser.error(f"unknown formats {sorted(unknown)}; known: {' '.join(FORMATS)}")
    names = asked.formats or FORMATS
    tasks = [Task(name, asked.cases, asked.seed, asked.keep) for name in names]
    print(ROW.format("format", "hostile", "mutants", *GOOD, "bad", "slowest", "memory"))
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    lock = threading.Lock()
    with ThreadPoolExecutor(asked.workers) as pool:
        for done in [pool.submit(work, tasks, lock, end) for _ in range(asked.workers)]:
            done.result()
    for task in tasks:
        if not task.ended:  # the time was over
            print(ROW.format(*task.row()))
    for task in tasks:
        if not task.ended and not task.counts["mutant"]:
            print(f"{task.name}: the time was over before its hostile files were")
    bad = [line for task in tasks for line in task.lines]
    for line in bad:
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
