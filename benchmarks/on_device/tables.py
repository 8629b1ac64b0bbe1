"""The tables of the page, a function a part."""

from __future__ import annotations

from typing import Any

from benchmarks.on_device.clock import PEAK_SOURCE, PEAKS
from mpjax.markdown import table


def spread(found: dict[str, float] | None, digits: int = 0) -> str:
    """Returns a median with its quartiles."""
    if found is None:
        return ""
    low, middle, high = (f"{found[name]:,.{digits}f}" for name in ("q1", "median", "q3"))
    return f"{middle} [{low}, {high}]"


def gigabytes(value: float | None) -> str:
    """Returns bytes in GB."""
    return "" if value is None else f"{value / 1e9:.2f}"


def right(cells: list[dict[str, Any]]) -> str:
    """Part a: a line a cell, and each check that does not hold."""
    rows, wrong = [], []
    for cell in cells:
        found = cell["result"]["rows"]
        moved = sum(row["differ"] or 0 for row in found)
        bad = [row for row in found if not row["ok"]]
        share = [row["error"] / row["bound"] for row in found if row["error"] and row["bound"]]
        worst = f"{max(share):.2g}" if share else ""
        rows.append((cell["name"], len(found), moved, worst, "WRONG" if bad else "holds"))
        wrong += [(cell["name"], r["name"], r["differ"], r["error"], r["bound"]) for r in bad]
        if note := cell["result"].get("note"):
            rows[-1] = (f"{cell['name']} ({note})", *rows[-1][1:])
    parts = [
        "The same code on the device and on the CPU of the same process, and numpy's float64 or"
        " ml_dtypes' casts where they know the answer. `differ` counts numbers whose bits are not"
        " the CPU's; products of float32 sums may differ within a bound, all else may not. `of"
        " bound` is the largest error over what is allowed.",
        table(("check", "comparisons", "differ", "of bound", ""), rows),
    ]
    if wrong:
        parts.append(table(("check", "wrong", "differ", "error", "bound"), wrong))
    return "\n\n".join(parts)


def fast(cells: list[dict[str, Any]]) -> str:
    """Part b: products, then train steps."""
    products = [c for c in cells if "tflops" in c["result"]]
    trains = [c for c in cells if "tokens_per_s" in c["result"]]
    parts = []
    if products:
        side = products[0]["result"]["side"]
        rows: list[tuple[object, ...]] = [
            (c["name"].removeprefix("product "), spread(c["result"]["tflops"], 2)) for c in products
        ]
        parts += [
            f"Square matrices of {side}, random normal numbers; `recipe` is ours from bfloat16 to"
            " bfloat16, quantisation included, the rest XLA's product alone; tf32 is float32 at"
            " XLA's default precision.",
            table(("operands", "TFLOP/s [quartiles]"), rows),
        ]
    if trains:
        one = trains[0]["result"]
        rows = []
        for c in trains:
            r = c["result"]
            mfu = "" if r["mfu"] is None else f"{100 * r['mfu']:.1f} %"
            rows.append((
                c["name"].removeprefix("train "), spread(r["tokens_per_s"]), mfu,
                gigabytes(r["peak_bytes"]), gigabytes(r["program_bytes"]),
                f"{r['compile_s']:.1f}", f"{r['first_loss']:.3f} to {r['last_loss']:.3f}",
            ))  # fmt: skip
        known = ", ".join(f"{name} {peak:.0f}" for name, peak in PEAKS.items())
        parts += [
            f"A decoder of {one['parameters']:,} parameters, {one['batch']} x {one['tokens']}"
            " tokens a step, AdamW, clip 1.0, the gate for non-finite steps on; one process each."
            f" Model FLOPs a token: 6 N + 6 L H K T = {one['flops_per_token']:.4g}, with N the"
            " weights that multiply, attention causal, nothing for what is computed again."
            f" MFU is over the dense bf16 peak in TFLOP/s: {known} ({PEAK_SOURCE}); other devices"
            " have none. `peak` is the allocator's, `program` what the compiler says that the"
            " step holds.",
            table(("precision", "tokens/s [quartiles]", "MFU", "peak GB", "program GB",
                   "compile s", "loss"), rows),
        ]  # fmt: skip
    return "\n\n".join(parts)


def peers(cells: list[dict[str, Any]]) -> str:
    """Part c: a table a cell."""
    parts = []
    for cell in cells:
        r = cell["result"]
        rows = [(name, spread(rate)) for name, rate in r["tokens_per_s"].items()]
        notes = [f"{name}: {spread(found, 3)}" for name, found in r.get("speed", {}).items()]
        losses = [f"{name} {value:.4f}" for name, value in r.get("first_loss", {}).items()]
        notes += [f"first losses {', '.join(losses)}"] if losses else []
        for label in ("compile_s", "peak_bytes", "program_bytes"):
            values = {k: v for k, v in r.get(label, {}).items() if v is not None}
            shown = {
                k: f"{v:.1f}" if label == "compile_s" else gigabytes(v) for k, v in values.items()
            }
            unit = {
                "compile_s": "compile s",
                "peak_bytes": "peak GB",
                "program_bytes": "program GB",
            }
            notes += [f"{unit[label]} " + ", ".join(f"{k} {v}" for k, v in shown.items())] * bool(
                values
            )
        parts += [
            f"**{cell['name']}**, {r['batch']} sequences a step:",
            table(("step", "tokens/s [quartiles]"), rows),
            "\n".join(f"- {note}" for note in notes),
        ]
    head = (
        "The same shape, batch and first weights in one process, steps taken in turn; torch with"
        " SDPA, fused AdamW and bf16 autocast, `careful` in plain JAX with its casts by hand"
        " (benchmarks/on_device/measures/twin.py). `torch alone` has weights of its own."
    )
    return "\n\n".join([head, *filter(None, parts)])


def tools(cells: list[dict[str, Any]]) -> str:
    """Part d: a line each."""
    rows = []
    for cell in cells:
        r, name = cell["result"], cell["name"]
        if "time" in r:
            rows += [(f"{name}: time {k}", spread(v, 3)) for k, v in r["time"].items()]
        elif "share" in r:
            rows.append((f"{name}, share of the step time", f"{100 * r['share']:.2f} %"))
        elif "found" in r:
            right = "the planted one" if r["right"] else "NOT the planted one"
            rows.append(
                (f"{name}, found {r['found'] or 'nothing'}: {right}", f"{r['seconds']:.1f} s")
            )
        else:
            rows.append((f"{name}, weights {gigabytes(r['weight_bytes'])} GB, {r['batch']} x"
                         f" {r['new']} tokens behind {r['prompt']}",
                         f"{spread(r['tokens_per_s'])} tokens/s"))  # fmt: skip
    return table(("what", "median [quartiles]"), rows)


TABLES = {"right": right, "fast": fast, "peers": peers, "tools": tools}
