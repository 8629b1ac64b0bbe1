"""Products of two arrays in all orders of their dimensions, under every recipe, on a CPU.

Run:       python -m benchmarks.numerics.layouts [--minutes 60] [--jobs 2] [--cache FILE]
Expected:  nothing crashes; bfloat16 products within 1 % of float64, recipes within their formats'
           error (3 % int8 and 16 bits, 15 % fp8, 50 to 60 % fp4).

An order names each axis of either operand: batch, contracting or free. There are 2609 orders of
operands of up to four axes that differ by more than names; sizes are 1 to 3. Each is run as the
product that recipes emulate in (bfloat16, where the CPU's gaps are), and under recipes, with the
transforms jit, vmap (over the last axis of the right operand), vmap of vmap (the outer over both
operands, the inner over the left) and grad (both gradients). What LLVM does is left out, and what
XLA puts around a product is in its older, simpler code where this jaxlib has that; neither touches
products. All of it takes five hours of a core, nearly all of them to trace and to compile. Results
are kept in the cache as they come, and a later run goes on:
first the product in bfloat16, then 88 rounds, in each of which a recipe takes every 88th order, its
neighbour the next ones, so that eight rounds meet every order under one recipe or another.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from benchmarks.common.page import ROOT, table, write
from mpjax.files import write_text
from mpjax.ops.dot import dot
from mpjax.precision import recipe_names
from tests.compiling import plain_code
from tests.ops import layouts

TOGETHER = 30  # orders in one program
ROUNDS = 88
PLAIN = "bfloat16"
RECIPES = (*recipe_names(), "fixed-q8.8")


def product(name: str) -> Any:
    """Dimension numbers -> a product; of bfloat16 the one that recipes emulate in."""
    if name != PLAIN:
        return layouts.by_recipe(name)
    return lambda dims: lambda a, b: dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dims)


def transforms(name: str) -> tuple[str, ...]:
    """What is run; a product alone is never differentiated."""
    return layouts.TRANSFORMS[:3] if name == PLAIN else layouts.TRANSFORMS


def bar(name: str) -> float:
    """The largest error that is let pass."""
    return 0.01 if name == PLAIN else layouts.bar(name)


def rounds(pairs: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """A product's name and the orders that it takes, until all have been taken."""
    yield PLAIN, pairs
    for turn in range(ROUNDS):
        for number, name in enumerate(RECIPES):  # each recipe meets each remainder in one round
            first = turn * len(RECIPES) + number + turn * len(RECIPES) // ROUNDS
            yield name, pairs[first % ROUNDS :: ROUNDS]


def compiled(name: str, pairs: list[Any]) -> list[float] | str:
    """The error of each order, or what the backend said."""
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles sooner
    chosen = [transforms(name)] * len(pairs)
    try:
        return list(layouts.errors(pairs, product(name), chosen, options=plain_code()))
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0][:200]
    finally:
        jax.clear_caches()


class Child:
    """A process that compiles, because a compiler may end its own."""

    def __init__(self) -> None:
        self.pool = self.fresh()

    def fresh(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=20)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def measured(self, name: str, pairs: list[Any]) -> list[float | str]:
        """The error of each order, or what became of it."""
        try:
            found = self.pool.submit(compiled, name, pairs).result()
        except BrokenProcessPool:
            self.pool, found = self.fresh(), "the compiler ended the process"
        if not isinstance(found, str):
            return list(found)
        if len(pairs) == 1:
            return [found]
        half = len(pairs) // 2
        return self.measured(name, pairs[:half]) + self.measured(name, pairs[half:])


def run(cache: Path, minutes: float, jobs: int) -> dict[str, dict[str, float | str]]:
    """Measures what the cache lacks; product -> order -> result."""
    kept: dict[str, dict[str, float | str]] = {}
    if cache.exists():
        kept = json.loads(cache.read_text())
    cache.parent.mkdir(parents=True, exist_ok=True)
    end, taken, lock = time.monotonic() + 60 * minutes, lacking(kept), threading.Lock()

    def work(_: int) -> None:
        with Child() as child:
            while time.monotonic() < end:
                with lock:
                    name, some = next(taken, (PLAIN, []))
                if not some:
                    return
                found = child.measured(name, some)
                with lock:
                    kept[name].update(zip(map(layouts.spelled, some), found, strict=True))
                    write_text(cache, json.dumps(kept))  # a run that is stopped loses nothing
                    print(name, len(kept[name]), file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(jobs)))
    return kept


def lacking(kept: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """What is left to measure, in programs of a few orders."""
    for name, pairs in rounds(layouts.orders(4)):
        done = kept.setdefault(name, {})
        left = [pair for pair in pairs if layouts.spelled(pair) not in done]
        for start in range(0, len(left), TOGETHER):
            yield name, left[start : start + TOGETHER]


def page(kept: dict[str, dict[str, float | str]]) -> bool:
    """Writes the page; whether every bar is met."""
    rows, missed, whole = [], [], len(layouts.orders(4))
    for name in (PLAIN, *RECIPES):
        found = kept.get(name, {})
        bad = {o: e for o, e in found.items() if isinstance(e, str) or not e <= bar(name)}
        errors = [e for e in found.values() if not isinstance(e, str)]
        worst = f"{max(errors):.1e}" if errors else ""
        rows.append(
            [name, f"{len(found)} of {whole}", len(transforms(name)) * len(found), worst,
             f"{bar(name):g}", len(bad)]
        )  # fmt: skip
        missed += [f"{name} {o}: {e if isinstance(e, str) else f'{e:.2g}'}" for o, e in bad.items()]
    count = sum(len(kept.get(name, {})) for name in RECIPES)
    body = (__doc__ or "").split("\n\nRun:")[0] + "\n\n" + (__doc__ or "").split("fp4).\n\n")[1]
    body += (
        f"\nSo far {count} of {whole * len(RECIPES)} pairs of an order and a recipe, each under all"
        f" {len(layouts.TRANSFORMS)} transforms.\n\n"
    )
    body += table(["product", "orders", "runs", "largest error", "bar", "missed"], rows)
    body += "\n\n" + ("Missed:\n\n- " + "\n- ".join(missed) if missed else "No run misses its bar.")
    write("layouts", "Products in all orders of their dimensions", body)
    return not missed


def main() -> bool:
    """Measures and writes the page; whether every bar is met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "layouts.json")
    options = parser.parse_args()
    return page(run(options.cache, options.minutes, options.jobs))


if __name__ == "__main__":
    sys.exit(not main())
