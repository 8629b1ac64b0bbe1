"""Planted float32 leaks, what the audit says of each, and clean models that have none.

Run:       python -m benchmarks.tools.audit
Expected:  every plant found with its mechanism at its line, forward and in the gradient; nothing
           else reported; no leak in a clean model.

The plants and the clean models are those of the tests, `tests/interpret/audit/leaky.py` and
`clean.py`.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common.page import write
from mpjax.interpret.audit.audit import audit
from mpjax.interpret.audit.report import short
from mpjax.markdown import table
from tests.interpret.audit.clean import CLEAN
from tests.interpret.audit.leaky import PLANTS, Plant, line_of


def gradient(fn: Any) -> Any:
    """Returns the gradient of the sum of what a function returns."""
    return jax.grad(lambda w, *data: jnp.sum(fn(w, *data).astype(jnp.float32)))


def judge(name: str, plant: Plant, fn: Any) -> str:
    """What the audit says of a plant."""
    leaks = audit(fn, plant.weights, *plant.data).leaks
    found = {(leak.mechanism, leak.line.split(" ")[0]) for leak in leaks}
    if found == {(plant.mechanism, line_of(name))}:
        return "found"
    return "none" if not found else "OTHER: " + ", ".join(short(leak.line) for leak in leaks)


def attention() -> str:
    """The report on the gradient of JAX's own attention."""
    q = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(jax.nn.dot_product_attention(q, k, v, is_causal=True).astype(jnp.float32))

    return str(audit(jax.grad(loss, argnums=(0, 1, 2)), q, q, q))


def main() -> None:
    """Writes the page."""
    rows, right = [], [0, 0]
    for name, plant in PLANTS.items():
        forward = "(only the gradient leaks)" if plant.gradient else judge(name, plant, plant.fn)
        backward = judge(name, plant, gradient(plant.fn))
        right[0] += forward == "found"
        right[1] += backward == "found"
        where = line_of(name).rsplit("/", 1)[-1]
        rows.append((name, plant.mechanism, f"`{where}`", forward, backward))
    plants = table(("plant", "mechanism", "line", "forward", "gradient"), rows)
    clean = []
    for name, make in CLEAN.items():
        fn, args = make()
        start = time.perf_counter()
        report = audit(fn, *args)
        seconds = time.perf_counter() - start
        share = f"{report.share(report.low):.1%} {report.low}"
        clean.append((name, len(report.products), share, len(report.leaks), len(report.minor),
                      f"{seconds:.2f}"))  # fmt: skip
    head = ("model", "products", "product FLOPs", "leaks", "minor", "seconds, with tracing")
    leaking = sum(not plant.gradient for plant in PLANTS.values())
    mechanisms = len({plant.mechanism for plant in PLANTS.values()})
    body = f"""{right[0]} of {leaking} planted leaks are found in the forward pass and {right[1]} \
of {len(PLANTS)} in the gradient, with the right source line and mechanism ({mechanisms} \
mechanisms) and nothing else reported beside them. The line is that of the statement where a low \
value becomes wide; the plants are in `tests/interpret/audit/leaky.py`.

One line is not that of the planted statement: JAX gives all operations of a `custom_vjp`'s \
backward rule the line that calls the function, so `backward_rule` is found at the call.

{plants}

## Clean models

Value and gradient; `tests/interpret/audit/clean.py`.

{table(head, clean)}

## A leak that is not planted

`jax.nn.dot_product_attention` of bfloat16, gradient: the scores leave their product in float32, \
so two of the four products of the gradient take a float32 operand.

```text
{attention()}
```"""
    write("audit", "Where float32 leaks into a bfloat16 program", body)


if __name__ == "__main__":
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        main()
