"""What mpjax computes and says, bit for bit: a change that should move nothing is checked with it.

Run:       python -m benchmarks.behaviour --write record.json    (before the change)
           python -m benchmarks.behaviour --against record.json  (after it)
Expected:  nothing moved; a part that moved is named, with its first differences.

    steps     every preset and family: losses of five steps and a checksum of the weights
    meshes    12 presets x 5 families x {one device, data=2,fsdp=2,tensor=2}: losses of 20 steps and
              a checksum of every array of the last state
    jaxprs    what autocast makes of the audit's planted and clean functions
    audits    what the audit says of them
    nonfinite what trace_nonfinite says of the planted faults, every fourth one
    greedy    what SmolLM2-135M writes, in float32, bfloat16 and with int8 weights

The bits hold for one machine and one version of JAX alone, so that the record is not committed.
Each entry is written as it comes; `--write` goes on where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax
import jax.numpy as jnp
import numpy as np

import mpjax
from common.datasets.assets import fetch
from mpjax.data import Tokenizer
from mpjax.files import write_text
from mpjax.models import (
    Decoder,
    decoder,
    encoder,
    generate,
    quantize_weights,
    recurrent,
    resnet,
    seq2seq,
)
from mpjax.models.hf import load_checkpoint, open_checkpoint
from mpjax.optim import make_optimizer
from mpjax.precision import get_precision, preset_names
from mpjax.tasks import TextClassification
from mpjax.train import build
from tests.interpret.audit.clean import CLEAN
from tests.interpret.audit.leaky import PLANTS
from tests.interpret.nonfinite.planted import Fault, grid

STEPS, N, T, V = 5, 8, 16, 64
SMALL = dict(vocabulary=V, layers=2, width=32, heads=4, context=T)
PRESETS = (
    "fp32", "bf16", "fp16", "low-bf16", "O2", "pure-bf16-sr", "adam8bit", "fp8", "fp8-delayed",
    "fp8-block", "mxfp4", "int8",
)  # fmt: skip
MESHES = ("", "data=2,fsdp=2,tensor=2")
PROMPTS = (
    "The capital of France is", "def fibonacci(n):", "Once upon a time, there was a",
    "Water boils at", "The three primary colours are", "1, 1, 2, 3, 5, 8,",
)  # fmt: skip


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
    kind = dict(norm="layer", position="learned", activation="gelu")
    return decoder("tiny", precision, **SMALL, **kind, bias=True, tied=True, dropout=0.1)


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


def trace(
    family: str, precision: Any, name: str, options: dict[str, Any], steps: int = STEPS
) -> tuple[list[str], Any]:
    """Returns the losses of some steps, and the last state."""
    make, batch = FAMILIES[family]
    decay = 0.1 if name == "adamw" else 0.0
    optimizer = make_optimizer(name, 1e-2, steps=steps, warmup=1, weight_decay=decay)
    if family == "encoder":
        options = options | {"objective": TextClassification(("a", "b", "c")).objective}
    state, step = build(make(precision), optimizer, **options)
    found = []
    for number in range(steps):
        state, metrics = step(state, batch(number))
        found.append(float(metrics["loss"]).hex())
    return found, state


def digest(tree: Any) -> str:
    """Returns a checksum of the arrays of a tree, whatever it calls them."""

    def bits(leaf: Any) -> bytes:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return f"{array.dtype}{array.shape}".encode() + array.tobytes()

    leaves = sorted(hashlib.sha256(bits(leaf)).digest() for leaf in jax.tree.leaves(tree))
    return hashlib.sha256(b"".join(leaves)).hexdigest()[:16]


def steps() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields a name, and what computes its entry: every preset and family for five steps."""

    def entry(*arm: Any) -> list[str]:
        losses, state = trace(*arm)
        return [*losses, digest(state.params)]

    for name, *arm in arms():
        yield name, functools.partial(entry, *arm)


