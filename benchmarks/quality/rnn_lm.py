"""What 16 bits cost a recurrent language model: the experiment for both cells, as a page.

Run:       python -m benchmarks.quality.rnn_lm
Expected:  bf16 and fp16 within 0.5 % of fp32's validation loss.
"""

from __future__ import annotations

import sys

import rnn_lm as experiment

from benchmarks.common.page import ROOT, write
from mpjax.report import gap
from mpjax.report.comparison_table import markdown_table

SEEDS = 4


def main() -> bool:
    """Trains all arms of both cells; whether the mean gaps of bf16 and fp16 are within the bar."""
    parts, met = [], True
    for cell in ("lstm", "gru"):
        out = ROOT / "runs" / "evidence" / "rnn_lm" / cell
        outcomes, notes = experiment.compare(
            experiment.Config(cell=cell, seeds=SEEDS, out=out, fresh=True)
        )
        found = {o.label: gap(o, outcomes[0])[0] for o in outcomes}
        missed = [name for name in ("bf16", "fp16") if abs(found[name]) > experiment.BAR]
        met = met and not missed
        verdict = f"MISSED by {', '.join(missed)}" if missed else "met"
        lines = "\n".join(f"- {note}" for note in notes)
        parts.append(
            f"## {cell.upper()}\n\nBar: mean gap within {experiment.BAR} %: {verdict}.\n\n"
            f"{markdown_table(outcomes)}\n\n{lines}"
        )
    text = (
        "Loss in nats a byte on held-out files, judged in float32; ± is the 95 % interval over"
        " seeds, gaps are paired (same initial weights, same batches). The products of a cell run"
        " in 16 bits; its gates and memory are float32, but for the arm `bf16, state bf16`."
    )
    write("rnn_lm", "What 16 bits cost a recurrent language model", "\n\n".join([text, *parts]))
    return met


if __name__ == "__main__":
    sys.exit(not main())
