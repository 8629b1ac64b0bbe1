"""Fine-tuning a BERT: tokens per second beside torch and transformers, peak memory by precision.

Run:       python -m benchmarks.cost.finetune_speed [--tpu]
           in an environment that has torch and transformers too: pip install torch transformers;
           with --tpu and libtpu, the memory of a TPU v5e too, which takes half an hour to compile
Expected:  equal losses, so that it is the same model; bf16 gains no time on a CPU, but memory
           there and on a TPU.

One step is one batch of MiniLM's shape (6 x 384) with a head of two classes: forward, backward,
clipping, AdamW, all in one process on the same cores. torch starts from the weights that
`save_checkpoint` wrote of ours. Steps of all sides take turns in random order.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from common import launch  # noqa: F401  # sets XLA flags before JAX starts

import jax  # isort: skip
import numpy as np

from benchmarks.common.page import write
from mpjax.markdown import table
from mpjax.models import encoder
from mpjax.models.hf import save_checkpoint
from mpjax.optim import make_optimizer
from mpjax.tasks import TextClassification
from mpjax.train import build

try:
    import torch
    import transformers
except ImportError as error:
    sys.exit(f"finetune_speed: {error}; pip install torch transformers")

BATCH, LENGTH, LR, WARM, ROUNDS = 32, 64, 1e-4, 2, 12
TIMED = ("fp32", "bf16")
MEASURED = ("fp32", "bf16", "fp16", "fp8", "pure-bf16-sr", "adam8bit")
TPU = "v5e:2x2"
Step = Callable[[], float]  # takes one step, returns the loss before it


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
    held, data = [state], batch()

    def run() -> float:
        held[0], metrics = step(held[0], data)
        return float(metrics["loss"])

    return run


def theirs(folder: Path, low: bool, compiled: bool) -> Step:
    """A step of torch; `low` under autocast to bfloat16."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder).train()
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    run_model = torch.compile(model) if compiled else model
    data = {name: torch.from_numpy(x.astype(np.int64)) for name, x in batch().items()}

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = run_model(data["ids"], attention_mask=data["keep"], labels=data["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def sides(folder: Path) -> dict[str, Step]:
    """What is timed."""
    found = {f"mpjax {precision}": ours(precision) for precision in TIMED}
    for compiled in (False, True):
        for low in (False, True):
            name = f"torch {'compiled ' * compiled}{'bf16 autocast' if low else 'fp32'}"
            found[name] = theirs(folder, low, compiled)
    return found


def speeds() -> tuple[str, bool]:
    """A table, and whether the first losses in float32 agree."""
    with tempfile.TemporaryDirectory() as folder:
        model, state, _ = started("fp32")
        save_checkpoint(Path(folder) / "model", model, state.params)
        steps = sides(Path(folder) / "model")
    losses = {name: [run() for _ in range(WARM)] for name, run in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(steps), len(steps)):
            began = time.perf_counter()
            losses[name].append(steps[name]())
            times[name].append(time.perf_counter() - began)
    mine = np.array(times["mpjax fp32"])
    rows = []
    for name, taken in times.items():
        ratio = np.array(taken) / mine
        low, middle, high = np.percentile(ratio, [10, 50, 90])
        rows.append([
            name, f"{1e3 * np.median(taken):.0f}", f"{BATCH * LENGTH / np.median(taken):,.0f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{losses[name][0]:.6f}",
            f"{losses[name][-1]:.4f}",
        ])  # fmt: skip
    head = ["side", "ms a step", "tokens/s", "time / mpjax fp32 (10 to 90 %)", "first loss", "last"]
    full = [losses[name] for name in losses if name.endswith("fp32")]
    same = float(np.ptp([one[0] for one in full])) < 1e-5
    return table(head, rows), same


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
    found, same = speeds()
    sizes = memory()
    about = (__doc__ or "").split("\n\n")[-1]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    body = [
        f"{about}\n{BATCH} x {LENGTH} tokens a step, {ROUNDS} rounds; {versions},"
        f" {torch.get_num_threads()} threads.",
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