def meshes() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields presets x families x meshes, trained for twenty steps."""

    def entry(family: str, preset: str, mesh: str) -> list[str]:
        options = {"mesh": mesh or None, "clip": 1.0}
        losses, state = trace(family, get_precision(preset), "adamw", options, 20)
        return [*losses, digest(state)]

    for family in ("llama", "encoder", "seq2seq", "lstm", "resnet"):
        for preset in PRESETS:
            for mesh in MESHES:
                name = f"{family} {preset} {mesh}".strip()
                yield name, functools.partial(entry, family, preset, mesh)


def plain(text: str) -> list[str]:
    """Returns the lines of a report without the addresses of objects and folders of files."""
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return re.sub(r"[\w./-]*/(\w+\.py)", r"\1", text).splitlines()


def alike(a: Any, b: Any) -> bool:
    """Returns whether two entries are the same but for lines of our own modules, which move."""
    own = re.compile(r"\b(?!leaky|clean|planted)\w+\.py:\d+ ")  # and what pads its column
    one, other = (
        [own.sub("", line).strip("─ ").split() for line in lines or ()] for lines in (a, b)
    )
    return one == other


def functions() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yields the audit's planted functions and clean models, with their arguments."""
    for name, plant in PLANTS.items():
        yield name, plant.fn, (plant.weights, *plant.data)
    for name, make in CLEAN.items():
        yield name, *make()


def jaxprs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields what autocast makes of functions."""

    def entry(fn: Any, args: tuple[Any, ...], precision: str) -> list[str]:
        return plain(str(jax.make_jaxpr(mpjax.autocast(fn, precision))(*args)))

    for name, fn, args in functions():
        for precision in ("bf16", "fp8"):
            yield f"{name} {precision}", functools.partial(entry, fn, args, precision)


def audits() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields what the audit says of functions."""

    def entry(fn: Any, args: tuple[Any, ...]) -> list[str]:
        return plain(str(mpjax.audit(fn, *args)))

    for name, fn, args in functions():
        yield name, functools.partial(entry, fn, args)


def nonfinite() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields what trace_nonfinite says of planted faults."""

    def entry(fault: Fault) -> list[str]:
        return plain(str(mpjax.trace_nonfinite(fault.step, *fault.arguments())))

    for fault in list(grid())[::4]:
        yield fault.name, functools.partial(entry, fault)


def greedy() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields what SmolLM2-135M writes after prompts, a token at a time."""

    def entry(precision: str, weights: str) -> list[str]:
        source = fetch("smollm2")
        tokenizer = Tokenizer.from_text(open_checkpoint(source).tokenizer_json() or "")
        model, params = load_checkpoint(source, get_precision(precision), loop="scan")
        assert isinstance(model, Decoder)
        if weights:
            params = quantize_weights(params, weights)
        texts = []
        for prompt in PROMPTS:
            ids = jnp.asarray([tokenizer.encode(prompt)], jnp.int32)
            out = generate(model, params, ids, new=24, temperature=0.0)
            texts.append(tokenizer.decode(np.asarray(out)[0].tolist()))
        return texts

    for precision, weights in (("fp32", ""), ("bf16", ""), ("bf16", "int8")):
        yield f"{precision} {weights}".strip(), functools.partial(entry, precision, weights)


PARTS = {f.__name__: f for f in (steps, meshes, jaxprs, audits, nonfinite, greedy)}


def main() -> int:
    """Writes the record, or compares with it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    options = parser.parse_args()
    if (options.write is None) == (options.against is None):
        parser.error("give --write FILE or --against FILE")
    path = options.write or options.against
    known = json.loads(path.read_text()) if path.exists() else {}
    count, moved = 0, []
    for part in options.part:
        for name, entry in PARTS[part]():
            key = f"{part}: {name}"
            if options.write and key in known:
                continue
            try:
                found = entry()
            except mpjax.errors.ConfigError as error:
                found = plain(str(error))
            count += 1
            if options.write:
                known[key] = found
                write_text(options.write, json.dumps(known, indent=1))
            elif not alike(known.get(key), found):
                moved.append(key)
                was = known.get(key) or []
                lines = [f"  - {a}\n  + {b}" for a, b in zip(was, found, strict=False) if a != b]
                print(f"MOVED {key}: {len(was)} lines, {len(found)} now", *lines[:3], sep="\n")
            print(f"{key}: {found[-1][:80] if found else ''}", flush=True)
            jax.clear_caches()
    print(f"{count} entries, {len(moved)} moved{': ' if moved else ''}{', '.join(moved)}")
    return bool(moved)


if __name__ == "__main__":
    sys.exit(main())
