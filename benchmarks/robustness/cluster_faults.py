"""What clusters do to a run of several processes: each case, what every process said, and when.

Run:       python -m benchmarks.robustness.cluster_faults [CASE ...]
Expected:  every case ends in a named exit or a clean wait within 60 s; nothing is half-written; the
           run then ends in the bits of one that was never disturbed, on the same mesh.

Cases: a coordinator that is not there, the coordinator's process killed, a process that comes 20 s
late, one that stands still for 10 s and goes on, SIGTERM to one (preemption), a disk that is full,
other code, other settings, and a resume in 1, 2 and 4 processes. `experiments/train_lm.py` runs on
loopback with int8 gradients and float16's dynamic loss scale, so that residuals and skips are among
the bits.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common.page import ROOT, write
from benchmarks.robustness.kill_resume import Bits, Run, different
from benchmarks.robustness.lost_processes import Group
from mpjax.markdown import table
from mpjax.train.checkpoint import leaves
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.report.metrics_writer import read_metrics

STEPS, BAR = 40, 60.0
SETTINGS = (
    "--precision fp16 --loss-scale dynamic:init=4194304,interval=10 --compression int8@64,min=0"
    " --layers 1 --width 64 --heads 2 --batch 8 --seq 32 --save-every 4 --keep 20"
    f" --eval-every 0 --eval-batches 2 --sample 0 --steps {STEPS}"
).split()
PLAIN = [word for word in SETTINGS if word not in ("--compression", "int8@64,min=0")]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a case came to.

    Args:
      what: happened.
      seconds: until the processes that it should end had left; 0 where none should.
      codes: of all processes.
      said: last lines of those that speak of it.
      good: whether it is what was expected.
      resumed: whether the run then ended in the reference's bits; None where there is no such run.
    """

    what: str
    seconds: float
    codes: tuple[int, ...]
    said: list[str]
    good: bool
    resumed: bool | None = None


def last_line(path: Path) -> str:
    """The last line that a process wrote."""
    lines = path.read_text(errors="replace").splitlines()
    return lines[-1] if lines else ""


