"""Annealing beside AdamW at equal operations, on text and on images, as a page.

Run:       python -m benchmarks.quality.anneal [--page]
Expected:  what each hybrid differs from tuned AdamW, with its interval; a null unless that excludes
           0, and whichever way it goes.

The comparisons are `experiments/anneal.py`, which keeps the runs that ended in
runs/evidence/anneal. With `--page` nothing is trained: the page is written from what lies there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table
from mpjax.report import interval

OUT = ROOT / "runs" / "evidence" / "anneal"
SETTINGS = {"lm": "", "cnn": "--task cnn --batch 64 --lr 1e-3 3e-3 1e-2 3e-2"}


def main() -> bool:
    """Runs what is missing and writes the page; whether both comparisons are there."""
    for name, settings in SETTINGS.items() if "--page" not in sys.argv else ():
        command = [sys.executable, "experiments/anneal.py", *settings.split()]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, "--out", str(OUT / name)], cwd=ROOT, check=True, env=env)
    rows: list[list[str]] = []
    body: list[str] = []
    for name, settings in SETTINGS.items():
        report = OUT / name / "report.md"
        if not report.exists():
            continue
        arms = json.loads((OUT / name / "results.json").read_text())["arms"]
        first, *others = arms
        for other in others:
            pairs = zip(arms[other], arms[first], strict=True)
            mean, half = interval([a["loss"] - b["loss"] for a, b in pairs])
            verdict = "worse" if mean - half > 0 else "better" if mean + half < 0 else "null"
            rows.append([name, other, f"{mean:+.4f} ± {half:.4f}", verdict])
        text = report.read_text().replace("\n\n![loss](loss.png)\n", "").split("\n\n", 1)[1]
        line = f"`python experiments/anneal.py {settings}".rstrip() + "`"
        title = "A language model" if name == "lm" else "An image network"
        body.append(f"## {title}\n\n{line}\n\n{text}")
    head = ["task", "arm", "held-out loss above tuned AdamW", ""]
    write("anneal", "Annealing beside AdamW", "\n\n".join([table(head, rows), *body]))
    return len(body) == len(SETTINGS)


if __name__ == "__main__":
    sys.exit(not main())
