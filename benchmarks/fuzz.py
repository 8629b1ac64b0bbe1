"""Feeds damaged and hostile files to every reader of foreign formats, in children with limits.

Run:       python benchmarks/fuzz.py [--formats torch-zip gguf] [--cases 2000] [--seed 0]
Expected:  every file is read or refused in one printable line of a ConfigError; nothing is run,
           nothing is written beside the case's folder, none takes more than 5 s of CPU or more
           memory than 10 times its bytes and 100 MB. Exit code 1 where one does; `--keep FOLDER`
           keeps those.

A format is a `Format` in `fuzz_formats.FORMATS`: good files, how to damage them, hostile ones, and
the reader. Its mutants depend on seed, format and number alone, so that each can be made again.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SECONDS, SHARE, SPARE = 5.0, 10, 100 * 10**6  # the bars: time, times the file's size, bytes on top
MOST_ADDRESSES = 4 * 2**30  # of a child, beyond what it has once the reader is imported
LONGEST_MESSAGE = 2000
GOOD = ("read", "refused")


class Child:
    """A process that reads case after case; a new one takes over where it dies."""

    def __init__(self, name: str, scratch: Path) -> None:
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "JAX_PLATFORMS": "cpu"}
        env |= {"TMPDIR": str(scratch), "MPJAX_CACHE": str(scratch / "cache")}
        self._errors = (scratch / "stderr").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", name], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, env=env,
        )  # fmt: skip
        self._answer(120)  # it has imported what it needs

    def read(self, folder: Path) -> dict[str, Any]:
        """Returns what became of a case."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder}\n".encode())
        self._process.stdin.flush()
        begun = time.monotonic()
        return self._answer(4 * SECONDS) | {"wall": time.monotonic() - begun}

    def _answer(self, seconds: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], seconds)[0]:
            self.stop()
            return {"outcome": "hang", "seconds": seconds, "grown": 0}
        line = out.readline()
        if not line:
            return {"outcome": f"died {self._process.wait()}", "seconds": 0.0, "grown": 0}
        return dict(json.loads(line))

    @property
    def alive(self) -> bool:
        """Whether it can take another case."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def serve(name: str) -> None:
    """What a child does: reads folders from its input and answers with a line each."""
    import fuzz_limits
    from fuzz_formats import FORMATS

    form = FORMATS[name]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what readers print is no answer
    watch = fuzz_limits.Watch(MOST_ADDRESSES)
    print(json.dumps({"outcome": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(watch.outcome(form.read, Path(line.strip()))), file=answers, flush=True)


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


def fuzz(name: str, count: int, seed: int, keep: Path | None) -> tuple[Counter[str], list[str]]:
    """Returns how many cases ended how, and a line for each that did not end well."""
    from fuzz_formats import FORMATS

    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    child = Child(name, scratch)
    counts: Counter[str] = Counter()
    lines: list[str] = []
    most = {"seconds": 0.0, "grown": 0}
    try:
        for case, files in cases(FORMATS[name], name, count, seed):
            folder = scratch / "case"
            shutil.rmtree(folder, ignore_errors=True)
            for file, data in files.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(data)
            if not child.alive:
                child = Child(name, scratch)
            found = child.read(folder)
            end = judged(case, files, found)
            counts[end] += 1
            counts["hostile"] += case.startswith("hostile")
            most = {key: max(most[key], found[key]) for key in most}
            if end not in GOOD:
                said = {k: v for k, v in found.items() if k != "outcome" and v}
                lines.append(f"{name}: {case}: {end}: {said}"[:1500])
                if keep is not None:
                    shutil.copytree(folder, keep / name / case.replace("/", "_"))
        child.stop()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    counts["milliseconds at most"] = int(1000 * most["seconds"])
    counts["MB at most"] = most["grown"] // 10**6
    return counts, lines


def main() -> int:
    """Prints a table of formats and a line for each case that did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--formats", nargs="+", help="by default all")
    parser.add_argument("--cases", type=int, default=2000, help="mutants of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to keep the files of bad cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        serve(asked.child)
        return 0
    from fuzz_formats import FORMATS

    if unknown := set(asked.formats or ()) - set(FORMATS):
        parser.error(f"unknown formats {sorted(unknown)}; known: {' '.join(FORMATS)}")
    row = "| {:14} | {:>7} | {:>7} | {:>7} | {:>7} | {:>5} | {:>7} | {:>7} |"
    print(row.format("format", "hostile", "cases", "read", "refused", "bad", "slowest", "memory"))
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    bad: list[str] = []
    for name in asked.formats or FORMATS:
        counts, lines = fuzz(name, asked.cases, asked.seed, asked.keep)
        bad += lines
        cells = (counts["hostile"], asked.cases, counts["read"], counts["refused"], len(lines))
        figures = f"{counts['milliseconds at most']} ms", f"{counts['MB at most']} MB"
        print(row.format(name, *cells, *figures), flush=True)
    for line in bad:
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
