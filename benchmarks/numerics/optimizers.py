"""Every optimizer of optax, wrapped: layers as weights of their own, donation, skipped steps.

Run:       python -m benchmarks.numerics.optimizers [--minutes 60] [--cache FILE]
Expected:  each optimizer that optax and optax.contrib export, found in optax itself, under each of
           six precisions, on a tree of one's own and on a decoder's, takes 20 steps with a donated
           state; in float32 the weights are those of plain optax on a tree whose layers were
           unstacked by hand, within 1e-6 of the largest number; a non-finite step leaves
           weights, moments and copies bit for bit. What needs other calls is listed with why.

Gradients are drawn, the same for both. What only scales (`scale_by_adam`) is chained with a
learning rate, as it is used. Results are kept in the cache as they come, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.common.page import ROOT, write
from mpjax.errors import ConfigError
from mpjax.markdown import table
from mpjax.models import decoder
from mpjax.optim import ScaledGradients, wrap
from mpjax.optim.per_layer.layer_view import LayerView
from mpjax.precision import get_precision
from mpjax.train import init_state

STEPS, BOUND, LAYERS = 20, 1e-6, 2
PRECISIONS = ("fp32", "fp16", "O2", "pure-bf16-sr", "pure-bf16-kahan", "adam8bit")
TREES = ("own", "decoder")
# What an argument without a default is given, by its name.
GIVEN: dict[str, Any] = {
    "learning_rate": 1e-2,
    "fast_optimizer": lambda: optax.sgd(1e-2),
    "base_optimizer": lambda: optax.sgd(1e-2),
    "opt": lambda: optax.adam(1e-2),
    "optimizer": lambda: optax.sgd(1e-2),
    "adv_optimizer": lambda: optax.sgd(1e-2),
    "inner": lambda: optax.adam(1e-2),
    "inner_factory": lambda: optax.adam,
    "decay": 0.9,
    "b1": 0.9,
    "max_norm": 1.0,
    "max_delta": 1.0,
    "threshold": 1.0,
    "clipping": 0.1,
    "max_norms": None,
    "step_size": -1e-2,
    "step_size_fn": lambda: lambda count: -1e-2,
    "eta": 0.01,
    "gamma": 0.55,
    "seed": 0,
    "key": 0,
    "k": 2,
    "every_k_schedule": 2,
    "max_consecutive_errors": 3,
    "mask": lambda: lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
    "transforms": lambda: {"a": optax.adam(1e-2), "b": optax.sgd(1e-2)},
    "param_labels": lambda: lambda p: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", p),
    "opts": lambda: {"a": optax.adam(1e-2), "b": optax.sgd(1e-2)},
    "args": lambda: (optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "f": lambda: lambda updates, params: updates,
    "should_transform_fn": lambda: lambda step, **kwargs: step % 2 == 0,
    "should_update_fn": lambda: lambda step, **kwargs: step % 2 == 0,
    "label_fn": lambda: lambda p: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", p),
    "tx": lambda: optax.adam(1e-2),
    "measure": lambda: lambda updates, *args, **kwargs: optax.global_norm(updates),
    "measure_name": "norm",
    "measures": lambda: {"norm": lambda updates, *args, **kwargs: optax.global_norm(updates)},
    "freeze_mask": lambda: lambda p: jax.tree.map(lambda x: x.ndim < 2, p),
}
# What this table does not run, and why.
OTHER: dict[str, str] = {
    "dpsgd": "wants a gradient of each example, with an axis in front",
    "differentially_private_aggregate": "as dpsgd",
    "lbfgs": "its line search wants the loss as a function; `build` gives it (tests/train)",
    "scale_by_zoom_linesearch": "as lbfgs",
    "scale_by_backtracking_linesearch": "as lbfgs",
    "scale_by_muon": "takes matrices alone; `contrib.muon` runs it on these",
    "lookahead": "wants params of optax's own pair type, fast and slow",
    "hutchinson_estimator_diag_hessian": "wants a Hessian-vector product of the loss",
    "measure_with_ema": "returns a measurement in place of updates; `monitor` keeps it beside them",
    "sophia": "wants the loss as a function of its own form",
}


def transformations() -> dict[str, Callable[..., Any]]:
    """What optax exports and returns a transformation, by name; found, not listed."""
    found = {}
    for module in (optax, optax.contrib):
        for name in sorted(dir(module)):
            value = getattr(module, name)
            if name.startswith("_") or not callable(value):
                continue
            if inspect.isclass(value) and not hasattr(value, "update"):
                continue
            try:
                returned = str(inspect.signature(value).return_annotation)
            except (TypeError, ValueError):
                continue
            like = "GradientTransformation" in returned or name == "MultiSteps"
            if inspect.isfunction(value) and value.__name__ in OTHER:
                like = True
            elif (
                inspect.isfunction(value) and "empty" in returned
            ):  # it does not say what it returns
                try:
                    like = isinstance(made(name, value), optax.GradientTransformation)
                except (KeyError, TypeError, ValueError, AttributeError):
                    like = False
            if like and not (inspect.isclass(value) and issubclass(value, tuple)):
                short = name if module is optax else f"contrib.{name}"
                found[short] = value
    return found


def made(name: str, value: Callable[..., Any]) -> Any:
    """An optimizer with the arguments that it cannot do without."""
    if name.startswith("inject_"):
        return value(optax.adam)(learning_rate=1e-2)
    args: list[Any] = []
    options: dict[str, Any] = {}
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += GIVEN["args"]() if name == "chain" else []
            continue
        wanted = (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        )
        if not wanted:
            continue
        given = GIVEN[parameter.name]
        given = given() if callable(given) else given
        options[parameter.name] = given
    if name == "named_chain":
        args = [("clip", optax.clip_by_global_norm(1.0)), ("adam", optax.adam(1e-2))]
    positional = [p for p in inspect.signature(value).parameters.values()
                  if p.kind is p.POSITIONAL_ONLY]  # fmt: skip
    args = [options.pop(p.name) for p in positional] + args
    transformation = value(*args, **options)
    known = inspect.signature(value).parameters
    if "scale_by_" in name and not {"learning_rate", "step_size", "step_size_fn"} & set(known):
        return optax.chain(transformation, optax.scale(-1e-2))  # alone it would go uphill, for good
    return transformation


def tree_of(kind: str, precision: str) -> Any:
    """Weights as stored: of one's own tree, or of a decoder."""
    if kind == "decoder":
        shape = dict(vocabulary=16, layers=LAYERS, width=8, heads=2, context=8)
        return decoder("tiny", precision, **shape).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    low = {"O2": jnp.float16, "pure-bf16-sr": jnp.bfloat16, "pure-bf16-kahan": jnp.bfloat16}

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), low.get(precision, jnp.float32))

    layers = {"kernel": draw(LAYERS, 4, 6), "scale": draw(LAYERS, 4)}
    return {"model": {"layers": layers, "embed": draw(4, 3), "bias": draw(3)}}


