"""What each augmentation gains a classifier that has 500 texts: an experiment at its full size.

Run:       python -m benchmarks.quality.augment [--page] [options of experiments/augment.py]
Expected:  a gain with its 90 % interval for each; nulls are published as such.

The experiment is a process of its own in runs/evidence/augment. With `--page` nothing is trained:
the page is written from the run that lies there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common.page import ROOT, write

OUT = ROOT / "runs" / "evidence" / "augment"
SCRIPT = "experiments/augment.py"


def main() -> bool:
    """Trains and writes the page; whether there is a report."""
    options = sys.argv[1:]
    if "--page" not in options:
        command = [sys.executable, str(Path(ROOT) / SCRIPT), *options, "--out", str(OUT), "--fresh"]
        subprocess.run(command, cwd=ROOT, check=True)
    if not (path := OUT / "report.md").exists():
        print(f"{path}: no report; run without --page", file=sys.stderr)
        return False
    manifest = json.loads((OUT / "none" / "seed0" / "manifest.json").read_text())
    title, _, body = path.read_text().replace("![gain](gain.png)", "").partition("\n")
    about = (
        "Gains are paired by seed; ± is the 90 % interval over seeds, `null` where it holds 0. In"
        " all arms of a seed the texts, the first weights, the order and the dropout are the same."
        f" Held-out texts are never changed. Trained at commit {manifest['commit'][:7]}."
    )
    body = f"{about}\n\n## {title.removeprefix('# ')}\n\n`python {SCRIPT}`\n{body.rstrip()}"
    write("augment", "What augmentation gains a classifier of few texts", body)
    return True


if __name__ == "__main__":
    sys.exit(not main())
