"""kill -9 at random moments of a plan of stages; the same command again goes on.

Run:       python -m benchmarks.robustness.kill_stages [--count 10]
Expected:  every trial ends in the bits of the plan that was never killed, in every stage; the
           controls do not. About a minute a trial on two cores.

`experiments/stages.py` runs as a process of its own on made data: a language model in bf16, then
on with its moments in fp16 whose loss scale skips steps, then answers to prompts under a schedule
of two precisions, with dropout and microbatches; the weights of the last are then quantised.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)  # one device, whatever the caller's tests run under

import numpy as np

from benchmarks.common.page import ROOT, write
from benchmarks.robustness.kill_resume import Bits, different
from mpjax.markdown import table
from mpjax.train.checkpoint import digest, leaves, store
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.report.metrics_writer import read_metrics

SEED, STEPS = 0, 24
PLAN = """
seed = 3
eval_batches = 2

[model]
family = "decoder"
size = "tiny"
layers = 1
width = 128
heads = 4
dropout = 0.1

[[stage]]
name = "pretrain"
kind = "language"
data = "{work}/text.txt"
tokenizer = "bytes"
precision = "bf16"
steps = {steps}
seq = 32
batch = 8
warmup = 2

[[stage]]
name = "continue"
kind = "language"
data = "{work}/other.txt"
take = "weights+moments"
precision = "fp16 loss_scale=dynamic:init=16777216,interval=6"
steps = {steps}
seq = 32
batch = 8
accumulate = 2

[[stage]]
name = "answer"
kind = "instruct"
data = "{work}/pairs.tsv"
precision = "late:fp8-delayed:bf16:0.5"
steps = {steps}
lengths = [40, 48]
batch = 8

[[stage]]
name = "int8"
kind = "quantise"
"""
STAGES = {"pretrain": STEPS, "continue": STEPS, "answer": STEPS, "int8": 0}


def data(work: Path) -> Path:
    """Made texts and pairs, and the plan over them; returns the plan."""
    draw = random.Random(SEED)
    for name in ("text", "other"):
        words = [f"{name}{i}" for i in range(40)]
        text = "".join(" ".join(draw.choices(words, k=8)) + "\n" for _ in range(400))
        (work / f"{name}.txt").write_text(text)
    numbers = (draw.randrange(10**6) for _ in range(300))
    rows = "".join(f"what is {n}\tthe number {n % 97}\n" for n in dict.fromkeys(numbers))
    (work / "pairs.tsv").write_text(f"source\ttarget\n{rows}")
    plan = work / "plan.toml"
    plan.write_text(PLAN.format(work=work, steps=STEPS))
    return plan


@dataclasses.dataclass(frozen=True)
class Run:
    """One process after the other over one folder."""

    work: Path
    plan: Path
    out: Path

    def start(self) -> subprocess.Popen[bytes]:
        """Starts a process; the same command goes on."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "MPJAX_CACHE": str(self.work / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.work / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        command = [sys.executable, "experiments/stages.py", "--plan", str(self.plan)]
        command += ["--save-every", "2", "--out", str(self.out)]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    @property
    def _log(self) -> Path:
        return self.work / f"{self.out.name}.log"

    def wait_for(self, process: subprocess.Popen[bytes], path: str) -> float:
        """Waits until a path exists in the folder; returns the time."""
        while not (self.out / path).exists():
            if process.poll() is not None:
                raise SystemExit(f"the plan ended by itself:\n{self._log.read_text()}")
            time.sleep(0.002)
        return time.monotonic()

    def finish(self) -> None:
        """Runs to the end."""
        if self.start().wait():
            raise SystemExit(f"the plan failed:\n{self._log.read_text()}")

    def final(self) -> Bits:
        """Raw bytes of every leaf that each stage ended with, and its data position and scores."""
        bits: Bits = {}
        for name, steps in STAGES.items():
            reader = CheckpointReader(self.out / name / "checkpoints")
            wanted = {n: leaves.target(leaf) for n, leaf in reader.read_leaves(steps).items()}
            for leaf, array in reader.read(wanted, steps).items():
                bits[f"{name}/{leaf}"] = leaves.describe(array), np.asarray(array).tobytes()
            meta = json.dumps(reader.read_meta(steps), sort_keys=True)
            done = (self.out / name / "done.json").read_bytes()
            bits[f"{name}/data and scores"] = ("json", meta.encode() + done)
        return bits

    def numbers(self) -> dict[str, list[str]]:
        """The records of each stage without the times, which no two runs share."""
        return {
            name: [
                json.dumps({k: v for k, v in record.items() if k != "tokens_per_s"})
                for record in read_metrics(self.out / name / "metrics.jsonl")
            ]
            for name in STAGES
        }

    def reached(self) -> tuple[str, int]:
        """The stage that is under way, and its last committed step; `all` if none is."""
        for name in STAGES:
            if not (self.out / name / "done.json").exists():
                reader = CheckpointReader(self.out / name / "checkpoints")
                return name, max(reader.steps(), default=0)
        return "all", 0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one kill left, and what the same command came to."""

    moment: float
    stage: str
    committed: int
    inside_save: bool
    leaves: list[str]
    same_numbers: bool


def tamper(out: Path, stage: str) -> None:
    """Moves the data position of a stage's newest checkpoint on by one batch."""
    folder = out / stage / "checkpoints"
    folder = folder / str(CheckpointReader(folder).steps()[-1])
    page = json.loads((folder / store.META_FILE).read_text())
    page["meta"]["data"]["next_index"] += 1
    (folder / store.META_FILE).write_text(json.dumps(page))
    digest.write(folder)