def unstacked(tree: Any) -> Any:
    """The tree with the layers of its one root in a list."""
    ((root, parts),) = tree.items()
    rest = {name: part for name, part in parts.items() if name != "layers"}
    layers = [jax.tree.map(lambda a, i=i: a[i], parts["layers"]) for i in range(LAYERS)]
    return {root: rest | {"layers": layers}}


def gradients(params: Any) -> list[Any]:
    """Float32 gradients of each step."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return [
        jax.tree.unflatten(structure, [rng.normal(size=x.shape).astype(np.float32) for x in leaves])
        for _ in range(STEPS)
    ]


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of arrays on the host are the same bit for bit."""
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def on_host(state: Any) -> Any:
    """Weights, moments and copies of a state, keys of random numbers as their data."""

    def leaf(x: Any) -> Any:
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    kept = (state.params, state.opt_state.inner, state.opt_state.update_state)
    return jax.tree.map(leaf, kept)


@functools.cache
def reference(name: str, kind: str) -> Any:
    """Weights after all steps of plain optax, layers unstacked by hand."""
    tx = optax.with_extra_args_support(made(name, transformations()[name]))
    params = tree_of(kind, "fp32")
    weights = unstacked(params)
    state = tx.init(weights)
    takes = inspect.signature(tx.update).parameters.values()
    extra = any(p.kind is p.VAR_KEYWORD for p in takes)

    @jax.jit
    def step(weights: Any, state: Any, grads: Any, value: Any) -> Any:
        more = {"value": value, "grad": grads} if extra else {}
        updates, state = tx.update(grads, state, weights, **more)
        return optax.apply_updates(weights, updates), state

    for i, grads in enumerate(gradients(params)):
        weights, state = step(weights, state, unstacked(grads), jnp.float32(3 - i / 10))
    return weights


def cell(name: str, kind: str, text: str) -> dict[str, Any]:
    """What one optimizer does under one precision on one tree."""
    optimizer = made(name, transformations()[name])
    params = tree_of(kind, text)
    try:
        opt = wrap(optimizer, get_precision(text))
        state = init_state(params, opt)
    except ConfigError as error:
        if "keeps none" in str(error):
            return {"result": "no moments"}
        raise
    grads = gradients(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, grads: Any, value: Any) -> Any:
        scaled = jax.tree.map(lambda g: g * state.opt_state.loss_scale.value, grads)
        params, opt_state = opt.step(
            ScaledGradients(scaled), state.opt_state, state.params, value=value
        )
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state)

    for i, each in enumerate(grads):
        state = step(state, each, jnp.float32(3 - i / 10))
    before = on_host(state)
    bad = jax.tree.map(lambda g: np.full_like(g, np.inf), grads[0])
    state = step(state, bad, jnp.float32(1))
    after = on_host(state)
    found: dict[str, Any] = {
        "result": "ran",
        "skip": same_bits(before, after) and int(state.opt_state.gate.skipped) == 1,
        "finite": all(bool(np.isfinite(np.float32(x)).all()) for x in jax.tree.leaves(before[0])),
        "kept": all(not x.is_deleted() for x in jax.tree.leaves(params)),
    }  # fmt: skip
    if text == "fp32":
        view = LayerView(optimizer if isinstance(optimizer, optax.GradientTransformation) else
                         optimizer.gradient_transformation(), ("**/layers",))  # fmt: skip
        found["view"] = view.plan(params, {}).mode
        right = reference(name, kind)
        size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(right))
        off = jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(a - b))), unstacked(state.params), right
        )
        found["off"] = max(jax.tree.leaves(off)) / max(size, 1.0)
    return found


