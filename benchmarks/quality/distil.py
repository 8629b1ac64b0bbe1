"""Distillation: what a small model gains beside a large one, a page a task.

Run:       python -m benchmarks.quality.distil [classify|lm ...] [--page]
Expected:  a classifier with half of MiniLM's layers, which reads the answers of MiniLM, fine-tuned
           on 500 labelled texts, to 3,973 texts, closes at least 60 % of the gap between itself on
           the 500 labels alone and that teacher; int8 and int4 teachers within 0.3 points of the
           float32 one; fp16 and bf16 students within noise; a small decoder beside SmolLM2-135M
           has a lower validation loss than alone, and its loss from stored top-64 answers is within
           0.5 % of the one from live answers.

The comparisons are `experiments/distil.py`, which keeps the runs that ended in
runs/evidence/distil. With `--page` nothing is trained: the pages are written from what lies there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TypeAlias

import numpy as np

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table
from mpjax.report import interval

OUT = ROOT / "runs" / "evidence" / "distil"
SETTINGS = {
    "classify": "--lengths 64 --batch 16 --steps 248 --lr 1e-4 --temperature 2 --hidden 1 --hard 0"
    " --labelled 500 --precision fp32 bf16 fp16 --teacher-weights f32 int8 int4@32",
    "lm": "--task lm --lengths 128 --batch 4 --steps 300 --layers 4 --heads 4 --student-width 256"
    " --lr 2e-3 --precision fp32 --teacher-weights f32",
}
TITLES = {
    "classify": "A classifier alone and distilled",
    "lm": "A model of language alone and distilled",
}
Arms: TypeAlias = dict[str, list[dict[str, float]]]


def _said(good: bool) -> str:
    return "met" if good else "**missed**"


def classify(arms: Arms, teachers: Arms) -> list[list[str]]:
    """The bars of a classifier, in points of accuracy."""
    take = {name: np.array([100 * one["accuracy"] for one in arms[name]]) for name in arms}
    best = 100 * teachers["teacher, f32"]["accuracy"]  # type: ignore[call-overload]
    gap, gained = best - take["alone"].mean(), (take["fp32 of f32"] - take["alone"]).mean()
    share = 100 * gained / gap if gap > 0 else np.nan
    rows = [[
        "of the gap to the teacher", f"{gained:.2f} of {gap:.2f} points, {share:.0f} %",
        ">= 60 %", _said(bool(share >= 60)),
    ]]  # fmt: skip
    for name in ("fp32 of int8", "fp32 of int4@32"):
        mean, half = interval(list(take[name] - take["fp32 of f32"]))
        rows.append([
            f"{name} beside fp32 of f32", f"{mean:+.2f} ± {half:.2f}", "within 0.3",
            _said(abs(mean) <= 0.3),
        ])  # fmt: skip
    for name in ("bf16 of f32", "fp16 of f32"):
        mean, half = interval(list(take[name] - take["fp32 of f32"]))
        rows.append([
            f"{name} beside fp32 of f32", f"{mean:+.2f} ± {half:.2f}", "interval holds 0",
            _said(abs(mean) <= half),
        ])  # fmt: skip
    return rows


def lm(arms: Arms, teachers: Arms) -> list[list[str]]:
    """The bars of a language model, in nats a token."""
    take = {name: np.array([one["loss"] for one in arms[name]]) for name in arms}
    mean, half = interval(list(take["fp32 of f32"] - take["alone"]))
    stored = take["fp32 of stored top 64"] / take["fp32 of f32"] - 1
    off = 100 * float(stored.mean())
    return [
        ["distilled beside alone", f"{mean:+.4f} ± {half:.4f}", "< 0 without 0",
         _said(mean + half < 0)],
        ["stored top 64 beside live", f"{off:+.3f} %", "within 0.5 %", _said(abs(off) <= 0.5)],
    ]  # fmt: skip


def main() -> bool:
    """Runs what is asked for and writes its pages; whether every bar is met."""
    chosen = [name for name in sys.argv[1:] if name in SETTINGS] or list(SETTINGS)
    for name in chosen if "--page" not in sys.argv else []:
        command = [sys.executable, "experiments/distil.py", *SETTINGS[name].split()]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, "--out", str(OUT / name)], cwd=ROOT, check=True, env=env)
    met = []
    for name in chosen:
        report = OUT / name / "report.md"
        if not report.exists():
            met.append(False)
            continue
        found = json.loads((OUT / name / "results.json").read_text())
        rows = {"classify": classify, "lm": lm}[name](found["arms"], found["baselines"])
        text = report.read_text().replace("\n\n![loss](loss.png)\n", "").split("\n\n", 1)[1]
        line = f"`python experiments/distil.py {SETTINGS[name]}`"
        bars = table(["what", "found", "bar", ""], rows)
        write(f"distil_{name}", TITLES[name], "\n\n".join([bars, line, text]))
        met += [row[-1] == "met" for row in rows]
    return all(met)


if __name__ == "__main__":
    sys.exit(not main())
