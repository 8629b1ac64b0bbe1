"""What quantised products cost in quality: the experiment at its full size, as a page.

Run:       python tests/evidence/low_bit_products.py
Expected:  see experiments/low_bit_products.py; each bar is judged on the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from page import ROOT, table, write

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import low_bit_products as experiment  # noqa: E402

CLOSE = ("fp8", "fp8-delayed", "fp8-block", "mxfp8", "int8", "int8-switchback")


def judge(name: str, low: float, mean: float, high: float) -> str:
    """The bar of a recipe and whether its figures meet it."""
    if name in CLOSE:
        return (
            f"90 % interval inside ±0.25 %: {'met' if -0.25 <= low <= high <= 0.25 else 'MISSED'}"
        )
    if name == experiment.UNSCALED:
        return f"at least +10 %: {'met' if mean >= 10 else 'MISSED'}"
    if name == "mxfp4":
        return f"at most +3 %: {'met' if mean <= 3 else 'MISSED'}"
    return ""


def main() -> bool:
    """Trains all arms; whether every bar is met."""
    config = experiment.Config(out=ROOT / "runs" / "evidence" / "low_bit_products")
    outcomes, notes = experiment.compare(config)
    reference, rows = outcomes[0], []
    for outcome in outcomes[1:]:
        values = experiment.gaps(outcome, reference)
        mean, low, high = experiment.interval_90(values)
        rows.append(
            (outcome.label, f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}",
             " ".join(f"{v:+.3f}" for v in values), judge(outcome.label, low, mean, high))
        )  # fmt: skip
    share, seeds = experiment.four_bit_share(outcomes)
    verdict = f"nvfp4 loses {share:.0f} % of what mxfp4 loses, {seeds} seeds; the bar is 60 %: "
    verdict += "met" if share <= 60 else "MISSED"
    head = ("recipe", "gap to fp32, %", "90 % interval", "each seed", "bar")
    body = "\n\n".join([table(head, rows), verdict, *notes])
    write("low_bit_products", "What quantised products cost in quality", body)
    return "MISSED" not in body


if __name__ == "__main__":
    sys.exit(not main())
