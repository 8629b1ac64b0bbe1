"""Products of two arrays in all orders of their dimensions, under every recipe, on a CPU.

Run:       python -m benchmarks.numerics.layouts [--minutes 60] [--jobs 2] [--fresh]
Expected:  nothing crashes; bfloat16 products within 1 % of float64, recipes within their formats'
           error (3 % int8 and 16 bits, 15 % fp8, 50 to 60 % fp4).

An order names each axis of either operand: batch, contracting or free. There are 2609 orders of
operands of up to four axes that differ by more than names; sizes are 1 to 3. Each is run as the
product that recipes emulate in (bfloat16, where the CPU's gaps are), and under recipes, with the
transforms jit, vmap (over the last axis of the right operand), vmap of vmap (the outer over both
operands, the inner over the left) and grad (both gradients). What LLVM does is left out, and what
XLA puts around a product is in its older, simpler code where this jaxlib has that; neither touches
products. All of it takes five hours of a core, nearly all of them to trace and to compile. What
has been run stands in layouts.json beside the page, and a later run goes on (`--fresh` begins
anew): first the product in bfloat16, then 88 rounds, in each of which a recipe takes every 88th
order, its neighbour the next ones, so that eight rounds meet every order under one recipe or
another.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from benchmarks.common.page import ROOT, commit, write
from mpjax.files import write_text
from mpjax.markdown import table
from mpjax.ops.products.dot import dot
from mpjax.precision import recipe_names
from tests.compiling import plain_code
from tests.ops import layouts

TOGETHER = 30  # orders in one program
ROUNDS = 88
PLAIN = "bfloat16"
RECIPES = (*recipe_names(), "fixed-q8.8")
STORE = ROOT / "docs" / "evidence" / "layouts.json"


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


@dataclasses.dataclass
class Record:
    """What has been run of a product.

    Args:
      done: bit i is order i of `layouts.orders(4)`.
      largest: error of those that ran.
      missed: order -> its error beyond the bar, or what became of it.
    """

    done: int = 0
    largest: float = 0.0
    missed: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, orders: dict[int, Any], found: list[float | str], bar: float) -> None:
        """Notes results of orders by their number."""
        for (number, pair), error in zip(orders.items(), found, strict=True):
            self.done |= 1 << number
            if isinstance(error, str):
                self.missed[layouts.spelled(pair)] = error
                continue
            self.largest = max(self.largest, error)
            if not error <= bar:
                self.missed[layouts.spelled(pair)] = f"{error:.2g}"


def read(path: Path) -> tuple[dict[str, Record], list[str]]:
    """The records of all products, and at which commits they were run."""
    records = {name: Record() for name in (PLAIN, *RECIPES)}
    if not path.exists():
        return records, []
    stored = json.loads(path.read_text())
    for name, one in stored["products"].items():
        records[name] = Record(int(one["done"], 16), one["largest"], one["missed"])
    return records, stored["commits"]


def text(records: dict[str, Record], commits: list[str]) -> str:
    """What `read` reads."""
    products = {
        name: {"done": f"{one.done:x}", "largest": one.largest, "missed": one.missed}
        for name, one in records.items()
    }
    return json.dumps({"commits": commits, "products": products}, indent=1) + "\n"


def run(records: dict[str, Record], commits: list[str], minutes: float, jobs: int) -> None:
    """Measures what the records lack."""
    end, taken, lock = time.monotonic() + 60 * minutes, lacking(records), threading.Lock()

    def work(_: int) -> None:
        with Child() as child:
            while time.monotonic() < end:
                with lock:
                    name, some = next(taken, (PLAIN, {}))
                if not some:
                    return
                found = child.measured(name, list(some.values()))
                with lock:
                    records[name].add(some, found, bar(name))
                    write_text(STORE, text(records, commits))  # a run that is stopped loses nothing
                    print(name, records[name].done.bit_count(), file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(jobs)))


def lacking(records: dict[str, Record]) -> Iterator[tuple[str, dict[int, Any]]]:
    """What is left to measure, number -> order, in programs of a few."""
    for name, orders in rounds(list(enumerate(layouts.orders(4)))):
        left = [(i, order) for i, order in orders if not records[name].done >> i & 1]
        for start in range(0, len(left), TOGETHER):
            yield name, dict(left[start : start + TOGETHER])


def page(records: dict[str, Record], commits: list[str]) -> bool:
    """Writes the page; whether every bar is met."""
    rows, missed, whole = [], [], len(layouts.orders(4))
    for name, one in records.items():
        count = one.done.bit_count()
        rows.append(
            [name, f"{count} of {whole}", len(transforms(name)) * count,
             f"{one.largest:.1e}" if count else "", f"{bar(name):g}", len(one.missed)]
        )  # fmt: skip
        missed += [f"{name} {order}: {what}" for order, what in one.missed.items()]
    count = sum(records[name].done.bit_count() for name in RECIPES)
    body = (__doc__ or "").split("\n\nRun:")[0] + "\n\n" + (__doc__ or "").split("fp4).\n\n")[1]
    body += (
        f"\nSo far {count} of {whole * len(RECIPES)} pairs of an order and a recipe, each under all"
        f" {len(layouts.TRANSFORMS)} transforms, run at {', '.join(commits)}.\n\n"
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
    parser.add_argument("--fresh", action="store_true", help="run again what has been run")
    options = parser.parse_args()
    if options.fresh:
        STORE.unlink(missing_ok=True)
    records, commits = read(STORE)
    commits = list(dict.fromkeys([*commits, commit()]))
    run(records, commits, options.minutes, options.jobs)
    return page(records, commits)


if __name__ == "__main__":
    sys.exit(not main())
