"""kill -9 at random moments of a fine-tuning run on own data; --resume goes on.

Run:       python -m benchmarks.robustness.kill_own_run [--count 10]
Expected:  the best weights, their scores and every number of the log are bit for bit those of a run
           that was never killed.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table
from mpjax.train import read_metrics

SEED = 0
SETTINGS = (
    "--text review --label stars --layers 1 --width 32 --heads 2 --vocabulary 300 --longest 16"
    " --batch 8 --steps 200 --evaluate-every 20 --precision fp16 --seed 3"
).split()


def made(folder: Path) -> Path:
    """A table of reviews."""
    draw, path = random.Random(SEED), folder / "own.csv"
    words = (("awful", "stale", "poor"), ("fine", "lovely", "great"))
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["review", "stars"])
        for n in range(300):
            label = n % 2 if draw.random() < 0.9 else draw.randrange(2)  # some are noise
            out.writerow([f"soup {n} was {draw.choice(words[n % 2])}", label])
    return path


def started(data: Path, out: Path) -> subprocess.Popen[bytes]:
    """A process that begins the run, or goes on with it."""
    command = [sys.executable, "experiments/finetune.py", "--data", str(data), "--out", str(out)]
    command += [*SETTINGS, "--resume"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=quiet, stderr=quiet)


def came_to(out: Path) -> dict[str, Any]:
    """The bits of the best weights, their scores, and the log without its times."""
    records = read_metrics(out / "metrics.jsonl")
    for record in records:
        record.pop("tokens_per_s", None)
    weights = {path.name: path.read_bytes() for path in out.glob("best-*.safetensors")}
    return {
        "weights": weights,
        "best": (out / "best.json").read_bytes(),
        "log": list(map(repr, records)),
    }


def main() -> bool:
    """Kills, goes on, compares and writes the page; whether all are equal."""
    parser = argparse.ArgumentParser(description="kill -9 of a fine-tuning run")
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    draw, rows, met = random.Random(SEED), [], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = made(folder)
        begun = time.monotonic()
        assert started(data, folder / "whole").wait() == 0
        seconds = time.monotonic() - begun
        whole = came_to(folder / "whole")
        for trial in range(options.count):
            out, moments = folder / f"cut{trial}", []
            for _ in range(2):  # killed, and killed again when it goes on
                process = started(data, out)
                moments.append(draw.uniform(0.2, 0.95) * seconds)
                try:
                    process.wait(moments[-1])
                except subprocess.TimeoutExpired:
                    process.kill()
                process.wait()
            code = started(data, out).wait()
            same = code == 0 and came_to(out) == whole
            met &= same
            told = " and ".join(f"{moment:.1f} s" for moment in moments)
            rows.append([str(trial), told, str(code), "equal" if same else "**differs**"])
            print(rows[-1], flush=True)
    body = table(["trial", "killed at", "last exit", "weights, scores, log"], rows)
    said = f"A run takes {seconds:.1f} s here, most of it to start and to compile."
    write("kill_own_run", "A fine-tuning run that is killed twice", f"{said}\n\n{body}")
    return met


if __name__ == "__main__":
    sys.exit(not main())
