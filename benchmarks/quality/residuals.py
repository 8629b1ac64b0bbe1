"""What is saved for the backward pass in 8 bits: loss and memory, as a page.

Run:       python -m benchmarks.quality.residuals [--page]
Expected:  e4m3 and int8 within 0.5 % of what is kept as computed, over 5 paired seeds; at most half
           the temporaries, compiled for this CPU.

The comparison is `experiments/sweep.py`, which keeps the runs that ended in
runs/evidence/residuals. With `--page` nothing is trained: the page is written from what lies there.
Temporaries are the compiler's own, of the gradient of a decoder of 8 layers in one scan.
"""

from __future__ import annotations

import csv
import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table
from mpjax.models import decoder
from mpjax.precision import get_precision
from mpjax.typing import Array, Params

OUT = ROOT / "runs" / "evidence" / "residuals"
FORMS = {"bf16": ("none", "int8", "e4m3", "e5m2"), "fp8": ("none", "e4m3")}
SETTINGS = "--lr 2e-3 --seeds 5"
SIZE: dict[str, Any] = dict(layers=8, width=256, heads=4, vocabulary=256, loop="scan")
BATCH = (8, 128)


def temporaries(precision: str, remat: str) -> float:
    """Megabytes of the gradient of a decoder's loss, beside weights and gradients."""
    model = decoder("tiny", get_precision(precision), remat=remat, **SIZE)
    ids = jax.ShapeDtypeStruct(BATCH, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(params: Params, ids: Array) -> Array:
        return model.loss(params, {"inputs": ids, "targets": ids}, key=jax.random.key(0))[0]

    found = jax.jit(jax.grad(loss)).lower(params, ids).compile().memory_analysis()
    assert found is not None
    return float(found.temp_size_in_bytes) / 1e6


def main() -> bool:
    """Trains all arms and writes the page; whether every bar is met."""
    body, bars = [], []
    for start, forms in FORMS.items():
        arms = [start, *(f"{start} residuals={form}" for form in forms[1:])]
        out = OUT / start
        if "--page" not in sys.argv:
            command = [sys.executable, "experiments/sweep.py", *SETTINGS.split(), "--precision"]
            env = os.environ | {"JAX_PLATFORMS": "cpu"}
            subprocess.run([*command, *arms, "--out", str(out)], cwd=ROOT, check=True, env=env)
        with (out / "results.csv").open() as file:
            found = list(csv.DictReader(file))[: len(arms)]  # then the best of each
        memory = functools.partial(temporaries, remat="none")
        plain = memory(arms[0])
        rows = []
        for form, arm, row in zip(forms, arms, found, strict=True):
            gap, around = (float(row[name] or 0) for name in ("gap_percent", "gap_percent_half"))
            used = memory(arm)
            beside = f"{gap:+.3f} ± {around:.3f}" if form != "none" else "–"
            loss = f"{float(row['validation_loss']):.4f}"
            rows.append([form, loss, beside, f"{used:.1f}", f"{used / plain:.2f}"])
            if form in ("int8", "e4m3"):
                good = abs(gap) + around <= 0.5 and used <= 0.5 * plain
                said = "met" if good else "**missed**"
                bars.append([f"{start}, {form}", *rows[-1][2:], said])
        full = temporaries(arms[0], "full")
        head = ["residuals", "loss", "beside none, %", "temporaries, MB", "of none's"]
        more = f"With `remat=full` and `residuals=none`: {full:.1f} MB, {full / plain:.2f}."
        body.append(f"## {start}\n\n{table(head, rows)}\n\n{more}")
    text = (
        "What modules keep for the backward pass (inputs of products and norms, operands of gates,"
        " queries, keys and values), as it is computed or rounded to 8 bits, blocks of 128; the"
        f" backward pass reads the rounded. `python experiments/sweep.py {SETTINGS} --precision"
        " ARM ...`; gaps are paired, ± is the 95 % interval over seeds. Temporaries of the gradient"
        f" of {SIZE['layers']} layers of width {SIZE['width']} in a scan, batch {BATCH[0]} x"
        f" {BATCH[1]}, as this CPU's compiler counts them."
    )
    judged = table(["what", "loss beside none, %", "MB", "of none's", "within .5 %, half"], bars)
    write("residuals", "Saved for the backward pass in 8 bits", "\n\n".join([text, judged, *body]))
    return all(row[-1] == "met" for row in bars)


if __name__ == "__main__":
    sys.exit(not main())
