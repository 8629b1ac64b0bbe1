"""kill -9 at random moments of the fine-tuning scripts; the same command again goes on.

Run:       python -m benchmarks.robustness.kill_finetuning [--count 20]
Expected:  every comparison ends in the results and the losses of one that was never killed. About
           40 seconds a trial on two cores.

`finetune_classifier.py` and `finetune_tagger.py` in turn, on made data, from scratch, two
precisions and seeds; a run that has ended is taken, the one that was killed is trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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

SEED = 0
SETTINGS = (
    "--checkpoint none --layers 1 --width 32 --heads 2 --batch 8 --lengths 16 --steps 30 --warmup 1"
    " --seeds 2 --precision fp32 bf16 --lr 1e-2 --dropout 0.1"
).split()
_TIMES = ("seconds", "tokens_per_s", "tokens_per_second", "memory", "step_ms", "minutes")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One kill."""

    script: str
    moment: float
    ended: int
    code: int
    same: bool


def data(folder: Path) -> dict[str, Path]:
    """Made texts with labels and sentences with tags."""
    draw = random.Random(SEED)
    texts, tags = folder / "texts.tsv", folder / "tags.txt"
    good, bad = ("fine", "lovely", "great"), ("poor", "awful", "dull")
    rows = [(" ".join(draw.choices([*words, "a", "the"], k=6)), label)
            for words, label in ((good, "good"), (bad, "bad")) for _ in range(100)]  # fmt: skip
    draw.shuffle(rows)
    lines = [f"{label}\t{i} {text}\n" for i, (text, label) in enumerate(rows)]
    texts.write_text("label\ttext\n" + "".join(lines))
    sentences = [
        [(w, "O") for w in draw.choices(("go", "to", "see"), k=draw.randint(1, 4))]
        + [(f"city{i % 40}", "B-city"), ("town", "I-city")]
        for i in range(160)
    ]
    tags.write_text("\n".join("".join(f"{w}\t{t}\n" for w, t in s) for s in sentences))
    return {"finetune_classifier": texts, "finetune_tagger": tags}


def start(script: str, source: Path, out: Path, work: Path) -> subprocess.Popen[bytes]:
    """Starts the script over a folder."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPJAX_CACHE": str(work / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(work / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    more = ["--task", "ner"] if script == "finetune_tagger" else []
    command = [sys.executable, f"experiments/{script}.py", *SETTINGS, *more]
    command += ["--data", str(source), "--out", str(out)]
    with (work / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def without_times(value: Any) -> Any:
    """A JSON value without what no two runs share."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in _TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def results(out: Path) -> str:
    """All outcomes and losses of a comparison."""
    found = {}
    for path in sorted([*out.rglob("outcome.json"), *out.rglob("metrics.jsonl")]):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.relative_to(out).as_posix()] = without_times(lines)
    return json.dumps(found, sort_keys=True)


def main() -> int:
    """Runs the trials and writes the page; whether all bars are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="kills")
    count = parser.parse_args().count
    chance, trials = random.Random(SEED), list[Trial]()
    with tempfile.TemporaryDirectory(prefix="mpjax-tune-") as folder:
        work = Path(folder)
        sources, references, expected = data(work), {}, {}
        for script, source in list(sources.items())[: max(1, min(2, count))]:
            for name in ("compiles", "reference"):
                begun = time.monotonic()
                if start(script, source, work / f"{script}-{name}", work).wait():
                    raise SystemExit((work / f"{script}-{name}.log").read_text())
                expected[script] = time.monotonic() - begun
            references[script] = results(work / f"{script}-reference")
            again = results(work / f"{script}-compiles")
            assert again == references[script], f"{script} is not deterministic"
            assert '"loss"' in again and again != results(work / "cache")
        while len(trials) < count:
            script = list(references)[len(trials) % len(references)]
            out, moment = work / f"trial{len(trials)}", chance.uniform(0, expected[script])
            process = start(script, sources[script], out, work)
            time.sleep(moment)
            if process.poll() is not None:  # faster than the measured run: nothing was killed
                continue
            process.kill()
            process.wait()
            ended = len(list(out.rglob("outcome.json")))
            code = start(script, sources[script], out, work).wait()
            same = results(out) == references[script]
            trials.append(Trial(script, moment, ended, code, same))
            print(trials[-1], flush=True)
    good = sum(t.same and t.code == 0 for t in trials)
    between = sum(0 < t.ended for t in trials)
    rows = [
        (t.script, f"{t.moment:.1f}", t.ended, t.code, "same" if t.same else "DIFFER")
        for t in trials
    ]
    body = (
        f"`python experiments/SCRIPT.py {' '.join(SETTINGS)} --data ... --out ...` is killed with"
        f" SIGKILL at {count} moments, drawn by `random.Random({SEED})` uniformly over its whole"
        " time, and the same command is given again. Compared are the outcomes and the records of"
        " all steps of its four runs, without the times.\n\n"
        + table(
            ("what", "bar", "measured", "verdict"),
            [("outcomes and losses the same", "all", f"{good} of {count}",
              "met" if good == count else "MISSED"),
             ("killed when some runs had ended", "some", between,
              "met" if between or count < 5 else "MISSED")],
        )
        + "\n\n"
        + table(("script", "killed after, s", "runs ended by then", "code", "results"), rows)
    )  # fmt: skip
    write("kill_finetuning", "kill -9 of the fine-tuning scripts, then the same command", body)
    return int(good < count)


if __name__ == "__main__":
    sys.exit(main())
