"""Compressed gradients: loss against what is sent, on eight replicas, as a page.

Run:       python -m benchmarks.quality.compress [curve|paired|diloco ...] [--page]
Expected:  a curve over eight forms, each at its best learning rate, 5 paired seeds, whatever it
           says; int8 in blocks of 256 within 0.25 % of uncompressed gradients over 16 paired seeds,
           for at most 0.27 x the bytes; replicas that train apart for 20 steps and meet in float32
           or in 4 bits, whatever it says.

The comparisons are `experiments/compress_gradients.py`, which keeps the runs that ended in
runs/evidence/compress. With `--page` nothing is trained: the page is written from what lies there.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table

OUT = ROOT / "runs" / "evidence" / "compress"
SETTINGS = {
    "curve": "--seeds 5 --lr 1e-3 2e-3 4e-3 8e-3",
    "paired": "--seeds 16 --lr 4e-3 --compression none int8@256",
    "diloco": "--seeds 5 --lr 2e-3 4e-3 8e-3 --compression none 'none every=20'"
    " 'int4@128 every=20'",
}
TITLES = {
    "curve": "Eight forms, each at its best rate",
    "paired": "int8 and float32, 16 seeds",
    "diloco": "Apart for 20 steps, each at its best rate",
}
PAGES = {
    "compress": ("Loss against bytes sent", ("curve", "paired")),
    "diloco": ("Replicas that train apart", ("diloco",)),
}


def judged(folder: str) -> list[list[str]]:
    """The bars of the paired comparison."""
    with (OUT / folder / "results.csv").open() as file:
        coded = list(csv.DictReader(file))[1]
    gap, around = float(coded["gap_percent"]), float(coded["gap_percent_half"])
    good = abs(gap) + around <= 0.25
    said = "met" if good else "**missed**"
    label = f"int8@256 beside none, {coded['seeds']} seeds"
    return [[label, f"{gap:+.3f} ± {around:.3f} %", "within 0.25 %", said]]


def main() -> bool:
    """Runs what is asked for and writes its pages; whether every bar is met."""
    chosen = [name for name in sys.argv[1:] if name in SETTINGS] or list(SETTINGS)
    for name in chosen if "--page" not in sys.argv else []:
        words = shlex.split(SETTINGS[name])
        command = [sys.executable, "experiments/compress_gradients.py", *words]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, "--out", str(OUT / name)], cwd=ROOT, check=True, env=env)
    whole = True
    for page, (title, parts) in PAGES.items():
        if not set(parts) & set(chosen):
            continue
        body, rows = [], []
        for name in parts:
            report = OUT / name / "report.md"
            if not report.exists():
                whole = False
                continue
            if name == "paired":
                rows += judged(name)
            text = report.read_text().split("\n\n", 1)[1]
            text = "\n\n".join(part for part in text.split("\n\n") if not part.startswith("!["))
            line = f"`python experiments/compress_gradients.py {SETTINGS[name]}`"
            body.append(f"## {TITLES[name]}\n\n{line}\n\n{text}")
        bars = table(["what", "found", "bar", ""], rows)
        if body:
            write(page, title, "\n\n".join([bars] * bool(rows) + body))
        whole = whole and all(row[-1] == "met" for row in rows)
    return whole


if __name__ == "__main__":
    sys.exit(not main())
