"""A small decoder on eight host devices, and how it is compiled and read."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from mpjax.models import Decoder, decoder
from mpjax.train import TrainState, TrainStep

MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
SIZE = dict(vocabulary=64, layers=1, width=32, heads=8, context=16, norm="rms")
# Half the compile time; what LLVM does to the code is not what these tests are about.
FAST = {"xla_backend_optimization_level": 0}


def small(precision: Any = "fp32", **changes: Any) -> Decoder:
    """A decoder whose axes eight devices divide."""
    return decoder("tiny", precision, **(SIZE | changes))


def batch(seed: int = 0, rows: int = 8) -> dict[str, Any]:
    """Random tokens (rows, 8), not yet on any mesh."""
    ids = np.random.default_rng(seed).integers(0, 64, (rows, 9)).astype(np.int32)
    return {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}


def compiled(state: TrainState, step: TrainStep, example: Any = None, **options: Any) -> Any:
    """The step compiled for these shapes: fn(state, batch)."""
    example = step.place(batch() if example is None else example)
    lowered = step.compiled.lower(state, example)
    run = lowered.compile(compiler_options=FAST | options)
    return lambda state, batch: run(state, step.place(batch))


def host(tree: Any) -> Any:
    """A copy in numpy."""
    return jax.tree.map(lambda x: np.array(x), tree)


def relative(a: Any, b: Any) -> float:
    """Largest difference of two trees' leaves, each relative to its leaf's largest number."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)) for x, y in pairs)


@contextlib.contextmanager
def _compiled_anew() -> Iterator[None]:
    """No compilation cache inside: a program that is read from it writes no dump."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@functools.cache
def reductions(precision: Any, mesh: str) -> frozenset[str]:
    """Dtypes of arrays that devices sum, right after SPMD partitioning.

    The CPU compiler promotes bfloat16 sums afterwards, so its final program proves nothing.
    """
    import optax

    from mpjax.train import build

    state, step = build(small(precision), optax.sgd(1.0), mesh, gate=False)
    with tempfile.TemporaryDirectory() as folder, _compiled_anew():
        compiled(state, step, xla_dump_to=folder, xla_dump_hlo_pass_re="spmd-partitioning")
        (dump,) = Path(folder).glob("*jit_step*after_spmd-partitioning.before*.txt")
        text = dump.read_text()
    found = re.findall(r"= \(?(\w+)\[(\d[\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", text)
    assert found, "no reductions in the program"
    return frozenset(dtype for dtype, _ in found)
