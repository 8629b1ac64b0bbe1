"""What quantised products cost in quality: the experiment at its full size, as a page.

Run:       python tests/evidence/low_bit_products.py
Expected:  see experiments/low_bit_products.py; each bar is judged on the page.

A model this small keeps one core busy, so the recipes are shared out to two processes of one core
each; both train fp32, and must find the same losses. With `--page` nothing is trained: the page is
written from the runs in runs/evidence/low_bit_products/*, and says what is missing there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from page import ROOT, table, write

sys.path.insert(0, str(ROOT / "experiments"))

import low_bit_products as experiment  # noqa: E402

from mpjax.data import load_corpus  # noqa: E402
from mpjax.precision import get_precision  # noqa: E402
from mpjax.report import gaps  # noqa: E402
from mpjax.train.metrics import read_metrics  # noqa: E402

CLOSE = ("fp8", "fp8-delayed", "fp8-block", "mxfp8", "int8", "int8-switchback")
SHARES = (
    ("fp8", "mxfp8", "int8-switchback", "mxfp4", experiment.UNSCALED),
    ("fp8-block", "fp8-delayed", "int8", "nvfp4", "fp8-row"),
)
MOST_SEEDS = 32
OUT = ROOT / "runs" / "evidence" / "low_bit_products"


def train(number: int) -> subprocess.Popen[bytes]:
    """Starts the experiment with a share of the recipes on one core."""
    cores = sorted(os.sched_getaffinity(0))
    words = [sys.executable, str(ROOT / "experiments" / "low_bit_products.py")]
    words += ["--out", str(OUT / str(number)), "--most-seeds", str(MOST_SEEDS), "--recipe"]
    return subprocess.Popen(
        [*words, *SHARES[number]],
        preexec_fn=lambda: os.sched_setaffinity(0, {cores[number % len(cores)]}),
    )


def losses(folder: Path) -> list[float]:
    """The validation loss of each seed of an arm."""
    seeds = sorted(folder.glob("seed*"), key=lambda path: int(path.name[4:]))
    return [read_metrics(seed / "metrics.jsonl")[-1]["validation_loss"] for seed in seeds]


def judge(name: str, low: float, mean: float, high: float) -> str:
    """The bar of a recipe and whether its figures meet it."""
    if name in CLOSE:
        inside = -0.25 <= low <= high <= 0.25
        return f"90 % interval inside ±0.25 %: {'met' if inside else 'MISSED'}"
    if name == experiment.UNSCALED:
        return f"at least +10 %: {'met' if mean >= 10 else 'MISSED'}"
    if name == "mxfp4":
        return f"at most +3 %: {'met' if mean <= 3 else 'MISSED'}"
    return ""


def collect() -> dict[str, list[float]]:
    """Losses of each arm, of the process that trained most seeds; processes must agree."""
    found: dict[str, list[float]] = {}
    for name in ("fp32", "bf16", *(name for share in SHARES for name in share)):
        for folder in sorted(OUT.glob(f"*/{name}")):
            now, before = losses(folder), found.get(name, [])
            shared = min(len(now), len(before))
            assert now[:shared] == before[:shared], (name, before, now)
            found[name] = max(now, before, key=len)
    return found


def main() -> bool:
    """Trains all arms; whether every bar is met."""
    if "--page" not in sys.argv and any([child.wait() for child in [train(0), train(1)]]):
        raise SystemExit("an experiment failed; see above")
    config = experiment.Config()
    corpus = load_corpus(config.data, config.tokenizer)
    found = collect()
    rows, by_name = [], {}
    for name in ("bf16", *(name for share in SHARES for name in share)):
        values = found.get(name, [])
        if len(values) < 2:
            rows.append((name, "not measured", "", len(values), "", "", "MISSED: not measured"))
            continue
        own = by_name[name] = gaps(values, found["fp32"])
        mean, low, high = experiment.interval_90(own)
        model = experiment.launch.make_decoder(config, corpus, get_precision(name))
        share_of = 100 * experiment.quantised_share(model, config.seq)
        how = "" if name == "bf16" else experiment.runs(name, config)["dgrad"]
        rows.append(
            (name, f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", len(own), f"{share_of:.0f} %",
             how, judge(name, low, mean, high))
        )  # fmt: skip
    verdict = "nvfp4's share of mxfp4's gap: MISSED: not measured"
    if {"nvfp4", "mxfp4"} <= set(by_name):
        ratio, seeds = experiment.percent_of(by_name["nvfp4"], by_name["mxfp4"])
        verdict = f"nvfp4 loses {ratio:.0f} % of what mxfp4 loses, {seeds} seeds; the bar is 60 %: "
        verdict += "met" if ratio <= 60 else "MISSED"
    head = (
        "recipe", "gap to fp32, %", "90 % interval", "seeds", "product FLOPs quantised",
        "what multiplies (dgrad)", "bar",
    )  # fmt: skip
    text = (
        f"{config.layers} layers of width {config.width}, {config.steps} steps of {config.batch} x"
        f" {config.seq} tokens of {config.data} as {config.tokenizer}, AdamW at {config.lr:g}"
        f" ({config.schedule}), judged in float32; gaps are paired (same initial weights, same"
        f" batches). Seeds are added, {config.seeds} to {MOST_SEEDS}, until the 90 % interval lies"
        f" inside ±{config.within} % or outside of it."
    )
    each = "\n".join(
        f"    {name}: {' '.join(f'{gap:+.2f}' for gap in own)}" for name, own in by_name.items()
    )
    body = f"{text}\n\n{table(head, rows)}\n\n{verdict}\n\nEach seed's gap, %:\n\n{each}"
    write("low_bit_products", "What quantised products cost in quality", body)
    return "MISSED" not in body


if __name__ == "__main__":
    sys.exit(not main())
