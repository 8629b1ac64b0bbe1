"""Recommendation by text, and Chinese: what is learned beside baselines, and what 16 bits cost it.

Run:       python -m benchmarks.quality.recommend [--page]
Expected:  films: NDCG@10 above popularity, with the 95 % interval over users above 0; bf16 and fp16
           within the noise of fp32. Chinese words: the tag of a character at least 5 points above
           the most frequent one. Chinese reviews: stated beside logistic regression on characters.

An experiment is a process of its own in runs/evidence/recommend. With `--page` nothing is trained:
the page is written from the runs that lie there, and an experiment that has none is left out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.page import ROOT, write
from benchmarks.quality.finetune import Bar, lead, part, scores, within

OUT = ROOT / "runs" / "evidence" / "recommend"
SMALL = "--seeds 1 --checkpoint none --precision fp32 --dropout 0 --batch 32 --lr 5e-3".split()
# name -> command
RUNS = {
    "films": ["experiments/recommend.py"],
    "chinese-words": [
        "experiments/finetune_tagger.py", "--task", "chinese", "--vocabulary", "6000",
        "--no-capitals", "--lengths", "64", "160", "--steps", "400", *SMALL,
    ],
    "chinese-reviews": [
        "experiments/finetune_classifier.py", "--data", "chinese-reviews", "--vocabulary", "6000",
        "--lengths", "64", "192", "--layers", "1", "--steps", "600", *SMALL,
    ],
}  # fmt: skip


def judged(name: str, found: dict[str, Any]) -> list[Bar]:
    """The bars of an experiment."""
    if name != "films":
        return [lead(found, "accuracy", 5.0 if name == "chinese-words" else 0.0)]
    popularity = 100 * found["baselines"]["popularity"]["ndcg@10"]
    least = (scores(found, "fp32", "ndcg@10") - popularity).min()
    bars: list[Bar] = [
        ("fp32, ndcg@10, above popularity in each seed", f"{least:+.2f} points at least", least > 0)
    ]
    arms = [arm for arm in found["arms"] if arm != "fp32"]
    return bars + [within(found, arm, "ndcg@10", None) for arm in arms]


def main() -> bool:
    """Trains and writes the page; whether every bar is met."""
    if "--page" not in sys.argv:
        for name, (script, *options) in RUNS.items():
            line = [sys.executable, str(Path(ROOT) / script), *options, "--out", str(OUT / name)]
            subprocess.run([*line, "--fresh"], cwd=ROOT, check=True)
    tried = [part(name, command, OUT / name, judged) for name, command in RUNS.items()]
    parts = [found for found in tried if found is not None]
    about = (
        "Differences between precisions are paired by seed; ± is a 95 % interval. All arms are"
        " judged in float32. Speeds say nothing: a CPU emulates 16 bits in float32, and other work"
        " may have run beside."
    )
    body = "\n\n".join([about, *(text for text, _ in parts)])
    write("recommend", "Recommendation by text, and Chinese, by precision", body)
    return len(parts) == len(RUNS) and all(met for _, met in parts)


if __name__ == "__main__":
    sys.exit(not main())
