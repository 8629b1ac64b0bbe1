"""Training traces, bit for bit: what a change that should not move a number is checked against.

Run:       python tests/evidence/traces.py --write traces.json    (before the change)
           python tests/evidence/traces.py --against traces.json  (after it)
Expected:  every arm has the same bits; an arm that moved is named with its first losses.

An arm is a model, a Precision and an optimizer, trained for a few steps on fixed random tokens. Its
trace is the losses as hexadecimal numbers and a checksum of all weights at the end. The bits hold
for one machine and one version of JAX alone, so that the file is written anew and not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mpjax.models import decoder, encoder, recurrent, resnet, seq2seq  # noqa: E402
from mpjax.optim import make_optimizer  # noqa: E402
from mpjax.precision import get_precision, preset_names  # noqa: E402
from mpjax.tasks import TextClassification  # noqa: E402
from mpjax.train import build  # noqa: E402

STEPS, N, T, V = 5, 4, 16, 64
SMALL = dict(vocabulary=V, layers=2, width=32, heads=4, context=T)


def _tokens(seed: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (N, T + 1)), jnp.int32)


def _language(seed: int) -> dict[str, Any]:
    ids = _tokens(seed)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def _labelled(seed: int) -> dict[str, Any]:
    ids = _tokens(seed)[:, :-1]
    return {"ids": ids, "labels": ids[:, 0] % 3}


def _pairs(seed: int) -> dict[str, Any]:
    ids = _tokens(seed)
    return {"source": ids[:, 1:], "inputs": ids[:, :-1], "targets": ids[:, 1:]}


def _images(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(N, 8, 8, 1)), jnp.float32)
    return {"inputs": images, "targets": jnp.asarray(rng.integers(0, 10, N), jnp.int32)}


def _gpt(precision: Any) -> Any:
    kind = dict(norm="layer", position="learned", activation="gelu", bias=True, tied=True)
    return decoder("tiny", precision, **SMALL, **kind, dropout=0.1)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (lambda p: decoder("tiny", p, **SMALL), _language),
    "gpt": (_gpt, _language),
    "encoder": (
        lambda p: encoder("bert-tiny", p, **SMALL, head="class", classes=3),
        _labelled,
    ),
    "seq2seq": (lambda p: seq2seq("seq2seq-tiny", p, vocabulary=V, width=32, heads=4), _pairs),
    "lstm": (lambda p: recurrent("tiny", p, vocabulary=V, width=32, cell="lstm"), _language),
    "gru": (lambda p: recurrent("tiny", p, vocabulary=V, width=32, cell="gru"), _language),
    "resnet": (lambda p: resnet("tiny", p), _images),
}


def arms() -> Iterator[tuple[str, str, Any, str, dict[str, Any]]]:
    """Yields name, family, Precision, optimizer and options of `build`."""
    for preset in preset_names():
        yield f"llama {preset}", "llama", get_precision(preset), "adamw", {"clip": 1.0}
    for family in FAMILIES:
        for preset in ("fp32", "bf16", "fp16"):
            if (family, preset) != ("llama", preset):
                yield f"{family} {preset}", family, get_precision(preset), "adamw", {}
    for optimizer in ("sgd", "lion", "adafactor"):
        yield f"llama bf16 {optimizer}", "llama", get_precision("bf16"), optimizer, {}
    yield "llama bf16 accumulate", "llama", get_precision("bf16"), "adamw", {"accumulate": 2}
    yield "llama fp32 ungated", "llama", get_precision("fp32"), "adamw", {"gate": False}
    hot = get_precision("fp16", loss_scale="dynamic:init=16777216,interval=2")
    yield "llama fp16 skips", "llama", hot, "sgd", {"clip": 1.0}


def trace(family: str, precision: Any, name: str, options: dict[str, Any]) -> list[str]:
    """Returns the losses, and a checksum of the weights, of a few steps."""
    make, batch = FAMILIES[family]
    decay = 0.1 if name == "adamw" else 0.0
    optimizer = make_optimizer(name, 1e-2, steps=STEPS, warmup=1, weight_decay=decay)
    if family == "encoder":
        options = options | {"objective": TextClassification(("a", "b", "c")).objective}
    state, step = build(make(precision), optimizer, **options)
    found = []
    for number in range(STEPS):
        state, metrics = step(state, batch(number))
        found.append(float(metrics["loss"]).hex())
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state.params):
        total.update(np.asarray(leaf).tobytes())
    return [*found, total.hexdigest()[:16]]


def main() -> int:
    """Writes the traces, or compares them with those of a file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    if (given.write is None) == (given.against is None):
        parser.error("give --write FILE or --against FILE")
    known = json.loads(given.against.read_text()) if given.against else {}
    found, moved = {}, []
    for name, *arm in arms():
        found[name] = trace(*arm)
        if known and known.get(name) != found[name]:
            moved.append(name)
            print(f"MOVED {name}: {known.get(name)} -> {found[name]}", flush=True)
        else:
            print(f"{name}: {float.fromhex(found[name][-2]):.6f}", flush=True)
    if given.write:
        given.write.write_text(json.dumps(found, indent=1))
    print(f"{len(found)} arms, {len(moved)} moved{': ' if moved else ''}{', '.join(moved)}")
    return bool(moved)


if __name__ == "__main__":
    sys.exit(main())
