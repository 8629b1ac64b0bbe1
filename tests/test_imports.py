"""What a train step of ours imports: so much must be there on a machine without a package index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = """
import sys
import jax, jax.numpy as jnp, optax, mpjax
from mpjax.models import decoder
from mpjax.train import build
state, step = build(decoder("tiny", "bf16", layers=1, width=16, heads=2), optax.adamw(1e-3))
ids = jnp.zeros((1, 4), jnp.int32)
state, metrics = step(state, {"inputs": ids, "targets": ids})
assert int(state.step) == 1
print(*sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""
# mpjax's own needs, and what these import: JAX, Flax and optax bring all but jmp.
OURS = {"jax", "jaxlib", "flax", "optax", "jmp", "jaxtyping", "numpy", "ml_dtypes", "rich", "mpjax"}
NOT = {
    "grain", "tokenizers", "tyro", "tensorboardX", "matplotlib", "orbax", "pandas", "torch",
    "datasets", "huggingface_hub", "safetensors", "wandb",
}  # fmt: skip


def test_a_train_step_needs_no_more_than_jax_flax_optax_and_jmp() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(done.stdout.split())
    assert OURS <= loaded, "the list is of what is loaded"
    assert not loaded & NOT
