"""Twenty steps of the training methods in every precision, on one device and on eight.

Run:       python -m benchmarks.numerics.methods [--fresh]
Expected:  distillation, mixup, ranking, regression of pairs and annealing train 20 steps in every
           precision and on every mesh: all losses finite, one program, and a step whose loss is not
           finite leaves every bit of weights, moments, projections, temperatures and histories.

Several tasks at once and adversarial training have this table on pages of their own. What has been
run is kept in runs/evidence/methods, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling takes most of the time

import jax
import numpy as np
import optax

from benchmarks.common.page import ROOT, write
from mpjax.files import write_text
from mpjax.markdown import table
from mpjax.models import decoder, encoder, quantize_weights
from mpjax.ops import Objective
from mpjax.optim.annealing import affine, alternate, annealed, gaussian, langevin
from mpjax.tasks import Distillation, Language, Mixup, Ranking, TextClassification, TextRegression
from mpjax.train import build
from mpjax.typing import Batch

CELLS = ROOT / "runs" / "evidence" / "methods" / "cells.json"
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "fp8-delayed", "pure-bf16-sr")
MESHES = ("", "data=2,fsdp=2,tensor=2")
B, T, V, K = 16, 12, 40, 4
ABSENT = V + 59  # a row that no table has: the loss is not finite
Method = tuple[Any, optax.GradientTransformation, Any, Batch]  # model, optimizer, objective, batch


def _texts(rows: int = B) -> Batch:
    draw = np.random.default_rng(0)
    ids = draw.integers(4, V, (rows, T)).astype(np.int32)
    return {"ids": ids, "keep": np.arange(T) < draw.integers(4, T + 1, (rows, 1))}


def _encoder(precision: str, **changes: Any) -> Any:
    own = {"layers": 2, "width": 32, "heads": 4, "vocabulary": V, "dropout": 0.1} | changes
    return encoder("bert-tiny", precision, **own)


TASK = TextClassification(("a", "b", "c"))
_CLASS = {"head": "class", "classes": 3}


def distillation(precision: str, weights: str) -> Method:
    """Answers, hidden states and relations of a teacher of twice the depth."""
    teacher = _encoder("fp32", layers=4, width=48, **_CLASS)
    held = teacher.init(jax.random.key(7))
    held = held if weights == "f32" else quantize_weights(held, weights)
    own = Distillation(TASK, teacher, held, hidden=0.1, relations=0.1, relation_heads=4)
    batch = _texts() | {"labels": np.arange(B, dtype=np.int32) % 3}
    return _encoder(precision, **_CLASS), optax.adam(3e-3), own.objective, batch


def _language(precision: str) -> tuple[Any, Batch]:
    model = decoder("tiny", precision, layers=2, width=32, heads=4, vocabulary=V, context=T)
    ids = np.random.default_rng(0).integers(4, V, (B, T + 1)).astype(np.int32)
    return model, {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def speaker(precision: str) -> Method:
    """A language model by the Jensen-Shannon divergence from an int4 teacher."""
    model, batch = _language(precision)
    teacher = decoder("tiny", "fp32", layers=4, width=32, heads=4, vocabulary=V, context=T)
    held = quantize_weights(teacher.init(jax.random.key(7)), "int4@32")
    own = Distillation(Language(), teacher, held, kind="jensen-shannon")
    return model, optax.adam(3e-3), own.objective, batch


def mixup(precision: str, level: str) -> Method:
    """Logits or embeddings of two texts, and their labels, mixed."""
    batch, own = _texts() | {"labels": np.arange(B, dtype=np.int32) % 3}, Mixup(TASK, 0.4, level)
    return _encoder(precision, **_CLASS), optax.adam(3e-3), own.objective, batch


def ranking(precision: str, kind: str) -> Method:
    """Items by a text, four candidates a row."""
    draw = np.random.default_rng(1)
    items = draw.integers(0, 9, (B, K)).astype(np.int32)
    batch = _texts() | {
        "types": np.zeros((B, T), np.int32),
        "item_ids": 4 + 4 * items[..., None] + np.arange(3, dtype=np.int32),
        "item_types": np.ones((B, K, 3), np.int32), "item_keep": np.ones((B, K, 3), bool),
        "items": items, "log_q": np.full((B, K), np.log(1 / 9), np.float32),
    }  # fmt: skip
    model = _encoder(precision, head="none", pool="mean")
    return model, optax.adam(3e-3), Ranking(kind).objective, batch


def pairs(precision: str) -> Method:
    """A number for two texts in one row."""
    batch = _texts()
    batch["types"] = (np.arange(T) > 5).astype(np.int32) * np.ones((B, 1), np.int32)
    batch["values"] = (batch["ids"][:, 1] / V).astype(np.float32)
    model = _encoder(precision, head="class", classes=1)
    return model, optax.adam(3e-3), TextRegression().objective, batch


def annealing(precision: str, proposal: Any) -> Method:
    """Three steps of Adam, one proposal; a step of Adam meets the bad batch."""
    model, batch = _language(precision)
    moves = annealed(proposal, affine(1e-2, 0.9), reheat=5)
    return model, alternate(optax.adam(3e-3), moves, descend=3, anneal=1), Objective.of_model, batch


METHODS: dict[str, Callable[[str], Method]] = {
    "distillation, float32 teacher": functools.partial(distillation, weights="f32"),
    "distillation, int8 teacher": functools.partial(distillation, weights="int8"),
    "distillation, language, int4 teacher": speaker,
    "mixup": functools.partial(mixup, level="sentence"),
    "mixup, words": functools.partial(mixup, level="word"),
    "ranking, softmax": functools.partial(ranking, kind="softmax"),
    "ranking, bpr": functools.partial(ranking, kind="bpr"),
    "regression of pairs": pairs,
    "annealing, Gaussian": functools.partial(annealing, proposal=gaussian(0.01)),
    "annealing, Langevin": functools.partial(annealing, proposal=langevin(1e-4)),
}


def _bits(state: Any) -> list[bytes]:
    held = (state.params, state.opt_state.inner, state.opt_state.update_state, state.model_state)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(held))]


def cell(method: str, precision: str, mesh: str) -> dict[str, Any]:
    """Twenty steps, then one on a batch with a row that no table has, which is to be skipped."""
    model, optimizer, objective, batch = METHODS[method](precision)
    state, step = build(model, optimizer, mesh or None, objective=objective)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    name = "ids" if "ids" in batch else "inputs"
    broken = batch[name].copy()
    broken[0, 1] = ABSENT
    before, skipped = _bits(state), int(metrics["skipped"])
    # An id that is no token is refused on the host; here it is to reach the device.
    unchecked = dataclasses.replace(step, check=None)
    state, metrics = unchecked(state, batch | {name: broken})
    return {
        "first": losses[0], "last": losses[-1], "finite": bool(np.isfinite(losses).all()),
        "programs": step.compiled._cache_size(),
        "kept": int(metrics["skipped"]) == skipped + 1 and _bits(state) == before,
    }  # fmt: skip


def main() -> bool:
    """Runs what is not there yet and writes the page; whether every cell is as it is to be."""
    found = json.loads(CELLS.read_text()) if CELLS.exists() and "--fresh" not in sys.argv else {}
    CELLS.parent.mkdir(parents=True, exist_ok=True)
    for one in itertools.product(METHODS, PRECISIONS, MESHES):
        name = " | ".join(one)
        if name not in found:
            found[name] = cell(*one)
            print(name, found[name], flush=True)
            write_text(CELLS, json.dumps(found, indent=1) + "\n")
            jax.clear_caches()
    rows, met = [], True
    for method, precision in itertools.product(METHODS, PRECISIONS):
        cells = []
        for mesh in MESHES:
            one = found[" | ".join((method, precision, mesh))]
            good = one["finite"] and one["kept"] and one["programs"] == 1
            met &= good
            drop = f"{one['first']:.3f} to {one['last']:.3f}"
            cells.append(drop if good else f"**{drop}: {one}**")
        rows.append([method, precision, *cells])
    about = (__doc__ or "").split("\n\n")[2].split(" What has been")[0].replace("\n", " ")
    body = table(["method", "precision", "loss, one device", f"loss, {MESHES[1]}"], rows)
    said = (
        "Each cell is one program of finite losses; after a step that was skipped all weights,"
        " moments, update states and histories had the same bits."
    )
    write("methods", "Twenty steps of the training methods", "\n\n".join([about, said, body]))
    return met


if __name__ == "__main__":
    sys.exit(not main())
