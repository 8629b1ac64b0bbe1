"""Two runs are started in one folder, the second at a random moment of the first.

Run:       python -m benchmarks.robustness.two_runs [--count 30]
Expected:  one trains, the other says so in one line and leaves with code 2; no checkpoint is lost,
           and the state is that of a run that was alone. About 25 seconds a start on two cores.

The second is a fresh start or `--resume latest` in turn; its moment is drawn by a seeded generator,
uniform between the start of the first and its expected end.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common.page import write
from benchmarks.robustness.kill_resume import Bits, Run, different
from mpjax.markdown import table

STEPS, SEED = 40, 0
SETTINGS = (
    "--precision bf16 --layers 1 --width 64 --heads 2 --batch 8 --seq 32 --save-every 2 --keep 100"
    f" --eval-every 0 --eval-batches 2 --sample 0 --steps {STEPS}"
).split()
SAVES = list(range(2, STEPS + 1, 2))
# What the second says: the folder is held; or the first has ended, and left a run.
SAYS = (" is in use by ", " holds a run already ")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of both."""

    moment: float
    resumes: bool
    codes: tuple[int, int]
    said: str
    kept: bool
    leaves: int

    @property
    def fits(self) -> bool:
        """Whether one ran, and the other said so or, at the end of the first, had nothing to do."""
        idle = self.resumes and self.codes == (0, 0) and "nothing left to train" in self.said
        spoke = sorted(self.codes) == [0, 2] and any(words in self.said for words in SAYS)
        return spoke or idle


def trial(work: Path, number: int, moment: float, reference: Bits) -> Trial:
    """Starts both."""
    resumes = number % 2 == 1
    first = Run(work, f"run{number}", SETTINGS)
    second = Run(work, f"run{number}", SETTINGS)
    second._log = work / f"second{number}.log"
    one = first.start()
    time.sleep(moment)
    two = second.start(*(("--resume", "latest") if resumes else ()))
    codes = (one.wait(), two.wait())
    logs = [log.read_text(errors="replace") for log in (first._log, second._log)]
    said = logs[1] if codes[1] or not codes[0] else logs[0]  # at the very start either may be first
    kept = first.reader.steps() == SAVES
    leaves = len(different(first.final(), reference)) if kept else -1
    lines = [line for line in said.splitlines() if line.startswith("error:") or "nothing" in line]
    return Trial(moment, resumes, codes, " ".join(lines), kept, leaves)


def main() -> int:
    """Runs the trials and writes the page; whether all bars are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=30, help="starts of two runs")
    count = parser.parse_args().count
    chance, trials = random.Random(SEED), list[Trial]()
    with tempfile.TemporaryDirectory(prefix="mpjax-two-") as folder:
        work = Path(folder)
        Run(work, "compiles", SETTINGS).finish()
        begun, alone = time.monotonic(), Run(work, "alone", SETTINGS)
        alone.finish()
        expected, reference = time.monotonic() - begun, alone.final()
        for number in range(count):
            trials.append(trial(work, number, chance.uniform(0, expected), reference))
            print(trials[-1], flush=True)
    bars = [
        ("one runs, the other says so", "all", [t.fits for t in trials]),
        ("no checkpoint is lost", "all", [t.kept for t in trials]),
        ("final state and data position bit-identical", "all", [not t.leaves for t in trials]),
    ]
    rows = [
        (i + 1, f"{t.moment:.1f}", "--resume latest" if t.resumes else "fresh",
         " ".join(map(str, t.codes)), "in use" if SAYS[0] in t.said else "has ended",
         "all" if t.kept else "LOST", "same" if not t.leaves else "DIFFER")
        for i, t in enumerate(trials)
    ]  # fmt: skip
    verdicts = [
        (what, bar, f"{sum(found)} of {count}", "met" if all(found) else "MISSED")
        for what, bar, found in bars
    ]
    body = (
        f"`python experiments/train_lm.py {' '.join(SETTINGS)}` is started twice with one `--out`,"
        f" {count} times; the second after a time drawn by `random.Random({SEED})`, uniform up to"
        f" the {expected:.1f} s that the first takes alone.\n\n"
        + table(("what", "bar", "measured", "verdict"), verdicts)
        + "\n\n"
        + table(("start", "second after, s", "it is", "codes", "the folder", "checkpoints",
                 "final state"), rows)
    )  # fmt: skip
    write("two_runs", "Two runs in one folder: one trains, nothing is lost", body)
    return int(not all(all(found) for *_, found in bars))


if __name__ == "__main__":
    sys.exit(main())