class Cases:
    """The cases, over one folder.

    Args:
      work: the folder.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.reference = self._whole(Run(work, "reference", SETTINGS), 2)

    def _whole(self, run: Run, count: int, *more: str) -> Bits:
        self._run(run, count, *more)
        return run.final()

    def _run(self, run: Run, count: int, *more: str) -> None:
        group = Group(run, count, *more)
        _, codes = group.wait(set(range(count)), 600)
        if any(codes):
            logs = "\n".join(path.read_text() for path in group.logs)
            raise SystemExit(f"training failed: {codes}\n{logs}")

    def _resumed(self, run: Run) -> bool:
        more = ("--resume", "latest") if (run.out / "manifest.json").exists() else ()
        return not different(self._whole(run, 2, *more), self.reference)

    def _begun(
        self, name: str, settings: list[str] = SETTINGS, pause: float = 1.0
    ) -> tuple[Run, Group]:
        run = Run(self.work, name, settings)
        group = Group(run, 2)
        while not (run.out / "metrics.jsonl").exists():
            if any(process.poll() is not None for process in group.all):
                raise SystemExit("\n".join(path.read_text() for path in group.logs))
            time.sleep(0.01)
        time.sleep(pause)
        return run, group

    def _alone(self, name: str, index: int, address: str, *more: str) -> tuple[int, float, str]:
        """One process that finds no other: its code, seconds and last line."""
        run, log = Run(self.work, name, SETTINGS), self.work / f"{name}.log"
        command = [
            sys.executable, "experiments/train_lm.py", *SETTINGS, "--out", str(run.out), "--mesh",
            "data=2", "--distributed", f"{address},{index},2", *more,
        ]  # fmt: skip
        begun = time.monotonic()
        with log.open("wb") as file:
            code = subprocess.run(
                command, stdout=file, stderr=file, env=run._environment | one_device(), check=False,
                timeout=6 * BAR,
            ).returncode  # fmt: skip
        return code, time.monotonic() - begun, last_line(log)

    def unreachable(self) -> Found:
        """Nobody listens at the coordinator's address."""
        code, seconds, said = self._alone("unreachable", 1, "127.0.0.1:1")
        good = code == 2 and seconds <= BAR and said.startswith("error: distributed")
        return Found("no coordinator at the address", seconds, (code,), [said], good)

    def coordinator(self) -> Found:
        """The process that holds the coordinator is killed."""
        run, group = self._begun("coordinator")
        group.all[0].kill()
        seconds, codes = group.wait({1}, 2 * BAR)
        said = last_line(group.logs[1])
        group.stop()
        good = codes == (2,) and seconds <= BAR and "process 0" in said
        return Found(
            "kill -9 of the coordinator's process", seconds, codes, [said], good, self._resumed(run)
        )

    def late(self) -> Found:
        """A process comes 20 seconds after the first."""
        run = Run(self.work, "late", SETTINGS)
        group = Group(run, 2, late={1: 20.0})
        _, codes = group.wait({0, 1}, 300)
        same = not any(codes) and not different(run.final(), self.reference)
        return Found("a process 20 s late", 0, codes, [], not any(codes), same)

    def still(self) -> Found:
        """A process stands still for 10 seconds and goes on: the others wait."""
        run, group = self._begun("still")
        group.all[1].send_signal(signal.SIGSTOP)
        time.sleep(10)
        group.all[1].send_signal(signal.SIGCONT)
        _, codes = group.wait({0, 1}, 300)
        same = not any(codes) and not different(run.final(), self.reference)
        return Found("SIGSTOP for 10 s, then SIGCONT", 0, codes, [], not any(codes), same)

    def preempted(self) -> Found:
        """One process gets SIGTERM: all save the same step and leave."""
        longer = [*SETTINGS, "--steps", "600", "--save-every", "100"]  # the last ones count
        whole = Run(self.work, "longer", longer)
        self._run(whole, 2)
        run, group = self._begun("preempted", longer, pause=0)
        while not losses_of(run):
            time.sleep(0.01)
        group.all[1].send_signal(signal.SIGTERM)
        seconds, codes = group.wait({0, 1}, 2 * BAR)
        steps, trained = CheckpointReader(run.out / "checkpoints").steps(), losses_of(run)
        logs = [path.read_text(errors="replace").splitlines() for path in group.logs]
        said = [line for log in logs for line in log if "stopped by" in line or "error" in line]
        stopped = bool(steps) and steps[-1] == len(trained) < 600
        good = len(set(codes)) == 1 and seconds <= BAR and stopped
        self._run(run, 2, *["--resume", "latest"] * stopped)
        same = not different(last_state(run), last_state(whole))
        what = f"SIGTERM to one of two, saved step {steps[-1]} of 600"
        return Found(what, seconds, codes, said, good, same)

    def full(self) -> Found:
        """The disk of the run's folder is full at a save."""
        run = Run(self.work, "full", SETTINGS)
        run.out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1300k", "none", run.out], check=True)
        try:
            group = Group(run, 2)
            begun = time.monotonic()
            _, codes = group.wait({0, 1}, 300)
            del begun
            said = [last_line(path) for path in group.logs]
            unfinished = run.unfinished()
            whole = CheckpointReader(run.out / "checkpoints").steps()
            kept = self.work / "full-kept"
            shutil.copytree(run.out, kept)
        finally:
            subprocess.run(["umount", run.out], check=True)
        run.out.rmdir()
        kept.rename(run.out)
        good = set(codes) == {2} and not unfinished and any("no room" in line for line in said)
        seconds = last_gap(run, group.logs)
        return Found(
            f"a disk of 1.3 MB, full after step {whole[-1] if whole else 0}", seconds, codes, said,
            good and seconds <= BAR, self._resumed(run),
        )  # fmt: skip

    def other_code(self) -> Found:
        """One process runs another version of the code."""
        copy = self.work / "copy"
        shutil.copytree(ROOT / "experiments", copy / "experiments")
        shutil.copytree(ROOT / "mpjax", copy / "mpjax")
        with (copy / "mpjax" / "errors.py").open("a") as file:
            file.write("\n# another version\n")
        run = Run(self.work, "code", SETTINGS)
        group = Group(run, 2, roots={1: copy})
        seconds, codes = group.wait({0, 1}, 2 * BAR)
        said = [last_line(path) for path in group.logs]
        good = set(codes) == {2} and all("code is" in line for line in said) and seconds <= BAR
        good &= not (run.out / "manifest.json").exists()
        return Found("two processes of different code", seconds, codes, said, good)

    def other_settings(self) -> Found:
        """One process has another learning rate."""
        run = Run(self.work, "settings", SETTINGS)
        group = Group(run, 2, own={1: ["--lr", "0.123"]})
        seconds, codes = group.wait({0, 1}, 2 * BAR)
        said = [last_line(path) for path in group.logs]
        named = all("settings.lr" in line for line in said)
        good = set(codes) == {2} and named and seconds <= BAR
        good &= not (run.out / "manifest.json").exists()
        return Found("two processes of different settings", seconds, codes, said, good)

    def counts(self) -> Found:
        """1, 2 and 4 processes have one loss, and a run goes on in another number of them."""
        losses = {}
        for count in (1, 2, 4):
            run = Run(self.work, f"count{count}", PLAIN)
            self._whole(run, count)
            losses[count] = losses_of(run)
        far = max(
            abs(a / b - 1)
            for count in (2, 4)
            for a, b in zip(losses[count], losses[1], strict=True)
        )
        run, group = self._begun("again", PLAIN)
        group.all[1].kill()
        group.wait({0}, 2 * BAR)
        group.stop()
        ended = []
        for count in (1, 2, 4):
            copy = Run(self.work, f"again{count}", PLAIN)
            shutil.copytree(run.out, copy.out)
            self._whole(copy, count, "--resume", "latest")
            ended.append(losses_of(copy)[-1])
        off = max(abs(loss / losses[1][-1] - 1) for loss in ended)
        said = [f"losses of 40 steps within {far:.1e} of one process; resumed, within {off:.1e}"]
        return Found("1, 2 and 4 processes", 0, (0, 0, 0), said, far < 1e-3 and off < 1e-3)


