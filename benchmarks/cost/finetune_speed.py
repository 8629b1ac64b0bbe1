"""Fine-tuning a BERT: tokens per second beside torch and transformers, peak memory by precision.

Run:       python -m benchmarks.cost.finetune_speed [--tpu]
           in an environment that has torch and transformers too: pip install torch transformers;
           with --tpu and libtpu, the memory of a TPU v5e too, which takes half an hour to compile
Expected:  equal losses, so that it is the same model; bf16 takes less time where a CPU has units
           for it, and less memory there and on a TPU.

One step is one batch of MiniLM's shape (6 x 384) with a head of two classes: forward, backward,
clipping, AdamW, all in one process on the same cores. torch starts from the weights that
`save_checkpoint` wrote of ours. Steps of all sides take turns in random order.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from common import launch  # noqa: F401  # sets XLA flags before JAX starts

import jax  # isort: skip
import numpy as np

from benchmarks.common.page import write
from benchmarks.common.turns import HEAD, Step, take_turns
from mpjax.markdown import table
from mpjax.models import encoder
from mpjax.models.hf import save_checkpoint
from mpjax.optim import make_optimizer
from mpjax.tasks import TextClassification
from mpjax.train import build

BATCH, LENGTH, LR, WARM, ROUNDS = 32, 64, 1e-4, 2, 12
TIMED = ("fp32", "bf16")
MEASURED = ("fp32", "bf16", "fp16", "fp8", "pure-bf16-sr", "adam8bit")
TPU = "v5e:2x2"


def model_in(precision: str) -> Any:
    """The model; without dropout, so that losses can be compared."""
    return encoder("minilm-l6", precision, head="class", classes=2, dropout=0.0)


def started(precision: str) -> tuple[Any, Any, Any]:
    """A model, its first state and its compiled step."""
    model = model_in(precision)
    task = TextClassification(("no", "yes"))
    raw = make_optimizer("adamw", LR, schedule="constant", steps=1, weight_decay=0.01)
    return model, *build(model, raw, clip=1.0, objective=task.objective)


def batch() -> dict[str, Any]:
    """Half of the rows are full, half of them end before."""
    rng = np.random.default_rng(0)
    lengths = np.where(np.arange(BATCH) % 2, LENGTH, rng.integers(LENGTH // 2, LENGTH, BATCH))
    return {
        "ids": rng.integers(1000, 30000, (BATCH, LENGTH)).astype(np.int32),
        "keep": (np.arange(LENGTH)[None] < lengths[:, None]).astype(np.int32),
        "labels": rng.integers(0, 2, BATCH).astype(np.int32),
    }


def ours(precision: str) -> Step:
    """A step of ours."""
    _, state, step = started(precision)
    return stepped(state, step, batch())


def stepped(state: Any, step: Any, data: dict[str, Any]) -> Step:
    """Steps that go on from each other."""
    held = [state]

    def run() -> float:
        held[0], metrics = step(held[0], data)
        return float(metrics["loss"])

    return run


def speeds(torch_steps: Any) -> tuple[str, bool]:
    """A table, and whether the first losses in float32 agree."""
    with tempfile.TemporaryDirectory() as folder:
        model, state, _ = started("fp32")
        save_checkpoint(Path(folder) / "model", model, state.params)
        steps = {f"mpjax {precision}": ours(precision) for precision in TIMED}
        steps |= torch_steps.sides(torch_steps.minilm, Path(folder) / "model", batch(), LR)
    turns = take_turns(steps, WARM, ROUNDS)
    head = [name.format("mpjax fp32") for name in HEAD]
    text = table(head, turns.rows("mpjax fp32", BATCH * LENGTH))
    return text, turns.spread_of_first("fp32") < 1e-5


def tpu_device() -> Any:
    """A TPU to compile for, if that is asked for."""
    if "--tpu" not in sys.argv:
        return None
    from jax.experimental.topologies import get_topology_desc

    return get_topology_desc(TPU, platform="tpu").devices[0]


def memory() -> str:
    """A table: bytes of a compiled step by precision, the donated state counted once."""
    tpu = tpu_device()
    rows = []
    for precision in MEASURED:
        _, state, step = started(precision)
        row = [precision]
        for device in (jax.devices()[0], *([tpu] if tpu else [])):
            place = jax.sharding.SingleDeviceSharding(device)
            shapes = jax.tree.map(
                lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                (state, batch()),
            )
            compiled = jax.jit(step.function, donate_argnums=0).lower(*shapes).compile()
            found = compiled.memory_analysis()
            assert found is not None
            kept, work = found.argument_size_in_bytes, found.temp_size_in_bytes
            new = found.output_size_in_bytes - found.alias_size_in_bytes
            row += [f"{n / 1e6:.0f}" for n in (kept, work + new, kept + work + new)]
        rows.append(row)
    parts = ("state and batch", "temporaries", "peak")
    head = ["precision", *[f"CPU: {part}, MB" for part in parts]]
    head += [f"{TPU}: {part}, MB" for part in parts] if tpu else []
    return table(head, rows)


def main() -> bool:
    """Measures and writes the page; whether both sides had the same losses."""
    torch_steps = importlib.import_module("benchmarks.cost.torch_steps")  # says what is missing
    found, same = speeds(torch_steps)
    sizes = memory()
    about = (__doc__ or "").split("\n\n")[-1]
    body = [
        f"{about}\n{BATCH} x {LENGTH} tokens a step, {ROUNDS} rounds; {torch_steps.VERSIONS}.",
        found,
        f"First losses in float32 {'agree within 1e-5' if same else '**differ**'}.",
        "Peak memory as compiled (`memory_analysis()`), the donated state counted once:",
        sizes,
    ]
    command = " ".join(["python -m benchmarks.cost.finetune_speed", *sys.argv[1:]])
    write("finetune_speed", "What fine-tuning takes: time and memory", "\n\n".join(body), command)
    return same


if __name__ == "__main__":
    sys.exit(not main())
