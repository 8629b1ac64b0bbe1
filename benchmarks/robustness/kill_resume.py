"""kill -9 at random moments of a training run, resume, and compare with the run that never died.

Run:       python -m benchmarks.robustness.kill_resume
Expected:  every trial ends in the same bits as the uninterrupted run; the controls do not.

`experiments/train_lm.py` runs as a process of its own on the standard library's source, in fp16
with a dynamic loss scale that skips steps, with dropout and two microbatches, and saves after
every second step. The moments come from a seeded generator alone: uniform between the start of
training and the expected end, measured once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)  # one device, whatever the caller's tests run under

import numpy as np

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table
from mpjax.train.checkpoint import digest, leaves, store
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.report.metrics_writer import read_metrics

TRIALS, STEPS, SEED = 20, 40, 0
SETTINGS = (
    "--precision fp16 --loss-scale dynamic:init=16777216,interval=6 --dropout 0.1 --accumulate 2"
    " --layers 1 --width 256 --heads 4 --batch 8 --seq 64 --save-every 2 --keep 3 --eval-every 0"
    f" --eval-batches 2 --sample 0 --steps {STEPS}"
).split()

Bits = dict[str, tuple[str, bytes]]  # leaf -> its dtype and shape, its bytes


class Run:
    """One training process after the other over one folder.

    Args:
      work: a folder for all runs, their cache and their logs.
      name: of this run.
      settings: of its command line.
    """

    def __init__(self, work: Path, name: str, settings: Sequence[str] = SETTINGS) -> None:
        self.out, self.settings = work / name, settings
        self._log = work / f"{name}.log"
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "MPJAX_CACHE": str(work / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(work / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """Starts a process."""
        command = [sys.executable, "experiments/train_lm.py", *self.settings]
        command += ["--out", str(self.out)]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*command, *more], cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )

    def wait_for(self, process: subprocess.Popen[bytes], path: str) -> float:
        """Waits until a path exists in the folder; returns the time."""
        while not (self.out / path).exists():
            if process.poll() is not None:
                raise SystemExit(f"training ended by itself:\n{self._log.read_text()}")
            time.sleep(0.002)
        return time.monotonic()

    def finish(self, *more: str) -> None:
        """Runs to the end."""
        if self.start(*more).wait():
            raise SystemExit(f"training failed:\n{self._log.read_text()}")

    @property
    def reader(self) -> CheckpointReader:
        """Its checkpoints."""
        return CheckpointReader(self.out / "checkpoints")

    def unfinished(self) -> list[str]:
        """The names of folders that a save has begun and not committed."""
        return sorted(p.name for p in (self.out / "checkpoints").glob(f"*{store.TEMPORARY}*"))

    def final(self) -> Bits:
        """Raw bytes of every leaf of the last checkpoint, and its data position."""
        reader = self.reader
        assert reader.steps()[-1] == STEPS, reader.steps()
        wanted = {name: leaves.target(leaf) for name, leaf in reader.read_leaves(STEPS).items()}
        bits = {
            name: (leaves.describe(array), np.asarray(array).tobytes())
            for name, array in reader.read(wanted, STEPS).items()
        }
        position = json.dumps(reader.read_meta(STEPS)["data"], sort_keys=True)
        return bits | {"data position": ("json", position.encode())}

    def numbers(self) -> list[str]:
        """The records of all steps without the times, which no two runs share."""
        records = read_metrics(self.out / "metrics.jsonl")
        return [json.dumps({k: v for k, v in r.items() if k != "tokens_per_s"}) for r in records]


def different(run: Bits, reference: Bits) -> list[str]:
    """The leaves whose dtype, shape or bytes differ."""
    return sorted(n for n in run.keys() | reference.keys() if run.get(n) != reference.get(n))


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one kill left, and what its resumption came to."""

    moment: float
    committed: int
    unfinished: list[str]
    logged: int
    leaves: list[str]
    same_numbers: bool

    @property
    def same_params(self) -> bool:
        """Whether the final weights are the reference's bits."""
        return not any(name.startswith("params/") for name in self.leaves)


def kill(run: Run, moment: float) -> bool:
    """Starts training and kills it so many seconds after it began; False if it had ended."""
    process = run.start()
    begun = run.wait_for(process, "metrics.jsonl")
    time.sleep(max(0.0, begun + moment - time.monotonic()))
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def tamper(run: Run) -> None:
    """Moves the data position of the newest checkpoint on by one batch."""
    folder = run.out / "checkpoints" / str(run.reader.steps()[-1])
    page = json.loads((folder / store.META_FILE).read_text())
    page["meta"]["data"]["next_index"] += 1
    (folder / store.META_FILE).write_text(json.dumps(page))
    digest.write(folder)


