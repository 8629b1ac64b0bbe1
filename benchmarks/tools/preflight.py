"""Whether a forecast is what the step that runs needs: on the devices of this host.

Run:       python -m benchmarks.tools.preflight
Expected:  over 4 precisions, 3 policies of remat and 3 meshes the arguments are equal, and
           temporaries within 10 %.

`mpjax.preflight` compiles shapes for `cpu:8`; beside it a process builds the same model with
numbers, compiles its step, runs it once, and asks the compiler. Both start with the same flags.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import mpjax
from benchmarks.common.page import write
from mpjax.markdown import table
from mpjax.targets import parse_target
from mpjax.targets.devices import clean_environment

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
REMATS = ("none", "full", "dots")
MESHES = ("fsdp=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
ROWS, SEQ = 2, 64
SIZES: dict[str, Any] = dict(layers=3, width=128, heads=4, vocabulary=512)
REAL = """
import json, sys
import jax, jax.numpy as jnp
from mpjax.models import decoder
from mpjax.optim import make_optimizer
from mpjax.train import build

spec, found = json.loads(sys.argv[1]), []
for precision in spec["precisions"]:
    model = decoder("tiny", precision, **spec["settings"])
    state, step = build(model, make_optimizer("adamw", 1e-4), spec["mesh"], clip=1.0)
    ids = jnp.zeros((spec["rows"], spec["seq"]), jnp.int32)
    batch = step.place({"inputs": ids, "targets": ids})
    stats = step.compiled.lower(state, batch).compile().memory_analysis()
    state, metrics = step(state, batch)
    assert jnp.isfinite(metrics["loss"])
    fresh = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    found.append((stats.argument_size_in_bytes, stats.temp_size_in_bytes + fresh))
print(json.dumps(found))
"""


def real(mesh: str, remat: str) -> list[tuple[int, int]]:
    """Arguments and temporaries of the steps that run, by precision."""
    parts = dict(part.split("=") for part in mesh.split(","))
    rows = ROWS * int(parts.get("data", 1)) * int(parts.get("fsdp", 1))
    settings = SIZES | {"remat": remat, "loop": "scan", "context": SEQ}
    spec = dict(precisions=PRECISIONS, settings=settings, mesh=mesh, rows=rows, seq=SEQ)
    done = subprocess.run(
        [sys.executable, "-c", REAL, json.dumps(spec)], capture_output=True, text=True,
        env=clean_environment(parse_target("cpu:8")), check=True,
    )  # fmt: skip
    return [(a, b) for a, b in json.loads(done.stdout)]


def main() -> bool:
    """Compares all cells and writes the page; whether every bar is met."""
    rows, good, worst = [], True, 0.0
    for mesh in MESHES:
        for remat in REMATS:
            found = mpjax.preflight(
                "tiny", precision=PRECISIONS, target="cpu:8", mesh=mesh, batch=ROWS, seq=SEQ,
                remat=remat, **SIZES,
            )  # fmt: skip
            for one, (arguments, temporaries) in zip(found, real(mesh, remat), strict=True):
                off = 100 * (one.temporaries / temporaries - 1)
                worst = max(worst, abs(off))
                good = good and one.arguments == arguments and abs(off) <= 10
                rows.append([
                    mesh, remat, one.precision, f"{one.arguments:,}", f"{arguments:,}",
                    f"{one.temporaries:,}", f"{temporaries:,}", f"{off:+.2f} %",
                ])  # fmt: skip
                print(*rows[-1], file=sys.stderr, flush=True)
    head = ["mesh", "remat", "precision", "arguments, forecast", "and of the step that runs",
            "temporaries, forecast", "and of the step that runs", "off"]  # fmt: skip
    body = "\n\n".join([
        (__doc__ or "").split("\n\n")[2],
        f"{len(rows)} cells; the largest difference of temporaries is {worst:.2f} %.",
        table(head, rows),
    ])  # fmt: skip
    write("preflight", "A forecast and the step that runs", body)
    return good


if __name__ == "__main__":
    sys.exit(not main())
