"""What low precision costs fine-tuned models: three experiments at their full size, as a page.

Run:       python -m benchmarks.quality.finetune [--page]
Expected:  classifier: fp32 at least 3 points above the better baseline, bf16 and fp16 within 0.5
           points of fp32, fp8 within 1. Tagger: fp32 at least 5 points above the most frequent
           tag, bf16 within 0.2. Names: stated beside their baselines, bf16 within the noise.

An experiment is a process of its own in runs/evidence/finetune. With `--page` nothing is trained:
the page is written from the runs that lie there, and an experiment that has none is left out.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.page import ROOT, write
from common.finetune_report import above
from mpjax.markdown import table
from mpjax.report import interval

OUT = ROOT / "runs" / "evidence" / "finetune"
# name -> command
RUNS = {
    "classifier": ["experiments/finetune_classifier.py"],
    "strategies": [
        "experiments/finetune_classifier.py", "--precision", "fp32", "late:fp8:bf16:0.2",
        "dynamic:fp16:fp32", "mixed:fp8:attention=bf16", "--seeds", "1",
    ],
    "tagger": ["experiments/finetune_tagger.py"],
    "entities": ["experiments/finetune_tagger.py", "--task", "ner", "--steps", "300"],
    "names": ["experiments/translate.py", "--steps", "1500"],
}  # fmt: skip
Bar = tuple[str, str, bool | None]  # claim, figure, whether it is met


def scores(found: dict[str, Any], arm: str, name: str) -> np.ndarray:
    """One score of an arm in percent, a number a seed."""
    return 100 * np.array([one[name] for one in found["arms"][arm]])


def spread(values: np.ndarray) -> str:
    """Mean and the half-width of the 95 % interval over seeds."""
    return f"{above(values.tolist())} points"


def lead(found: dict[str, Any], name: str, least: float) -> Bar:
    """How far fp32 is above the better baseline."""
    best = 100 * max(one[name] for one in found["baselines"].values())
    lead = scores(found, "fp32", name) - best
    claim = f"fp32, {name}, above the better baseline by {least:g}"
    return claim, spread(lead), bool(lead.mean() >= least)


def within(found: dict[str, Any], arm: str, name: str, most: float | None) -> Bar:
    """How far an arm is from fp32, seed paired with seed; without a bar, whether it is noise."""
    gap = scores(found, arm, name) - scores(found, "fp32", name)
    if most is None:
        mean, half = interval(gap.tolist())
        met = None if math.isnan(half) else abs(mean) <= half
        return f"{arm}, {name}, within the noise of fp32", spread(gap), met
    return f"{arm}, {name}, within {most:g} of fp32", spread(gap), bool(abs(gap.mean()) <= most)


def judged(name: str, found: dict[str, Any]) -> list[Bar]:
    """The bars of an experiment."""
    arms = [arm for arm in found["arms"] if arm != "fp32"]
    if name == "classifier":
        most = {"bf16": 0.5, "fp16": 0.5, "fp8": 1.0}
        bars = [lead(found, "accuracy", 3.0)]
        return bars + [within(found, arm, "accuracy", most[arm]) for arm in arms]
    if name == "tagger":
        bars = [lead(found, "accuracy", 5.0)]
        return bars + [within(found, arm, "accuracy", 0.2) for arm in arms]
    if name == "strategies":
        return [within(found, arm, "accuracy", None) for arm in arms]
    measures = ("entity f1", "accuracy") if name == "entities" else ("cer", "exact")
    stated = [
        (f"{arm}, {m}", f"{scores(found, arm, m).mean():.2f} %", None)
        for arm in found["arms"]
        for m in measures
    ]
    counted = [
        (f"{base}, {m}", f"{100 * one[m]:.2f} %", None)
        for base, one in found["baselines"].items()
        for m in measures
    ]
    return counted + stated + [within(found, arm, m, None) for arm in arms for m in measures]


def part(
    name: str, command: Sequence[str], folder: Path,
    judged: Callable[[str, dict[str, Any]], list[Bar]] = judged,
) -> tuple[str, bool] | None:  # fmt: skip
    """The section of an experiment, and whether its bars are met; None if it has no run."""
    if not (folder / "results.json").exists():
        return None
    bars = judged(name, json.loads((folder / "results.json").read_text()))
    said = {True: "met", False: "**MISSED**", None: ""}
    verdicts = table(["bar", "figure", ""], [(c, f, said[met]) for c, f, met in bars])
    report = (folder / "report.md").read_text().replace("![loss](loss.png)", "")
    lines = [f"#{line}" if line.startswith("#") else line for line in report.splitlines()]
    run = " ".join(["python", *command])
    text = f"## {name}\n\n`{run}`\n\n{verdicts}\n\n" + "\n".join(lines).strip()
    return text, all(met is not False for _, _, met in bars)


def main() -> bool:
    """Trains and writes the page; whether every bar is met."""
    if "--page" not in sys.argv:
        for name, command in RUNS.items():
            script, *options = command
            line = [
                sys.executable,
                str(Path(ROOT) / script),
                *options,
                "--out",
                str(OUT / name),
                "--fresh",
            ]
            subprocess.run(line, cwd=ROOT, check=True)
    tried = [part(name, command, OUT / name) for name, command in RUNS.items()]
    parts = [found for found in tried if found is not None]
    about = (
        "Differences are paired by seed; ± is the 95 % interval over seeds. All arms are judged in"
        " float32. Speeds say nothing: a CPU emulates 16 and 8 bits in float32, and other work may"
        " have run beside."
    )
    body = "\n\n".join([about, *(text for text, _ in parts)])
    write("finetune", "What low precision costs fine-tuned models", body)
    return len(parts) == len(RUNS) and all(met for _, met in parts)


if __name__ == "__main__":
    sys.exit(not main())
