"""metrics.jsonl and manifest.json of a run are damaged at random; then the run is resumed.

Run:       python -m benchmarks.robustness.damaged_logs [--count 200]
Expected:  every run goes on to its end, the records of untouched lines are kept bit for bit, and
           what is set aside is said. About 8 seconds a damage on two cores.

A run of 12 steps is stopped at 6; each trial copies it, damages a file, and trains on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.page import write
from benchmarks.fuzz import mutants
from benchmarks.robustness.kill_resume import Run
from mpjax.markdown import table

SEED, HALF, STEPS = 0, 6, 12
SETTINGS = (
    "--precision bf16 --layers 1 --width 32 --heads 2 --batch 8 --seq 32 --save-every 2 --keep 3"
    " --eval-every 3 --eval-batches 2 --sample 0 --warmup 2 --schedule constant"
).split()
FILES = ("metrics.jsonl", "manifest.json")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One damage, and what came of it."""

    file: str
    how: str
    code: int
    lost: int
    steps: bool
    said: str


def damaged(data: bytes, file: str, rng: Any) -> tuple[str, bytes]:
    """A file's bytes after one of several kinds of damage, and its name."""
    lines = data.splitlines(keepends=True)
    at = int(rng.integers(len(lines) + 1))
    odd = (b"\xff\xfe\0\n", b"[" * 9000 + b"\n", b"7\n", b'{"loss": 1.0}\n', b"\0" * 512 + b"\n")
    match int(rng.integers(6)):
        case 0:
            return "cut off", data[: int(rng.integers(len(data)))]
        case 1:
            return "a strange line", b"".join(
                [*lines[:at], odd[rng.integers(len(odd))], *lines[at:]]
            )
        case 2:
            return "a tail of NUL", data + b"\0" * int(rng.integers(1, 5000))
        case 3 if file == FILES[0]:
            number = int(rng.integers(len(lines)))
            lines[number] = mutants.json_mutant(lines[number].strip(), rng) + b"\n"
            return "a changed value", b"".join(lines)
        case 4:
            return "empty", b""
        case _:
            return "bytes", mutants.bytes_mutant(data, rng)


def records(lines: set[bytes]) -> list[dict[str, Any]]:
    """The records among a log's lines."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a damaged one, where the run did not go on
            found.append(json.loads(line))
    return [one for one in found if isinstance(one, dict) and type(one.get("step")) is int]


def trial(work: Path, number: int, half: Run) -> Trial:
    """Damages a copy, and resumes it."""
    rng = np.random.default_rng([SEED, number])
    file = FILES[number % 4 == 3]  # three of four are logs
    run = Run(work, f"trial{number}", [*SETTINGS, "--steps", str(STEPS)])
    shutil.copytree(half.out, run.out)
    path = run.out / file
    before = path.read_bytes()
    how, after = damaged(before, file, rng)
    path.write_bytes(after)
    code = run.start("--resume", "latest").wait()
    said = run._log.read_text(errors="replace")
    # A line that the damage left as it was is kept, unless its step is trained again.
    untouched = set(before.splitlines()) & set(after.splitlines()) if file == FILES[0] else set()
    now = set((run.out / FILES[0]).read_bytes().splitlines())
    later = {one["step"] for one in records(now) if one["step"] > HALF}
    shutil.rmtree(run.out)
    lines = [line for line in said.splitlines() if "damaged" in line or "error" in line]
    whole = later == set(range(HALF + 1, STEPS + 1))
    return Trial(file, how, code, len(untouched - now), whole, " ".join(lines)[:300])


def main() -> int:
    """Runs the trials and writes the page; whether all bars are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="damages")
    count = parser.parse_args().count
    trials = []
    with tempfile.TemporaryDirectory(prefix="mpjax-logs-") as folder:
        work = Path(folder)
        half = Run(work, "half", [*SETTINGS, "--steps", str(HALF)])
        half.finish()
        for number in range(count):
            trials.append(trial(work, number, half))
            print(trials[-1], flush=True)
    bars = [
        ("the run goes on, code 0", [t.code == 0 for t in trials]),
        ("no untouched line is lost", [not t.lost for t in trials]),
        ("each later step is logged", [t.steps for t in trials]),
    ]
    kinds = sorted({(t.file, t.how) for t in trials})
    rows = [
        (file, how, len(found), sum(t.code == 0 for t in found), sum(t.lost for t in found),
         sum(bool(t.said) for t in found))
        for file, how in kinds
        if (found := [t for t in trials if (t.file, t.how) == (file, how)])
    ]  # fmt: skip
    verdicts = [
        (what, "all", f"{sum(found)} of {count}", "met" if all(found) else "MISSED")
        for what, found in bars
    ]
    body = (
        f"`python experiments/train_lm.py {' '.join(SETTINGS)}` is run for {HALF} steps; {count}"
        f" copies are damaged by numpy's generator of [{SEED}, number] and resumed to {STEPS}.\n\n"
        + table(("what", "bar", "measured", "verdict"), verdicts)
        + "\n\n"
        + table(("file", "damage", "runs", "went on", "untouched lines lost", "say so"), rows)
    )
    write("damaged_logs", "Damaged logs and manifests stop no run", body)
    return int(not all(all(found) for _, found in bars))


if __name__ == "__main__":
    sys.exit(main())
