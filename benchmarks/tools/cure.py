"""Faults alone and in company: what trace_nonfinite says of them, and NumPy of their operands.

Run:       python -m benchmarks.tools.cure
Expected:  in every case the first fault is reported, with what its operation gives in float32
           (1e-6), and no cure is denied to a value that float32 holds, nor given to another.
"""

from __future__ import annotations

import collections
import logging
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from benchmarks.common.page import write
from mpjax.markdown import table

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from mpjax.interpret.nonfinite.nonfinite import trace_nonfinite  # noqa: E402
from tests.interpret.nonfinite.replayed import KINDS, SECONDS, cases, misses  # noqa: E402


def main() -> bool:
    """Traces all of them; whether all are right."""
    logging.getLogger("mpjax.interpret").setLevel(logging.ERROR)
    right: collections.Counter[tuple[str, str]] = collections.Counter()
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    cures: collections.Counter[str] = collections.Counter()
    missed = []
    for case in cases():
        report = trace_nonfinite(case.program, *case.arguments())
        wrong = misses(case, report)
        total[case.kind, case.second] += 1
        right[case.kind, case.second] += not wrong
        cure = report.cure if report else "nothing reported"
        cures[cure.split(":")[0].split("; then")[0]] += 1
        if wrong:
            missed.append((case.name, "; ".join(wrong)))
        print(case.name, wrong or "right", cure, flush=True)
    rows = [
        (kind, *(f"{right[kind, second]} of {total[kind, second]}" for second in SECONDS))
        for kind in KINDS
    ]
    good = not missed
    count = sum(total.values())
    body = (
        f"{count} programs (`tests/interpret/nonfinite/replayed.py`), the black squares of a grid:"
        " the kinds of faults below in float16,"
        " bfloat16, float32 and float8 (stored so, computed in float16), flat, in one step of a"
        " `scan`, inside `jit` and inside `custom_vjp`. A second fault stands beside the first in"
        " an output of its own, is made of the first one's result, or joins it in one sum. Right"
        " means: the first operation and iteration; what it gives in float32 is what NumPy makes"
        " of its operands in float32; a cure is found exactly if that is finite.\n\n"
        f"{table(('fault', *SECONDS), rows)}\n\n"
        f"Right: {sum(right.values())} of {count} (bar: all).\n\n"
        + (f"Missed:\n\n{table(('case', 'what'), missed)}\n\n" if missed else "")
        + f"Cures:\n\n{table(('cure', 'cases'), cures.most_common())}\n\n"
        f"The bar is {'met' if good else 'MISSED'}."
    )
    write("cure", "A cure is tried on the value that broke, whatever else breaks", body)
    return good


if __name__ == "__main__":
    sys.exit(not main())
