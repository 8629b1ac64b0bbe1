"""Training steps on a CPU beside torch's: a GPT of 12.3 M parameters and MiniLM, in one run.

Run:       python -m benchmarks.cost.step_speed [--alone]
           in an environment that has torch and transformers too: pip install torch transformers;
           with --alone without them
Expected:  equal first losses in float32, so that it is the same model; float32 no slower than
           compiled torch; bf16 at most 0.60 of our float32, where the CPU has units for it, and no
           slower than torch's autocast; int8 at most 0.8 of float32 from JAX 0.12 on.

Forward, backward, clipping, AdamW, all in one process on the same cores. torch starts from the
weights that `save_checkpoint` wrote of ours. Steps of all sides take turns in random order.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from common import launch  # noqa: F401  # sets XLA flags before JAX starts

import jax  # isort: skip
import numpy as np

from benchmarks.common.page import write
from benchmarks.common.turns import HEAD, Step, Turns, take_turns
from benchmarks.cost import finetune_speed as minilm
from mpjax.markdown import table
from mpjax.models import decoder
from mpjax.models.hf import save_checkpoint
from mpjax.optim import make_optimizer
from mpjax.train import build

ROWS, TOKENS, WORDS = 8, 256, 4096
PRECISIONS = ("fp32", "bf16", "fp8", "int8")


def started(precision: str) -> tuple[Any, Any, Any]:
    """The GPT, its first state and its compiled step."""
    model = decoder(
        "gpt2", precision, layers=6, width=384, heads=6, vocabulary=WORDS, context=TOKENS
    )
    raw = make_optimizer("adamw", minilm.LR, schedule="constant", steps=1, weight_decay=0.01)
    return model, *build(model, raw, clip=1.0)


def batch() -> dict[str, Any]:
    """Random tokens."""
    ids = np.random.default_rng(0).integers(0, WORDS, (ROWS, TOKENS + 1)).astype(np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def ours(precision: str) -> Step:
    """A step of ours."""
    _, state, step = started(precision)
    return minilm.stepped(state, step, batch())


def turns(module: Any, torch_sides: Callable[[Path], dict[str, Step]] | None) -> Turns:
    """What all sides take of one model; the module has `started` and `ours`."""
    steps = {f"mpjax {precision}": module.ours(precision) for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as folder:
        if torch_sides is not None:
            model, state, _ = module.started("fp32")
            save_checkpoint(Path(folder) / "model", model, state.params)
            steps |= torch_sides(Path(folder) / "model")
    return take_turns(steps, minilm.WARM, minilm.ROUNDS)


def bars(name: str, found: Turns) -> list[list[str]]:
    """What is promised of a model, and whether it holds."""
    asked = [("mpjax bf16", "mpjax fp32", 0.6)]
    lows = [side for side in found.seconds if side.endswith("autocast")]
    if lows:
        best = min(lows, key=lambda side: float(np.median(found.seconds[side])))
        asked += [("mpjax fp32", "torch compiled fp32", 1.0), ("mpjax bf16", best, 1.0)]
    if tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12):
        asked.append(("mpjax int8", "mpjax fp32", 0.8))
    rows = []
    for side, to, most in asked:
        middle, low, high = found.ratio(side, to)
        said = "met" if middle <= most else "**missed**"
        rows.append([
            name, side, to, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"<= {most:.2f}", said
        ])  # fmt: skip
    return rows


def main() -> bool:
    """Measures and writes the page; whether all bars are met."""
    alone = "--alone" in sys.argv
    torch_steps: Any = None if alone else importlib.import_module("benchmarks.cost.torch_steps")
    versions = "without torch" if alone else torch_steps.VERSIONS
    judged, parts, same = [], [], []
    for title, module, kind, tokens in (
        ("GPT, 6 x 384, 8 x 256 tokens", sys.modules[__name__], "gpt", ROWS * TOKENS),
        ("MiniLM, 6 x 384, 32 x 64 tokens", minilm, "minilm", minilm.BATCH * minilm.LENGTH),
    ):
        theirs = None
        if torch_steps is not None:
            make = getattr(torch_steps, kind)
            data = module.batch()
            theirs = functools.partial(torch_steps.sides, make, batch=data, rate=minilm.LR)
        found = turns(module, theirs)
        judged += bars(title.split(",")[0], found)
        same.append(found.spread_of_first("fp32") < 1e-4)
        head = [column.format("mpjax fp32") for column in HEAD]
        parts += [f"## {title}", table(head, found.rows("mpjax fp32", tokens))]
    about = (__doc__ or "").split("\n\n")[-1]
    head = ["model", "side", "beside", "time ratio (10 to 90 %)", "bar", ""]
    agree = "agree within 1e-4" if all(same) else "**differ**"
    body = [f"{about}\n{minilm.ROUNDS} rounds; {versions}.", table(head, judged), *parts]
    body += [] if alone else [f"First losses in float32 {agree}."]
    version = ".".join(jax.__version__.split(".")[:2])
    write(
        f"step_speed_jax_{version.replace('.', '_')}",
        f"Steps on a CPU{'' if alone else ' beside torch'}, JAX {version}",
        "\n\n".join(body),
        " ".join(["python -m benchmarks.cost.step_speed", *sys.argv[1:]]),
    )
    return all(same) and all(row[-1] == "met" for row in judged)


if __name__ == "__main__":
    sys.exit(not main())