def losses_of(run: Run) -> list[float]:
    """The losses of the steps that a run has logged."""
    records = read_metrics(run.out / "metrics.jsonl")
    return [r["loss"] for r in records if "loss" in r]


def last_state(run: Run) -> Bits:
    """Raw bytes of every leaf of the newest checkpoint."""
    reader = run.reader
    wanted = {name: leaves.target(leaf) for name, leaf in reader.read_leaves().items()}
    return {
        name: (leaves.describe(array), np.asarray(array).tobytes())
        for name, array in reader.read(wanted).items()
    }


def last_gap(run: Run, logs: list[Path]) -> float:
    """Seconds between the last record of a run and the last word of its processes."""
    last = max(path.stat().st_mtime for path in logs)
    return max(0.0, last - (run.out / "metrics.jsonl").stat().st_mtime)


def one_device() -> dict[str, str]:
    """The environment of a process with one CPU device."""
    return {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}


CASES: dict[str, Callable[[Cases], Found]] = {
    "unreachable": Cases.unreachable, "coordinator": Cases.coordinator, "late": Cases.late,
    "still": Cases.still, "preempted": Cases.preempted, "full": Cases.full,
    "code": Cases.other_code, "settings": Cases.other_settings, "counts": Cases.counts,
}  # fmt: skip


def main() -> int:
    """Runs the cases and writes the page; whether all went as expected."""
    chosen = [name for name in sys.argv[1:] if name in CASES] or list(CASES)
    with tempfile.TemporaryDirectory(prefix="mpjax-faults-") as folder:
        cases, rows, good = Cases(Path(folder)), [], []
        for name in chosen:
            found = CASES[name](cases)
            print(found, flush=True)
            good.append(found.good and found.resumed is not False)
            resumed = {None: "–", True: "same bits", False: "**DIFFERENT**"}[found.resumed]
            said = " / ".join(dict.fromkeys(found.said)).replace(folder, "RUNS").replace("|", "\\|")
            rows.append((
                found.what, f"{found.seconds:.1f}" if found.seconds else "–",
                " ".join(map(str, found.codes)), said or "–", resumed,
                "as expected" if good[-1] else "**NOT**",
            ))  # fmt: skip
    body = (
        f"`python experiments/train_lm.py {' '.join(SETTINGS)} --mesh data=N --distributed ...` in"
        " processes on loopback (without --compression where one process is compared).\n\n"
        + table(
            ("what happened", "left after, s", "codes", "what they said last", "then resumed", ""),
            rows,
        )
    )
    if len(chosen) == len(CASES):
        write("cluster_faults", "What clusters do to a run", body)
    else:
        print(body)
    return int(not all(good))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