def experiment(work: Path, count: int) -> tuple[list[Trial], dict[str, object]]:
    """Runs everything; returns the trials and the facts around them."""
    plan = data(work)
    reference = Run(work, plan, work / "reference")
    reference.finish()  # compiles; the later processes find its programs in the cache
    bits, numbers = reference.final(), reference.numbers()
    again = Run(work, plan, work / "again")
    process = again.start()
    begun = again.wait_for(process, "pretrain/metrics.jsonl")
    expected = again.wait_for(process, "int8/done.json") - begun
    process.wait()
    skipped = json.loads(numbers["continue"][-2])["skipped"]
    facts: dict[str, object] = {
        "again": len(different(again.final(), bits)) + (again.numbers() != numbers),
        "expected": expected, "skipped": skipped, "leaves": len(bits),
        "bytes": sum(len(raw) for _, raw in bits.values()), "too late": 0,
    }  # fmt: skip
    moments, trials, late = random.Random(SEED), list[Trial](), 0
    control: Run | None = None
    while len(trials) < count:
        # one in each tenth of the time, or no stage is sure to be hit
        moment = expected * (len(trials) + moments.random()) / count
        run = Run(work, plan, work / f"trial{len(trials)}-{late}")
        process = run.start()
        begun = run.wait_for(process, "pretrain/metrics.jsonl")
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        alive = process.poll() is None
        process.kill()
        process.wait()
        if not alive:
            late += 1  # it was faster than the measured run: nothing was killed
            continue
        stage, committed = run.reached()
        inside = bool(list(run.out.glob(f"*/checkpoints/*{store.TEMPORARY}*")))
        if control is None and 0 < committed < STEPS:
            control = Run(work, plan, work / "control")
            shutil.copytree(run.out, control.out)
            tamper(control.out, stage)
            control.finish()
            facts["control"], facts["control at"] = different(control.final(), bits), stage
        run.finish()
        trials.append(
            Trial(moment, stage, committed, inside, different(run.final(), bits),
                  run.numbers() == numbers)
        )  # fmt: skip
        print(trials[-1], flush=True)
        shutil.rmtree(run.out)
    name = "continue/params/decoder/embed/table"
    kind, raw = bits[name]
    facts["flip"] = different(bits | {name: (kind, bytes([raw[0] ^ 1]) + raw[1:])}, bits)
    facts["too late"] = late
    return trials, facts


def report(trials: list[Trial], facts: dict[str, object]) -> bool:
    """Writes the page; whether all bars are met."""
    count, same = len(trials), sum(not t.leaves for t in trials)
    logs = sum(t.same_numbers for t in trials)
    stages = {t.stage for t in trials} - {"all"}
    control = facts.get("control", [])
    assert isinstance(control, list)
    resumed = sum(t.committed > 0 for t in trials)
    bars = [
        ("final state, data position and scores of every stage bit-identical", "all",
         f"{same} of {count}", same == count),
        ("every stage's JSONL: every step once, the reference's numbers", "all",
         f"{logs} of {count}", logs == count),
        ("stages that were killed", ">= 3", f"{len(stages)}: {' '.join(sorted(stages))}",
         len(stages) >= 3),
        ("resumed from a step > 0 of a stage", "some", resumed, resumed > 0),
        ("control: data position moved by one batch before the resume", "differs",
         f"{len(control)} entries differ (stage {facts.get('control at')})", bool(control)),
        ("control: one bit of one weight flipped", "differs", f"{len(facts['flip'])} entry differs",  # type: ignore[arg-type]
         facts["flip"] == ["continue/params/decoder/embed/table"]),
        ("control: the uninterrupted plan twice", "same", f"{facts['again']} entries differ",
         facts["again"] == 0),
    ]  # fmt: skip
    rows = [
        (i + 1, f"{t.moment:.2f}", t.stage, t.committed, "yes" if t.inside_save else "no",
         "same" if not t.leaves else "DIFFER", "same" if t.same_numbers else "DIFFER")
        for i, t in enumerate(trials)
    ]  # fmt: skip
    text = (
        "`python experiments/stages.py --plan PLAN --save-every 2 --out ...` is killed with SIGKILL"
        f" at {count} moments, drawn by `random.Random({SEED})`, one in each of as many equal parts"
        " of the time between the start of the first stage (its `metrics.jsonl` appears; tracing"
        f" and loading of the compiled step follow) and the end of the last, measured once:"
        f" {facts['expected']:.1f} s. The same command is given again. Moments at which it had"
        f" ended already: {facts['too late']}."
        f" Three trainings of {STEPS} steps: bf16; fp16 with the moments of the first and a dynamic"
        f" loss scale, {facts['skipped']} of whose steps are skipped; a schedule from fp8 with"
        " delayed scales to bf16. Then weights in int8. Dropout, microbatches, two lengths."
        f" {facts['leaves']} entries of the four stages are compared byte by byte,"
        f" {facts['bytes'] / 1e6:.1f} MB."  # type: ignore[operator]
    )
    verdicts = [(*bar[:3], "met" if bar[3] else "MISSED") for bar in bars]
    head = (
        "trial", "killed after, s", "in stage", "its last committed step", "inside a save",
        "all states", "all JSONL",
    )  # fmt: skip
    summary = table(("what", "bar", "measured", "verdict"), verdicts)
    plan = PLAN.format(work="DATA", steps=STEPS).strip()
    body = f"{text}\n\n{summary}\n\n{table(head, rows)}\n\n```\n{plan}\n```"
    write("kill_stages", "kill -9 of a plan of stages, then the same command", body)
    return all(bar[3] for bar in bars)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=10, help="kills")
    chosen = parser.parse_args().count
    with tempfile.TemporaryDirectory(prefix="mpjax-stages-") as folder:
        sys.exit(not report(*experiment(Path(folder), chosen)))