def run(cache: Path, minutes: float) -> dict[str, Any]:
    """Fills the cache until all cells are there, or time is up."""
    done = json.loads(cache.read_text()) if cache.exists() else {}
    end = time.monotonic() + 60 * minutes
    names = [n for n in transformations() if n.removeprefix("contrib.") not in OTHER]
    pairs = [(kind, "fp32") for kind in TREES]
    pairs += [(kind, text) for kind in TREES for text in PRECISIONS if text != "fp32"]
    for kind, text in pairs:
        for name in names:
            key = f"{name} {text} {kind}"
            if key in done or time.monotonic() > end:
                continue
            try:
                done[key] = cell(name, kind, text)
            except Exception as error:  # a cell that fails is a result
                done[key] = {"result": "FAILED", "why": f"{type(error).__name__}: {error}"[:300]}
            print(key, done[key], flush=True)
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(json.dumps(done))
        reference.cache_clear()
        jax.clear_caches()
    return done


def draws(name: str) -> bool:
    """Whether it adds noise of its own, whose draws differ with the tree."""
    return name.removeprefix("contrib.") in ("add_noise", "noisy_sgd")


def page(done: dict[str, Any]) -> bool:
    """Writes the page; whether the bars are met."""
    names = [n for n in transformations() if n.removeprefix("contrib.") not in OTHER]
    rows, wrong, missing = [], [], 0
    for name in names:
        off, marks = [], {}
        for text in PRECISIONS:
            cells = [done.get(f"{name} {text} {kind}") for kind in TREES]
            missing += cells.count(None)
            for kind, found in zip(TREES, cells, strict=True):
                if found is None or found["result"] == "no moments":
                    continue
                bad = [k for k in ("skip", "finite", "kept") if not found.get(k)]
                far = found.get("off", 0.0) > BOUND and not draws(name)
                if found["result"] == "FAILED" or bad or far:
                    why = found.get("why") or ", ".join(bad + ["off"] * far)
                    wrong.append(f"- `{name}` {text}, {kind}: {why}")
            results = [c["result"] if c else "not run" for c in cells]
            short = {"ran": "x", "no moments": "–", "FAILED": "FAILED", "not run": "?"}
            marks[text] = " ".join(dict.fromkeys(short[r] for r in results))
            off += [c["off"] for c in cells if c and "off" in c]
        views = {
            c["view"] for kind in TREES if (c := done.get(f"{name} fp32 {kind}")) and "view" in c
        }
        worst = "random" if draws(name) else f"{max(off):.1e}" if off else "?"
        rows.append((f"`{name}`", ", ".join(sorted(views)), worst, *marks.values()))
    count = len(names) * len(PRECISIONS) * len(TREES)
    ran = sum(found["result"] == "ran" for found in done.values())
    met = not wrong and not missing
    rest = [(f"`{n}`", OTHER[n.removeprefix("contrib.")]) for n in transformations()
            if n.removeprefix("contrib.") in OTHER]  # fmt: skip
    head = ("transformation", "sees layers as", "off from per layer", *PRECISIONS)
    body = (
        f"{len(names)} transformations x {len(PRECISIONS)} precisions x {len(TREES)} trees: {count}"
        f" cells, {missing} of them not run; {ran} took {STEPS} steps with a donated state, kept"
        " the caller's weights, stayed finite and left all bits at a non-finite step; the others"
        " keep no moments to store in 8 bits (–), which is said in one line. Column"
        " `sees layers as`: whole, the stack as it is, where the update is number by number; each,"
        " `vmap` over the"
        " layers; leaves, a leaf for each layer. `off`: the largest difference from plain optax on"
        " a tree unstacked by hand, in float32, relative to the largest weight; the bar is"
        f" {BOUND:g}. Bars: {'met' if met else 'MISSED'}.\n\n{table(head, rows)}\n\n"
        + ("Wrong:\n" + "\n".join(wrong) + "\n\n" if wrong else "")
        + f"Not in the table:\n\n{table(('transformation', 'why'), rest)}"
    )
    write("optimizers", "Every optimizer of optax", body)
    return met


def main() -> bool:
    """Runs what is not in the cache and writes the page; whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "optimizers.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    jax.config.update("jax_disable_most_optimizations", True)  # what is computed is not about speed
    return page(run(options.cache, options.minutes))


if __name__ == "__main__":
    sys.exit(not main())
