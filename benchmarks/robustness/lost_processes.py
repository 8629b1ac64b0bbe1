"""One of several processes is killed, stopped, or fails while it prepares; then all are resumed.

Run:       python -m benchmarks.robustness.lost_processes [--kills 20] [--stops 5] [--prepares 5]
Expected:  the others name it in one line and leave with code 2 within 60 s, without a traceback or
           SIGABRT; resumed, the run ends in the same bits as one that was never disturbed. About 90
           seconds a trial on two cores; --kills 1 --stops 1 --prepares 1 is a look.

`experiments/train_lm.py` runs as 2, 3 or 4 processes of one device, batch cut over them, and saves
after every fourth step. Which process and when come from a seeded generator alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks.common.page import ROOT, write
from benchmarks.robustness.kill_resume import Bits, Run, different
from mpjax.markdown import table

STEPS, SEED, BAR = 40, 0, 60.0
SETTINGS = (
    "--precision bf16 --layers 1 --width 64 --heads 2 --batch 12 --seq 32 --save-every 4 --keep 3"
    f" --eval-every 0 --eval-batches 2 --sample 0 --steps {STEPS}"
).split()
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What happened to one process, and what the others did."""

    kind: str
    count: int
    which: int
    moment: float
    seconds: float
    codes: tuple[int, ...]
    named: bool
    clean: bool
    leaves: int


