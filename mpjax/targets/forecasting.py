"""What a step needs and takes, read from its compiled program; its devices need not be here."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from mpjax.errors import ConfigError, explains_calls
from mpjax.interpret import audit
from mpjax.interpret.audit.collectives import SLICES, Collective, collectives
from mpjax.targets.chips import Chip
from mpjax.targets.figures import STATE, Forecast, Sent
from mpjax.targets.traffic import Program
from mpjax.train import TrainStep
from mpjax.typing import PyTree

# How many times its whole bytes / n an exchange of n devices in a ring sends from each of them.
_TURNS = {"all-reduce": 2.0, "collective-permute": 1.0}
# What a TPU's compiler says of a program that does not fit: all that it needs, or temporaries.
_USED = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG]")
_EXCEEDS = re.compile(r"temporaries \(([\d.]+)([KMG])\) exceeds")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_SHOWN = 5  # arrays


@explains_calls
def forecast(
    step: TrainStep,
    state: PyTree,
    batch: PyTree,
    *,
    chip: Chip | None = None,
    target: str = "",
    kernels: Sequence[str] = (),
) -> Forecast:
    """Compiles a step for the devices of its mesh and returns what it needs and takes there.

    Arguments and temporaries are the compiler's own figures; operations are those of the traced
    products, by their wider operand, loops and recomputation counted; bytes those to and from the
    chip's memory. Times are bounds at the published rates.

    Args:
      step: of `mpjax.train.build` or `build_abstract`.
      state: its state; shapes with shardings will do.
      batch: likewise.
      chip: whose memory and rates count; None for the compiler's figures alone.
      target: a name for the devices.
      kernels: of attention, for the table.

    Raises:
      ConfigError: something that is no step.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from mpjax.models import decoder
      >>> from mpjax.train import build_abstract
      >>> model = decoder("tiny", "bf16", layers=1, width=16, heads=2)
      >>> state, step = build_abstract(model, optax.sgd(0.1))
      >>> ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
      >>> found = forecast(step, state, {"inputs": ids, "targets": ids})
      >>> found.fits, found.parts["batch"]
      (True, 128)
    """
    if not isinstance(step, TrainStep):
        raise ConfigError("forecast: it takes a step of mpjax.train.build, its state and a batch")
    begun = time.perf_counter()
    mesh = {} if step.mesh is None else dict(step.mesh.shape)
    devices = math.prod(mesh.values())
    leaves = jax.tree.leaves(batch)
    rows, tokens = leaves[0].shape[0], math.prod(leaves[0].shape[1:])
    parts = _parts(step, state, batch)
    products = audit(step, state, batch).by_dtype
    flops = {d: cost.products / devices for d, cost in products.items() if cost.products}
    lowered = step.compiled.lower(state, batch)
    common = Forecast(
        precision=step.optimizer.precision.name, target=target, mesh=mesh,
        batch=rows // (mesh.get("data", 1) * mesh.get("fsdp", 1)), tokens=tokens,
        memory=int(chip.memory) if chip else 0, parts=parts, arguments=0, temporaries=0, code=0,
        refused="", flops=flops, accessed=0, sent=(), kernels=tuple(kernels), seconds={},
        largest=(), compile_seconds=0.0,
    )  # fmt: skip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(common, str(error), time.perf_counter() - begun)
    stats, text = compiled.memory_analysis(), compiled.as_text() or ""
    program, sent = Program(text), _sent(collectives(text, mesh), mesh)
    accessed = program.bytes()
    if eight := program.float8_operations():
        flops = {"float8_e4m3fn": float(eight)} | flops
        flops["bfloat16"] = max(flops.get("bfloat16", 0.0) - eight, 0.0)
    seconds = {} if chip is None else {
        "compute": sum(n / chip.rate(dtype) for dtype, n in flops.items()),
        "memory": accessed / chip.bandwidth,
        "network": sum(one.moved for one in sent if one.axes != SLICES) / chip.link,
    }  # fmt: skip
    between = sum(one.moved for one in sent if one.axes == SLICES)
    if chip is not None and chip.between and between:
        seconds["slices"] = between / chip.between
    fresh = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    return dataclasses.replace(
        common,
        flops=flops,
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes + fresh,
        code=stats.generated_code_size_in_bytes,
        accessed=accessed, sent=sent, seconds=seconds, largest=program.largest(_SHOWN),
        compile_seconds=time.perf_counter() - begun,
    )  # fmt: skip


def _refused(common: Forecast, said: str, seconds: float) -> Forecast:
    """Of a program that the compiler of a TPU refuses: it does not fit."""
    whole, part = _USED.search(said), _EXCEEDS.search(said)
    found = part or whole
    if found is None:
        raise ConfigError(f"forecast: the compiler failed: {' '.join(said.split())[:600]}")
    size = int(float(found[1]) * _UNITS[found[2]])
    arguments = sum(common.parts[name] for name in STATE)
    return dataclasses.replace(
        common, arguments=arguments, temporaries=size if part else max(size - arguments, 0),
        refused=" ".join(said.split())[:160], compile_seconds=seconds,
    )  # fmt: skip


def _count(x: Any) -> int:
    """Numbers of an array on one device."""
    cut = getattr(x, "sharding", None)
    return math.prod(x.shape if cut is None else cut.shard_shape(x.shape))


def _size(tree: PyTree) -> int:
    """Bytes of a tree on one device."""
    return sum(_count(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _parts(step: TrainStep, state: Any, batch: PyTree) -> dict[str, int]:
    weights, moments = _size(state.params), _size(state.opt_state)
    wide = step.optimizer.precision.gradient_dtype
    numbers = sum(map(_count, jax.tree.leaves(state.params)))
    return {
        "weights": weights,
        "optimizer state": moments,
        "other state": _size(state) - weights - moments + _size(step.frozen),
        "batch": _size(batch),
        "gradients": numbers * jax.numpy.dtype(wide).itemsize,
    }


def _sent(found: Sequence[Collective], mesh: dict[str, int]) -> tuple[Sent, ...]:
    """Collectives by kind, dtype and axes, the largest first."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for one in found:
        axes = ("data",) if one.axes == SLICES else one.axes.split(",")
        size = math.prod(mesh.get(axis, 1) for axis in axes)
        turns = _TURNS.get(one.kind, 1.0)
        share = turns if one.kind == "collective-permute" else turns * (size - 1) / max(size, 1)
        held = sums.setdefault((one.kind, one.dtype, one.axes), [0, 0, 0])
        held[0] += one.times
        held[1] += one.bytes * one.times
        held[2] += int(one.bytes * one.times * (share if one.axes != "?" else turns))
    rows = [Sent(*key, *values) for key, values in sums.items()]
    return tuple(sorted(rows, key=lambda one: -one.moved))
