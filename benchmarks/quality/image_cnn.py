"""What 16 and 8 bits cost a convolutional network: the experiment at its full size, as a page.

Run:       python -m benchmarks.quality.image_cnn
Expected:  every arm names at least .98 of the held-out digits and .90 of Fashion-MNIST's test
           images right, in both modes of its convolutions.
"""

from __future__ import annotations

import sys

import image_cnn as experiment
import numpy as np

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table

OUT = ROOT / "runs" / "evidence" / "image_cnn"
RUNS = (
    experiment.Config(out=OUT / "digits", fresh=True),
    # both modes in one format: an arm takes minutes here
    experiment.Config(
        data="fashion-mnist", model="small", batch=64, steps=2800, seeds=3, out=OUT / "fashion",
        fresh=True,
        precision=("fp32", "bf16-x32", "bf16-x16"),
    ),
)  # fmt: skip


def main() -> bool:
    """Trains all arms; whether every bar is met."""
    parts, met = [], True
    for config in RUNS:
        arms = experiment.compare(config)
        bar = experiment.BARS[config.data]
        missed = [arm.outcome.label for arm in arms if np.mean(arm.accuracy) < bar]
        met = met and not missed
        verdict = f"MISSED by {', '.join(missed)}" if missed else "met"
        parts.append(
            f"## {config.data}\n\n{config.seeds} seeds, {config.steps} steps of {config.batch}"
            f" images, model {config.model}, AdamW at {config.lr:g} ({config.schedule}). Bar: at"
            f" least {bar:.2f} in every arm: {verdict}.\n\n"
            f"{table(experiment.HEAD, experiment.rows(arms))}"
        )
    text = (
        "x32 is X32 * K16 -> Y32: over fp32 the rule `**/conv*=p=f32,c=bf16,o=f32` (or c=f16). x16"
        " is X16 * K16 -> Y16: the presets bf16 and fp16. The second column is read from the"
        " StableHLO of the training step: x * K -> y; weight gradients leave in float32. Accuracy"
        " is that of the arm in its own precision, the loss is judged in float32; ± is the 95 %"
        " interval over seeds, differences are paired. Products of 8-bit arms are emulated in"
        " float32, so their speed says nothing; nor does that of 16 bits on a CPU, which computes"
        " in float32 between casts."
    )
    body = "\n\n".join([text, *parts])
    write("image_cnn", "What 16 and 8 bits cost a convolutional network", body)
    return met


if __name__ == "__main__":
    sys.exit(not main())