class Group:
    """All processes of a run, with a log each."""

    def __init__(
        self,
        run: Run,
        count: int,
        *more: str,
        prepare: int | None = None,
        late: Mapping[int, float] = MappingProxyType({}),
        roots: Mapping[int, Path] = MappingProxyType({}),
        own: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Starts them.

        Args:
          run: whose settings they have.
          count: how many.
          more: arguments of all.
          prepare: one whose cache is refused.
          late: seconds by which one comes later.
          roots: where the code of one lies, if not here.
          own: arguments of one.
        """
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.logs = [run.out.with_name(f"{run.out.name}.{i}.log") for i in range(count)]
        environment = run._environment | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"
        }  # fmt: skip
        self.all = []
        for i, path in enumerate(self.logs):
            # A folder where the cache should be that nobody may use: this process alone fails.
            cache = {"MPJAX_CACHE": str(open_folder(run.out.parent))} if i == prepare else {}
            root = roots.get(i, ROOT)
            command = [
                sys.executable, "experiments/train_lm.py", *run.settings, "--out", str(run.out),
                "--mesh", f"data={count}", "--distributed", f"127.0.0.1:{port},{i},{count}", *more,
                *own.get(i, ()),
            ]  # fmt: skip
            with path.open("wb") as log:
                time.sleep(late.get(i, 0))
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=root,
                    env=environment | {"PYTHONPATH": str(root)} | cache,
                )  # fmt: skip
            self.all.append(process)

    def wait(self, which: set[int], seconds: float) -> tuple[float, tuple[int, ...]]:
        """Waits for some; returns the seconds that it took, and their codes (-99: still there)."""
        begun = time.monotonic()
        codes = []
        for i in sorted(which):
            try:
                left = max(0.1, begun + seconds - time.monotonic())
                codes.append(self.all[i].wait(left))
            except subprocess.TimeoutExpired:
                codes.append(-99)
        return time.monotonic() - begun, tuple(codes)

    def stop(self) -> None:
        """Ends what is left."""
        for process in self.all:
            process.kill()
            process.wait()


def open_folder(work: Path) -> Path:
    """A cache folder that everyone may write, which is refused."""
    folder = work / "open"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    return folder


def whole(run: Run, count: int, *more: str) -> Bits:
    """Runs to the end; the final state."""
    group = Group(run, count, *more)
    _, codes = group.wait(set(range(count)), 600)
    if any(codes):
        raise SystemExit(
            f"training failed: {codes}\n" + "\n".join(p.read_text() for p in group.logs)
        )
    return run.final()


def trial(work: Path, kind: str, number: int, chance: random.Random, references: dict[int, Bits],
          expected: float) -> Trial:  # fmt: skip
    """Disturbs one run, and resumes it."""
    count, moment = chance.choice((2, 3, 4)), chance.uniform(0, expected)
    which = chance.randrange(count)
    run = Run(work, f"{kind}{number}", SETTINGS)
    group = Group(run, count, prepare=which if kind == "prepare" else None)
    others = set(range(count)) - {which}
    if kind == "prepare":
        group.all[which].wait(300)
    else:
        while not (run.out / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(moment)
        group.all[which].send_signal(SIGNALS[kind])
    seconds, codes = group.wait(others, 2 * BAR)
    said = [group.logs[i].read_text(errors="replace") for i in sorted(others)]
    line = rf"error: distributed: process {which} on \S+ (has not answered for|has left \()"
    named = all(re.search(line, text.splitlines()[-1] if text else "") for text in said)
    clean = not any("Traceback" in text or "Check failure" in text for text in said)
    group.stop()
    more = ("--resume", "latest") if (run.out / "manifest.json").exists() else ()
    bits = whole(run, count, *more)
    return Trial(
        kind, count, which, moment, seconds, codes, named, clean,
        len(different(bits, references[count])),
    )  # fmt: skip


def main() -> int:
    """Runs the trials and writes the page; whether all bars are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for kind, count in (("kills", 20), ("stops", 5), ("prepares", 5)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    asked = parser.parse_args()
    chance, trials = random.Random(SEED), list[Trial]()
    with tempfile.TemporaryDirectory(prefix="mpjax-lost-") as folder:
        work, references, times = Path(folder), {}, []
        for count in (2, 3, 4):
            begun = time.monotonic()
            references[count] = whole(Run(work, f"reference{count}", SETTINGS), count)
            times.append(time.monotonic() - begun)
        controls = len(different(references[2], whole(Run(work, "again", SETTINGS), 2)))
        plan = ["kill"] * asked.kills + ["stop"] * asked.stops + ["prepare"] * asked.prepares
        for number, kind in enumerate(plan):
            trials.append(trial(work, kind, number, chance, references, min(times) / 3))
            print(trials[-1], flush=True)
    bars = [
        ("the others leave, code 2", f"<= {BAR:g} s", f"{max(t.seconds for t in trials):.1f} s",
         all(t.seconds <= BAR and set(t.codes) == {2} for t in trials)),
        ("each names the process in its last line", "all", sum(t.named for t in trials),
         all(t.named for t in trials)),
        ("no traceback, no abort", "all", sum(t.clean for t in trials),
         all(t.clean for t in trials)),
        ("resumed: final state and data position bit-identical", "all",
         sum(not t.leaves for t in trials), not any(t.leaves for t in trials)),
        ("control: two processes twice, undisturbed", "same", f"{controls} entries differ",
         not controls),
    ]  # fmt: skip
    rows = [
        (t.kind, f"{t.which} of {t.count}", f"{t.moment:.1f}" if t.kind != "prepare" else "-",
         f"{t.seconds:.1f}", " ".join(map(str, t.codes)), "yes" if t.named else "NO",
         "same" if not t.leaves else f"{t.leaves} DIFFER")
        for t in trials
    ]  # fmt: skip
    verdicts = [(*bar[:3], "met" if bar[3] else "MISSED") for bar in bars]
    body = (
        f"`python experiments/train_lm.py {' '.join(SETTINGS)} --mesh data=N --distributed ...` in"
        f" N = 2, 3 or 4 processes, {len(trials)} trials. One process is killed (SIGKILL), stopped"
        " (SIGSTOP) or fails while it prepares (its cache folder is refused); who and when are"
        f" drawn by `random.Random({SEED})`. Then all are started again with `--resume latest`.\n\n"
        + table(("what", "bar", "measured", "verdict"), verdicts)
        + "\n\n"
        + table(("what happened", "to process", "after, s of training", "the others left after, s",
                 "their codes", "named", "resumed"), rows)
    )  # fmt: skip
    write("lost_processes", "One of several processes is lost, the others say so, resume", body)
    return int(not all(bar[3] for bar in bars))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
