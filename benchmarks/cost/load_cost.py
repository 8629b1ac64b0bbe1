"""Loading SmolLM2 and MiniLM with their tokenizers, against an older checkout of this repository.

Run:       git clone . OLD && git -C OLD checkout d185f48
           python -m benchmarks.cost.load_cost OLD [--pairs 12]
Expected:  medians of the ratios new / old of CPU time and of memory at most 1.05. About 5 minutes.

Each load is in a process of its own, old and new by turns, in both orders; the files are in the
system's cache. Imports are done before; what a load starts in other processes counts as its time.
Memory is what the process has at most while it loads, beyond what it has before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common.page import ROOT, write
from common.datasets.assets import fetch
from mpjax.markdown import table

NAMES, BAR = ("smollm2", "minilm"), 1.05
CHILD = """
import json, resource, sys
from pathlib import Path
import gguf, gguf.quants, jax, safetensors, tokenizers
from mpjax.data import Tokenizer
from mpjax.data.tokenizers.wordpiece import parse_wordpiece
from mpjax.models.hf import load_checkpoint, open_checkpoint

def seconds():
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

jax.device_put(0.0).block_until_ready()
Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
memory, begun = status("VmRSS"), seconds()
checkpoint = open_checkpoint(sys.argv[1])
model, params = load_checkpoint(checkpoint)
jax.block_until_ready(params)
loaded = seconds()
text = checkpoint.tokenizer_json()
kept = parse_wordpiece(text, "it") if "bert" in sys.argv[2] else Tokenizer.from_text(text)
ended = seconds()
print(json.dumps([loaded - begun, ended - loaded, ended - begun, status("VmHWM") - memory]))
"""
WHAT = ("weights, ms of CPU", "tokenizer, ms of CPU", "both, ms of CPU", "memory, MB at most")


def load(checkout: Path, folder: Path, kind: str) -> list[float]:
    """What a load by a checkout takes."""
    env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), kind], env=env, cwd=checkout,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return list(json.loads(done.stdout))


def main() -> int:
    """Measures and writes the page; whether the bar is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path, help="folder of the older checkout")
    parser.add_argument("--pairs", type=int, default=12)
    asked = parser.parse_args()
    old = asked.old.resolve()
    git = ["git", "-C", str(old), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    rows, missed = [], False
    for name in NAMES:
        folder, kind = fetch(name), "bert" if name == "minilm" else "llama"
        for checkout in (old, ROOT):  # the files come into the cache, and the compiled Python
            load(checkout, folder, kind)
        found: dict[Path, list[list[float]]] = {old: [], ROOT: []}
        for pair in range(asked.pairs):
            for checkout in (old, ROOT)[:: 1 if pair % 2 else -1]:
                found[checkout].append(load(checkout, folder, kind))
        for i, what in enumerate(WHAT):
            before, after = ([one[i] for one in found[checkout]] for checkout in (old, ROOT))
            ratios = sorted(b / a for a, b in zip(before, after, strict=True))
            ratio, scale = statistics.median(ratios), 1 if i == 3 else 1000
            verdict = ("met" if ratio <= BAR else "MISSED") if i > 1 else ""
            missed |= verdict == "MISSED"
            medians = (f"{scale * statistics.median(x):.0f}" for x in (before, after))
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            rows.append((name, what, *medians, f"{ratio:.3f}", spread, verdict))
            print(*rows[-1], flush=True)
    body = (
        f"`load_checkpoint` in fp32 and the tokenizer, {asked.pairs} pairs of processes by turns,"
        f" against commit {commit}, before files had bounds. Medians; bar: both, and memory, at"
        f" most {BAR} times.\n\n"
        + table(("model", "what", commit, "now", "ratio", "of all pairs", "verdict"), rows)
    )
    write("load_cost", "What bounds add to loading a checkpoint", body,
          "python -m benchmarks.cost.load_cost OLD")  # fmt: skip
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
