"""What autocast costs against the same casts by hand: casts, memory, step time, tracing time.

Run:       python -m benchmarks.cost.autocast_cost
Expected:  the same products and no more casts than the twin's, temporaries at most 1.02 and step
           time at most 1.01 times the twin's; tracing a gradient at most 1.5 times as long as
           without it, tracing a loss alone about twice: reading the traced program again, by JAX's
           own `eval_jaxpr`, is half of a tracing already.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from benchmarks.common.page import write
from mpjax.interpret import autocast
from mpjax.markdown import table
from tests.interpret.autocast import twins

ROUNDS = 60


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios and its 95 % bootstrap interval."""
    pairs = np.array(ours) / np.array(theirs)
    draws = np.median(np.random.default_rng(0).choice(pairs, (4000, len(pairs))), axis=1)
    low, high = map(float, np.percentile(draws, [2.5, 97.5]))
    return float(np.median(pairs)), low, high


def read_again(size: twins.Size) -> object:
    """The plain loss, traced and evaluated from its jaxpr by JAX itself, which changes nothing."""
    plain = twins.plain(size)

    def loss(params: object, ids: object) -> object:
        closed = jax.make_jaxpr(plain)(params, ids)
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves((params, ids)))[0]

    return loss


def tracing(size: twins.Size, derive: object, fresh: bool) -> list[tuple[float, ...]]:
    """Seconds to trace: plain, by autocast, the twin, read again; all caches cold if fresh."""
    params, ids = twins.init(size), twins.batch(size)
    found = []
    for _ in range(ROUNDS // 2):
        row = []
        for make in (
            twins.plain, lambda s: autocast(twins.plain(s), "bf16"), twins.by_hand, read_again
        ):  # fmt: skip
            if fresh:
                jax.clear_caches()
            gc.collect()  # what one leaves is not the next one's to clear away
            start = time.perf_counter()
            jax.make_jaxpr(derive(make(size)))(params, ids)  # type: ignore[operator]
            row.append(time.perf_counter() - start)
        found.append(tuple(row))
    return found


def main() -> bool:
    """Measures and writes the page; whether every bar is met."""
    small, real = twins.Size(), twins.Size(6, 256, 8, 1024, 4, 128)
    params, ids = twins.init(real), twins.batch(real)
    steps = [
        jax.jit(jax.value_and_grad(f)).lower(params, ids).compile()
        for f in (autocast(twins.plain(real), "bf16"), twins.by_hand(real))
    ]
    analyses: list[Any] = [step.memory_analysis() for step in steps]
    memory = [found.temp_size_in_bytes for found in analyses]
    counted = [
        twins.counts(jax.grad(f), params, ids)
        for f in (autocast(twins.plain(real), "bf16"), twins.by_hand(real))
    ]
    products = [{k: n for k, n in c.items() if k != "casts"} for c in counted]
    times: list[list[float]] = [[], []]
    for turn in range(ROUNDS):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            jax.block_until_ready(steps[which](params, ids))
            times[which].append(time.perf_counter() - start)
    middle, low, high = ratio(*times)
    rows = [
        ("products of the gradient", products[0] == products[1], products[0], products[1]),
        ("casts of the gradient", counted[0]["casts"] <= counted[1]["casts"],
         counted[0]["casts"], counted[1]["casts"]),
        ("compiled temporaries / twin's", memory[0] / memory[1] <= 1.02,
         f"{memory[0] / memory[1]:.4f}", "1.02"),
        (f"step time / twin's, {ROUNDS} pairs", middle <= 1.01,
         f"{middle:.3f} [{low:.3f}, {high:.3f}]", "1.01"),
    ]  # fmt: skip
    for name, derive in (("loss", lambda f: f), ("gradient", jax.grad)):
        for fresh in (True, False):
            plain, auto, twin, again = (
                list(t) for t in zip(*tracing(small, derive, fresh), strict=True)
            )
            middle, low, high = ratio(auto, plain)
            rows.append((
                f"tracing time / without autocast, {name}, "
                + ("empty caches" if fresh else "caches warm"),
                middle <= 1.5,
                f"{middle:.2f} [{low:.2f}, {high:.2f}] (by hand {ratio(twin, plain)[0]:.2f}, read"
                f" again by `eval_jaxpr` {ratio(again, plain)[0]:.2f})",
                "1.5",
            ))  # fmt: skip
    found = [(name, value, bar, "met" if met else "MISSED") for name, met, value, bar in rows]
    body = (
        f"Step: {real}. Tracing: {small}, unrolled. The twin is"
        " tests/interpret/autocast/twins.py, the same model with its casts by hand; numbers are"
        " equal bit for bit. JAX keeps the derivatives of its own functions from one tracing to the"
        " next, so tracing with warm caches costs less than in a new process; both are shown.\n\n"
    )
    write("autocast_cost", "What autocast costs", body + table(("what", "value", "bar", ""), found))
    return all(met for _, met, _, _ in rows)


if __name__ == "__main__":
    sys.exit(not main())
