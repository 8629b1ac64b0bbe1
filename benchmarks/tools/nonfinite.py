"""A hundred planted faults, and twenty clean steps with masks, under trace_nonfinite.

Run:       python -m benchmarks.tools.nonfinite
Expected:  path, layer, direction, line and shard right in at least 99 of 100; no report on 20.
"""

from __future__ import annotations

import collections
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from benchmarks.common.page import write
from mpjax.markdown import table

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from mpjax.interpret.nonfinite.nonfinite import trace_nonfinite  # noqa: E402
from tests.interpret.nonfinite.planted import (  # noqa: E402
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    PLACES,
    Fault,
    clean_step,
    grid,
)

CLEAN = 20


def chosen(fault: Fault) -> bool:
    """Every second one, as on a chessboard: so that each direction stands in each place."""
    mechanisms = next(m for m in (FORWARD, BACKWARD, OPTIMIZER) if fault.mechanism in m)
    return (mechanisms.index(fault.mechanism) + PLACES.index(fault.place)) % 2 == 0


def main() -> bool:
    """Plants them; whether enough are found."""
    faults = [fault for fault in grid() if chosen(fault)]
    missed = []
    cures: collections.Counter[str] = collections.Counter()
    places: collections.Counter[tuple[str, str]] = collections.Counter()
    for fault in faults:
        report = trace_nonfinite(fault.step, *fault.arguments())
        wrong = fault.misses(report)
        if wrong:
            missed.append((fault.name, "; ".join(wrong)))
        cure = "nothing reported" if report is None else report.cure
        cures["none" if cure.startswith("none") else cure] += 1
        places[fault.direction, fault.place.__name__] += 1
        print(fault.name, wrong or "right", cure, flush=True)
    false = [n for n in range(CLEAN) if trace_nonfinite(clean_step(n)[0], *clean_step(n)[1])]
    good = len(faults) == 100 and len(missed) <= 1 and not false
    names = sorted({place for _, place in places})
    rows = [
        (way, *(places[way, name] for name in names))
        for way in ("forward", "backward", "optimizer")
    ]
    mechanisms = len({fault.mechanism for fault in faults})
    body = (
        f"{len(faults)} faults, the black squares of a grid of {mechanisms} mechanisms in the"
        " places below (`tests/interpret/nonfinite/planted.py`); each is one marked line, found by"
        " `inspect`, and breaks in one layer of four and one row of eight. No derivative goes"
        " through a `while` loop, so none is planted backward there. Right means: module path,"
        " layer, direction, file and line, and the shard where rows lie on 8 devices.\n\n"
        f"{table(('planted', *names), rows)}\n\n"
        f"Right: {len(faults) - len(missed)} of {len(faults)} (bar: 99). False reports on {CLEAN}"
        f" clean steps with masks of -inf: {len(false)} (bar: 0).\n\n"
        + (f"Missed:\n\n{table(('fault', 'what'), missed)}\n\n" if missed else "")
        + "What JAX does not tell: the equations of a hand-written `custom_vjp` backward rule carry"
        " the line of the call of the function, not of the rule; that line is counted as right"
        " here (`by_hand`).\n\n"
        f"Cures found by trying:\n\n{table(('cure', 'faults'), cures.most_common())}\n\n"
        f"The bars are {'met' if good else 'MISSED'}."
    )
    write("nonfinite", "The first NaN or infinity, found in place", body)
    return good


if __name__ == "__main__":
    sys.exit(not main())
