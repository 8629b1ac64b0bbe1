"""Language models of four libraries, unmodified, trained under autocast.

Run:       python -m benchmarks.tools.whole_models
Expected:  Flax Linen, Flax NNX, Equinox and Haiku: at least 99 % of the product FLOPs of a step in
           16 bits, by a count of the StableHLO text and by `audit`; validation loss within 0.5 %
           of float32's after 200 steps in bf16, and in fp16 with a dynamic loss scale.

The models are those of tests/interpret/models, the training is that of
`experiments/autocast_any.py`. A control tells what a gap means: float32 whose first weights alone
were rounded to bfloat16.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Else XLA leaves out some of the roundings that the program asks for.
os.environ["XLA_FLAGS"] = "--xla_allow_excess_precision=false"

import autocast_any  # sets XLA flags before JAX starts

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np

from benchmarks.common.page import write
from mpjax.data import Corpus, load_corpus, validation_batches
from mpjax.interpret.autocast.autocast import autocast
from mpjax.markdown import table
from mpjax.report import gaps, interval
from tests.interpret.audit.stablehlo import low_share, product_flops

LIBRARIES = {"linen": "Flax Linen", "nnx": "Flax NNX", "equinox": "Equinox", "haiku": "Haiku"}
PACKAGES = ("equinox", "dm-haiku")
SHARE, GAP, SEEDS = 0.99, 0.5, 3  # of product FLOPs, percent, trainings an arm
ROUNDED = "fp32, first weights rounded to bf16"
WORK = autocast_any.Work()


def one_step(apply: Any, weights: Any, precision: str, batch: Any) -> tuple[float, float]:
    """Of the first step: share of product FLOPs in 16 bits by its StableHLO; gradient's error."""
    exact = autocast_any.loss_of(apply)
    loss = exact if precision == "fp32" else autocast(exact, precision)
    lowered = jax.jit(jax.grad(loss)).lower(weights, batch)
    gradients = (lowered.compile()(weights, batch), jax.jit(jax.grad(exact))(weights, batch))
    mine, theirs = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)]) for t in gradients)
    error = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    return low_share(product_flops(lowered.as_text())), error


def rounded(weights: Any) -> Any:
    """Weights in float32 that bfloat16 can hold."""
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), weights)


def measure(library: str, corpus: Corpus) -> tuple[list[tuple[object, ...]], bool]:
    """The rows of a library, and whether its bars are met."""
    shape = {
        "vocabulary": corpus.tokenizer.vocab_size, "width": WORK.width, "layers": WORK.layers,
        "heads": WORK.heads, "context": WORK.seq,
    }  # fmt: skip
    module = importlib.import_module(f"tests.interpret.models.{library}")
    built = [module.build(shape, seed) for seed in range(SEEDS)]
    starts, apply = [weights for weights, _ in built], built[0][1]
    batch = validation_batches(corpus.validation, batch=WORK.batch, seq=WORK.seq, limit=1)[0]
    rows: list[tuple[object, ...]] = []
    met, exact = True, None
    for precision in ("fp32", ROUNDED, "bf16", "fp16"):
        control = precision == ROUNDED
        dtype = "fp32" if control else precision
        first = [rounded(weights) for weights in starts] if control else starts
        run = autocast_any.train(first, apply, dtype, (), WORK, corpus)
        exact = exact or run
        share, error = one_step(apply, starts[0], dtype, batch)
        each = gaps(run.loss, exact.loss)
        mean, half = interval(each)
        if dtype != "fp32":
            own = gaps(run.own, exact.loss)
            near = max(abs(g) for g in (*each, *own)) <= GAP
            met = met and near and min(share, run.share) >= SHARE
        reference = run is exact
        rows.append(
            (
                LIBRARIES[library], precision, f"{np.mean(run.loss):.4f}",
                "–" if reference else f"{mean:+.3f} ± {half:.3f} %",
                "–" if reference else " ".join(f"{gap:+.2f}" for gap in each),
                "–" if dtype == "fp32" else f"{np.mean(run.own):.4f}",
                "–" if dtype == "fp32" else f"{error:.2%}", f"{share:.2%}", f"{run.share:.2%}",
                " ".join(map(str, run.skipped)),
            )
        )  # fmt: skip
        print(*rows[-1], sep=" | ", flush=True)
    return rows, met


def main() -> bool:
    """Measures all; whether the bars are met."""
    begin, corpus = time.perf_counter(), load_corpus("stdlib")
    rows, met = [], True
    for library in LIBRARIES:
        found, good = measure(library, corpus)
        rows += found
        met = met and good
    head = ("library", "precision", "validation loss", "gap to fp32 (95 %)", "each seed, %",
            "under autocast", "first gradient off by", "low by StableHLO", "low by audit",
            "skipped")  # fmt: skip
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    text = (
        f"{WORK.layers} layers of width {WORK.width}, {WORK.heads} heads, {WORK.steps} steps of"
        f" {WORK.batch} x {WORK.seq} bytes of the Python standard library, AdamW at {WORK.lr:g},"
        f" {SEEDS} seeds with the same first weights and batches in each precision. Weights and"
        " optimizer are float32; fp16 has a dynamic loss scale that starts at 2^16. Loss is judged"
        " in float32, and once more under autocast itself. How far the first gradient is from"
        " float32's (norm of the difference over norm) shows that the roundings are there. The"
        " share of product FLOPs is that of one step, forward and backward."
        f" {versions}; took {time.perf_counter() - begin:.0f} s."
        f"\n\nBars: at least {SHARE:.0%} of the product FLOPs in 16 bits by both counts, and every"
        f" seed's loss within {GAP} % of float32's, judged either way:"
        f" {'met' if met else 'MISSED'}."
    )
    note = (
        "The control moves each first weight by less than half a percent and changes nothing else:"
        " what it moves the loss by is what 200 steps make of any small difference."
    )
    write(
        "whole_models",
        "Models of four libraries under autocast",
        f"{text}\n\n{table(head, rows)}\n\n{note}",
    )
    return met


if __name__ == "__main__":
    sys.exit(not main())