def experiment(work: Path) -> tuple[list[Trial], dict[str, Any]]:
    """Runs everything; returns the trials and the facts around them."""
    reference = Run(work, "reference")
    reference.finish()  # compiles; the later processes find its programs in the cache
    bits, numbers = reference.final(), reference.numbers()
    skipped = json.loads(numbers[-2])["skipped"]

    again = Run(work, "again")
    process = again.start()
    begun = again.wait_for(process, "metrics.jsonl")
    first = again.wait_for(process, "checkpoints/2") - begun
    expected = again.wait_for(process, f"checkpoints/{STEPS}") - begun
    process.wait()
    facts: dict[str, Any] = {
        "bytes": sum(len(raw) for _, raw in bits.values()),
        "skipped": skipped,
        "again": len(different(again.final(), bits)),
        "first": first,
        "expected": expected,
        "too late": 0,
    }
    moments = random.Random(SEED)
    trials: list[Trial] = []
    control: Run | None = None
    while len(trials) < TRIALS:
        moment = moments.uniform(0, expected)
        run = Run(work, f"trial{len(trials)}-{facts['too late']}")
        if not kill(run, moment):
            facts["too late"] += 1  # it was faster than the measured run: nothing was killed
            continue
        committed, unfinished = max(run.reader.steps(), default=0), run.unfinished()
        logged = sum(1 for _ in (run.out / "metrics.jsonl").open())
        if control is None and 0 < committed < STEPS:
            control = Run(work, "control")
            shutil.copytree(run.out, control.out)
        run.finish("--resume", "latest")
        trials.append(
            Trial(
                moment=moment,
                committed=committed,
                unfinished=unfinished,
                logged=logged,
                leaves=different(run.final(), bits),
                same_numbers=run.numbers() == numbers,
            )
        )
        print(trials[-1], flush=True)
        shutil.rmtree(run.out)
    if control is not None:
        tamper(control)
        facts["control from"] = control.reader.steps()[-1]
        control.finish("--resume", "latest")
        facts["control"] = different(control.final(), bits)
    weight = next(name for name in bits if name.startswith("params/"))
    kind, raw = bits[weight]
    facts["flip"] = different(bits | {weight: (kind, bytes([raw[0] ^ 1]) + raw[1:])}, bits)
    facts["weight"], facts["leaves"] = weight, len(bits)
    return trials, facts


def report(trials: list[Trial], facts: dict[str, Any]) -> bool:
    """Writes the page; whether all bars are met."""
    count, final = len(trials), len([t for t in trials if not t.leaves])
    params = sum(t.same_params for t in trials)
    resumed = sum(t.committed > 0 for t in trials)
    inside = sum(bool(t.unfinished) for t in trials)
    control = facts.get("control", [])
    moved = [name for name in control if name.startswith("params/")]
    bars = [
        ("final parameters bit-identical", "20 of 20", f"{params} of {count}", params == count),
        ("whole final state and data position bit-identical", "all", f"{final} of {count}",
         final == count),
        ("JSONL: every step once, the reference's numbers", "all",
         f"{sum(t.same_numbers for t in trials)} of {count}", all(t.same_numbers for t in trials)),
        ("resumed from a step > 0", ">= 15", resumed, resumed >= 15),
        ("died inside a save", ">= 5", inside, inside >= 5),
        ("control: data position moved by one batch before the resume", "differs",
         f"{len(moved)} weights and {len(control) - len(moved)} other entries differ"
         f" (resumed at {facts.get('control from')})", bool(moved)),
        ("control: one bit of one weight flipped", "differs",
         f"{len(facts['flip'])} entry differs", facts["flip"] == [facts["weight"]]),
        ("control: the uninterrupted run twice", "same", f"{facts['again']} entries differ",
         facts["again"] == 0),
    ]  # fmt: skip
    rows = [
        (i + 1, f"{t.moment:.2f}", t.committed, t.logged, " ".join(t.unfinished) or "-",
         "same" if t.same_params else "DIFFER", "same" if not t.leaves else "DIFFER",
         "same" if t.same_numbers else "DIFFER")
        for i, t in enumerate(trials)
    ]  # fmt: skip
    verdicts = [(*bar[:3], "met" if bar[3] else "MISSED") for bar in bars]
    text = (
        f"`python experiments/train_lm.py {' '.join(SETTINGS)} --out ...` is killed with SIGKILL"
        f" at {count} moments, drawn by `random.Random({SEED})` uniformly between the start of"
        " training (its `metrics.jsonl` appears; tracing and loading of the compiled step follow)"
        f" and its expected end, measured once: {facts['expected']:.1f} s, the first checkpoint"
        f" after {facts['first']:.1f} s. Nothing watches for a save. Moments at which the process"
        f" had ended by itself already, so that another was drawn: {facts['too late']}. Each trial"
        " is resumed by the same command with `--resume latest`, which starts at step 0 when there"
        f" is no checkpoint yet. The reference skips {facts['skipped']} of its {STEPS} steps. A"
        f" checkpoint holds {facts['bytes'] / 1e6:.1f} MB; {facts['leaves']} entries (every leaf"
        " of the state and the data position) are compared byte by byte."
    )
    head = (
        "trial", "killed after, s", "last committed step", "records in JSONL",
        "unfinished on disk", "parameters", "whole state", "JSONL numbers",
    )  # fmt: skip
    summary = table(("what", "bar", "measured", "verdict"), verdicts)
    body = f"{text}\n\n{summary}\n\n{table(head, rows)}"
    write("kill_resume", "kill -9 at random moments, then resume", body)
    return all(bar[3] for bar in bars)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="mpjax-kill-") as folder:
        sys.exit(not report(*experiment(Path(folder))))
