"""Several tasks at once: beside each alone, under every precision and on a mesh, as a page.

Run:       python -m benchmarks.quality.multitask [--page|--fresh]
Expected:  mixing proportions within 1 % of the asked ones; every way to combine tasks trains 20
           steps in every precision, on one device and on eight, finite and as one program; two
           mixtures of three tasks with their gaps to single-task runs, whatever they are.

What has been measured is kept in runs/evidence/multitask, and the same command goes on from there;
`--fresh` begins anew. With `--page` nothing is trained.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import numpy as np
import optax

from benchmarks.common.page import ROOT, write
from mpjax.data import mixed_batches, mixing_weights
from mpjax.files import write_text
from mpjax.markdown import table
from mpjax.models import encoder
from mpjax.tasks import Mixture, TextClassification, TextRegression, TokenClassification
from mpjax.train import build

OUT = ROOT / "runs" / "evidence" / "multitask"
SIZES = {"tags": 90, "mood": 40, "score": 15}
STEPS = 20
WAYS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "uncertainty": {"weighting": "uncertainty"},
    "gradnorm": {"weighting": "gradnorm"},
    "pcgrad": {"conflicts": "pcgrad"},
    "gradnorm, pcgrad": {"weighting": "gradnorm", "conflicts": "pcgrad"},
    "uncertainty, own scales": {"weighting": "uncertainty", "own_scales": True},
    "gradnorm, pcgrad, own scales": {
        "weighting": "gradnorm", "conflicts": "pcgrad", "own_scales": True
    },
}  # fmt: skip
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "pure-bf16-sr")
MESHES = ("", "data=2,fsdp=2,tensor=2")
EXPERIMENTS = {
    "words and sentiment": ("pos-oanc", "ner-tweets", "reviews"),
    "texts": ("bbc", "reviews", "movie-snippets"),
}


def examples() -> dict[str, list[dict[str, Any]]]:
    """Random texts whose labels are functions of their tokens."""
    draw = np.random.default_rng(0)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, size in SIZES.items():
        texts = [draw.integers(1, 40, draw.integers(3, 8)).astype(np.int32) for _ in range(size)]
        label = {
            "tags": lambda x: {"labels": x % 3},
            "mood": lambda x: {"labels": np.int32(x[0] > 20)},
            "score": lambda x: {"values": np.float32(x.mean() / 20)},
        }[name]
        found[name] = [{"ids": x, "keep": np.ones(len(x), bool)} | label(x) for x in texts]
    return found


def proportions() -> list[list[str]]:
    """Rows of each task in 400 batches against what was asked for."""
    asked: dict[str, dict[str, Any]] = {
        "proportional": {},
        "temperature 2": {"temperature": 2.0},
        "fixed 1 : 2 : 5": {"weights": {"tags": 1, "mood": 2, "score": 5}},
    }
    rows = []
    for name, options in asked.items():
        wanted = mixing_weights(SIZES, **options)
        data = mixed_batches(examples(), batch=16, seed=0, lengths=(8,), **options)
        tasks = np.concatenate([next(data)["task"] for _ in range(400)])
        found = [float(np.mean(tasks == i)) for i in range(len(SIZES))]
        off = max(abs(f / w - 1) for f, w in zip(found, wanted.values(), strict=True))
        shares = [
            f"{100 * f:.2f} / {100 * w:.2f}" for f, w in zip(found, wanted.values(), strict=True)
        ]
        rows.append([name, *shares, f"{100 * off:.3f} %", "met" if off <= 0.01 else "missed"])
    return rows


def trains(way: str, precision: str, mesh: str) -> dict[str, Any]:
    """Twenty steps of one way to combine three tasks."""
    tasks: dict[str, Any] = {
        "tags": TokenClassification(("N", "V", "X"), output="tags"),
        "mood": TextClassification(("bad", "good"), output="mood"),
        "score": TextRegression(output="score"),
    }
    model = encoder(
        "bert-tiny", precision, layers=1, width=16, heads=2, vocabulary=40, context=8,
        task_heads=("tags=token:3", "mood=class:2", "score=class:1"),
    )  # fmt: skip
    mixture = Mixture(tasks, **WAYS[way])
    state, step = build(model, optax.adam(3e-3), mesh or None, objective=mixture.objective)
    data = mixed_batches(examples(), batch=16, seed=0, lengths=(8,))
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, next(data))
        losses.append([float(metrics[f"loss/{name}"]) for name in tasks])
    return {
        "first": sum(losses[0]), "last": sum(losses[-1]), "finite": bool(np.isfinite(losses).all()),
        "skipped": int(metrics["skipped"]), "programs": step.compiled._cache_size(),
    }  # fmt: skip


def main() -> bool:
    """Measures what is not measured yet and writes the page; whether every bar is met."""
    OUT.mkdir(parents=True, exist_ok=True)
    record, page = OUT / "cells.json", "--page" in sys.argv
    held = json.loads(record.read_text()) if record.exists() and "--fresh" not in sys.argv else {}
    cells: dict[str, dict[str, Any]] = held.get("cells", {})
    for cell in itertools.product(WAYS, PRECISIONS, MESHES):
        name = " | ".join(cell)
        if name not in cells and not page:
            cells[name] = trains(*cell)
            write_text(record, json.dumps({"cells": cells}, indent=1) + "\n")
            print(name, cells[name], flush=True)
    for name, tasks in EXPERIMENTS.items():
        if not page:
            command = [sys.executable, "experiments/multitask.py", "--tasks", *tasks]
            env = os.environ | {"XLA_FLAGS": ""}  # one device
            subprocess.run([*command, "--out", str(OUT / name)], cwd=ROOT, check=True, env=env)
    drawn = proportions()
    rows, met = [], all(row[-1] == "met" for row in drawn)
    for name, found in cells.items():
        good = found["finite"] and found["programs"] == 1 and found["last"] < found["first"]
        met &= good
        way, precision, mesh = name.split(" | ")
        losses = [f"{found[x]:.3f}" for x in ("first", "last")]
        verdict = "met" if good else "missed"
        rows.append([way, precision, mesh or "one device", *losses, str(found["skipped"]), verdict])
    heads = ["rows", *(f"{name}, % found / asked" for name in SIZES), "furthest off", "1 %"]
    body = "## Mixing\n\n" + table(heads, drawn)
    body += f"\n\n## {STEPS} steps, finite, falling, one program\n\n"
    columns = ["tasks combined by", "precision", "devices", "first loss", "last", "skipped", "bar"]
    body += table(columns, rows)
    for name in EXPERIMENTS:
        report = OUT / name / "report.md"
        if report.exists():
            text = report.read_text().replace("\n\n![loss](loss.png)\n", "")
            body += f"\n\n## {name.capitalize()}\n\n" + text.split("\n\n", 1)[1]
    write("multitask", "Several tasks at once, beside each alone", body)
    return met and len(cells) == len(WAYS) * len(PRECISIONS) * len(MESHES)


if __name__ == "__main__":
    sys.exit(not main())
