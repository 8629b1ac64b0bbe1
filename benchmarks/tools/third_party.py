"""Models of other people, unmodified, under autocast, audit, monitor and trace_nonfinite.

Run:       pip install equinox dm-haiku diffrax optimistix flowjax jraph einops 'transformers<5'
           python -m benchmarks.tools.third_party --examples FOLDER
Expected:  at least 25 models x bf16, fp16, r=fp8, r=mxfp8, r=int8: each of the four tools runs;
           loss and gradient are within the bar of float32's; float32 products are none, or named
           as leaks.

FOLDER holds the repositories of the examples, see `third_party_models`; `--save FILE` keeps what
was measured, so that a run that was stopped goes on.

The bar of an arm is set by its format, and by what a model does to any such rounding. A control
computes in float32 from weights and inputs that are rounded to the format. A product under autocast
rounds its other operand too, its result, and in the gradient the cotangent: four independent
roundings of the size of the control's one, together twice as large. So an error may be twice the
control's, plus the unit roundoff of an operand for the loss, and two of a cotangent for the
gradient. The first model showed that one control is too few: with a batch of 2, a single relu that
flips moves the gradient by 13 % (float16 and noise of 2^-8 on the inputs did so, rounding to
bfloat16 by chance did not). The control is therefore the worst of four: rounded to nearest, and
three with noise of the size of a rounding. A bar near 100 % says that the gradient of so small a
model is not determined at that precision, in float32 either.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Else XLA leaves out some of the roundings that the program asks for.
os.environ["XLA_FLAGS"] = "--xla_allow_excess_precision=false"

import jax
import jax.numpy as jnp
import numpy as np

import mpjax
from benchmarks.common.page import write
from benchmarks.tools.third_party_models import COMMITS, MODELS, Built, Decoder
from mpjax.markdown import table

# Of each arm: rules, format and scaling of the control, unit roundoff of an operand and of a
# cotangent (e5m2 in fp8). int8 by row: half a step of 1/127 of the largest of a row, which is about
# three times its root mean square.
ARMS: dict[str, tuple[list[str], str, str, float, float]] = {
    "bf16": ([], "bfloat16", "", 2.0**-8, 2.0**-8),
    "fp16": ([], "float16", "", 2.0**-11, 2.0**-11),
    "r=fp8": (["**=r=fp8"], "e4m3", "tensor", 2.0**-4, 2.0**-3),
    "r=mxfp8": (["**=r=mxfp8"], "e4m3", "mx(32)", 2.0**-4, 2.0**-4),
    "r=int8": (["**=r=int8"], "int8", "row", 2.0**-6, 2.0**-6),
}
ENOUGH = 25


def rounded(tree: Any, arm: str) -> Any:
    """Weights or inputs in the format of an arm, as float32."""
    _, form, scaling, *_ = ARMS[arm]

    def one(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
            return x
        if not scaling or x.ndim < 2:
            low = jnp.float16 if arm == "fp16" else jnp.bfloat16
            return x.astype(low).astype(jnp.float32)
        rows = x.reshape(-1, x.shape[-1])
        return mpjax.quantize(rows, form, scaling=scaling).dequantize().reshape(x.shape)

    return jax.tree.map(one, tree)


def noisy(tree: Any, u: float, seed: int) -> Any:
    """Weights and inputs, each number off by as much as a rounding is, at random."""
    random = np.random.default_rng(seed)

    def one(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x * (1 + u * random.uniform(-1, 1, x.shape).astype(np.float32))

    return jax.tree.map(one, tree)


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree in float64."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def distance(found: Any, exact: Any) -> float:
    """Norm of the difference over norm."""
    a, b = flat(found), flat(exact)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def attempt(call: Callable[[], Any]) -> tuple[str, Any]:
    """What a tool gave; or the first line of its error."""
    try:
        return "", call()
    except Exception as error:  # whatever a model makes a tool raise is what is looked for
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:160]}", None


def measure(built: Built, exact: Any, arm: str) -> dict[str, Any]:
    """One model in one arm."""
    rules, _, _, u, cotangent = ARMS[arm]
    base = "fp16" if arm == "fp16" else "bf16"
    run, (loss32, grad32) = exact
    low = mpjax.autocast(built.loss, base, rules=rules, key=jax.random.key(7))
    both = jax.value_and_grad(low)
    given = (built.weights, built.batch)
    controls = [run(rounded(built.weights, arm), rounded(built.batch, arm))]
    controls += [run(*noisy(given, u, seed)) for seed in range(3)]
    moved = [max(distance(c[i], exact[1][i]) for c in controls) for i in (0, 1)]
    found: dict[str, Any] = {"errors": {}}

    def tried(tool: str, call: Callable[[], Any]) -> Any:
        error, result = attempt(call)
        if error:
            found["errors"][tool] = error
        return result

    if got := tried("autocast", lambda: jax.block_until_ready(jax.jit(both)(*given))):
        found["loss"] = (distance(got[0], loss32), 2 * moved[0] + u)
        found["gradient"] = (distance(got[1], grad32), 2 * moved[1] + 2 * cotangent)
    if report := tried("audit", lambda: mpjax.audit(both, *given)):
        wide = report.share("float32") + report.share("float64")
        leaks = (*report.leaks, *report.minor)
        found["wide"], found["named"] = wide, min(sum(leak.share for leak in leaks), 1.0)
        found["leaks"] = [leak.mechanism for leak in report.leaks]
    watched = mpjax.monitor(low, what=("activations",), formats=("e4m3",))
    if got := tried("monitor", lambda: jax.jit(watched)(*given)):
        if "loss" in found:
            found["same"] = distance(got[0], loss32) <= found["loss"][1]
    fault = tried("trace_nonfinite", lambda: (mpjax.trace_nonfinite(low, *given),))
    found["finite"] = fault is not None and fault[0] is None
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """What of a model and an arm misses its bar."""
    missed = [f"{tool}: {error}" for tool, error in found["errors"].items()]
    for name in ("loss", "gradient"):
        if name in found and not found[name][0] <= found[name][1]:
            missed.append(f"{name} off by {found[name][0]:.2%}, bar {found[name][1]:.2%}")
    if "wide" in found and found["wide"] > found["named"] + 0.001:
        missed.append(f"{found['wide']:.1%} in float32, {found['named']:.1%} named by audit")
    if not found.get("same", True):
        missed.append("monitor changes the loss")
    if "trace_nonfinite" not in found["errors"] and not found["finite"]:
        missed.append("trace_nonfinite reports a fault of a finite model")
    return missed


def one(
    model: Decoder, at: Path, arms: list[str], saved: dict[str, Any], keep: Callable[[], object]
) -> None:
    """A model in those arms that were not measured before; `keep` after each."""
    left = [arm for arm in arms if f"{model.name}|{arm}" not in saved]
    if not left:
        return
    error, built = attempt(lambda: model.build(at))
    if error:
        saved |= {
            f"{model.name}|{arm}": {"errors": {"build": error}, "finite": False} for arm in left
        }
        return
    run = jax.jit(jax.value_and_grad(built.loss))
    error, plain = attempt(lambda: run(built.weights, built.batch))
    if error:
        print(model.package, model.name, "does not run by itself:", error, flush=True)
        return
    exact = run, plain
    for arm in left:
        begin = time.perf_counter()
        saved[f"{model.name}|{arm}"] = found = measure(built, exact, arm)
        seconds = time.perf_counter() - begin
        print(
            model.package, model.name, arm, failures(found) or "ok", f"{seconds:.0f} s", flush=True
        )
        keep()


def row(model: Decoder, arms: list[str], saved: dict[str, Any]) -> tuple[object, ...]:
    """A row of the page."""
    cells: list[str] = []
    for arm in arms:
        found = saved[f"{model.name}|{arm}"]
        if "loss" not in found:
            cells.append("fails")
            continue
        (loss, _), (gradient, bar) = found["loss"], found["gradient"]
        leaks = f", {', '.join(sorted(set(found['leaks'])))}" if found.get("leaks") else ""
        mark = " **missed**" if failures(found) else ""
        cells.append(
            f"{loss:.2%} / {gradient:.2%} of {bar:.2%}; {found.get('wide', 1):.1%}{leaks}{mark}"
        )
    origin = f"{model.source} examples" if model.source else "package"
    return (
        model.name,
        f"{model.package} {importlib.metadata.version(model.package)}",
        origin,
        *cells,
    )


def main() -> bool:
    """Measures all; whether the bars are met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the models' own
    logging.disable(logging.WARNING)
    jax.config.update("jax_disable_most_optimizations", True)
    saved: dict[str, Any] = {}
    if options.save and options.save.exists():
        saved = json.loads(options.save.read_text())
    models = [m for m in MODELS if not options.only or any(word in m.name for word in options.only)]

    def keep() -> None:
        if options.save:
            options.save.write_text(json.dumps(saved))

    for model in models:
        one(model, options.examples, options.arms, saved, keep)
        keep()
        jax.clear_caches()
    if options.only or options.arms != list(ARMS):
        return True
    missed = [
        f"- {model.name}, {arm}: {'; '.join(failures(saved[f'{model.name}|{arm}']))}"
        for model in models
        for arm in ARMS
        if failures(saved[f"{model.name}|{arm}"])
    ]
    clean = sum(not any(failures(saved[f"{model.name}|{arm}"]) for arm in ARMS) for model in models)
    met = clean >= ENOUGH and not missed
    head = ("model", "package", "from", *ARMS)
    text = (
        f"{len(models)} models, tiny, each with a loss of its own; weights and inputs float32,"
        " random. A cell: relative error of loss / of gradient against float32, of the gradient's"
        " bar (see the script: twice what float32 does from rounded or noisy weights and inputs,"
        " plus two unit roundoffs); then the share of product FLOPs that `audit` finds in float32,"
        " with the kinds of leaks that it names. `monitor` runs on the loss and must not move it,"
        " `trace_nonfinite` must find nothing. Examples at"
        f" {', '.join(f'{name} {commit}' for name, commit in COMMITS.items())}. The bar of the"
        " gradient was revised once, after the first models and before the others: one control"
        " became the worst of four."
        f"\n\nBars: at least {ENOUGH} models in all arms and none that misses: {clean} of"
        f" {len(models)} models in all arms; {'met' if met else 'MISSED'}."
    )
    lists = "\n".join(missed)
    body = f"{text}\n\n{table(head, [row(m, list(ARMS), saved) for m in models])}\n"
    write(
        "third_party",
        "Models of others, unmodified, in five precisions",
        body + (f"\nMissed:\n\n{lists}\n" if missed else ""),
        command="python -m benchmarks.tools.third_party --examples FOLDER",
    )
    return met


if __name__ == "__main__":
    sys.exit(not main())
