"""Compressed gradients: loss against what is sent, on eight replicas, as a page.

Run:       python -m benchmarks.quality.compress [curve|paired ...] [--page]
Expected:  a curve over eight forms, each at its best learning rate, 5 paired seeds, whatever it
           says; int8 in blocks of 256 within 0.25 % of uncompressed gradients over 16 paired seeds,
           for at most 0.27 x the bytes.

The comparisons are `experiments/compress_gradients.py`, which keeps the runs that ended in
runs/evidence/compress. With `--page` nothing is trained: the page is written from what lies there.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table

OUT = ROOT / "runs" / "evidence" / "compress"
SETTINGS = {
    "curve": "--seeds 5 --lr 1e-3 2e-3 4e-3 8e-3",
    "paired": "--seeds 16 --lr 4e-3 --compression none int8@256",
}
TITLES = {"curve": "Eight forms, each at its best rate", "paired": "int8 and float32, 16 seeds"}


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
    """Runs what is asked for and writes the page; whether every bar is met."""
    chosen = [name for name in sys.argv[1:] if name in SETTINGS] or list(SETTINGS)
    for name in chosen if "--page" not in sys.argv else []:
        command = [sys.executable, "experiments/compress_gradients.py", *SETTINGS[name].split()]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, "--out", str(OUT / name)], cwd=ROOT, check=True, env=env)
    body, rows = [], []
    for name, title in TITLES.items():
        report = OUT / name / "report.md"
        if not report.exists():
            continue
        if name == "paired":
            rows += judged(name)
        text = report.read_text().split("\n\n", 1)[1]
        text = "\n\n".join(part for part in text.split("\n\n") if not part.startswith("!["))
        line = f"`python experiments/compress_gradients.py {SETTINGS[name]}`"
        body.append(f"## {title}\n\n{line}\n\n{text}")
    bars = table(["what", "found", "bar", ""], rows)
    write("compress", "Loss against bytes sent", "\n\n".join([bars] * bool(rows) + body))
    return len(body) == len(SETTINGS) and all(row[-1] == "met" for row in rows)


if __name__ == "__main__":
    sys.exit(not main())
