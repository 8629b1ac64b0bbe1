"""Checks from shapes alone that a train state fits in memory, before anything is allocated."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from mpjax.errors import ConfigError
from mpjax.typing import PyTree

if TYPE_CHECKING:
    from mpjax.train.step import TrainState


def free_bytes(device: jax.Device) -> int:
    """Returns the memory that a device has left: an accelerator's own, or the host's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_room(
    state: TrainState, shardings: TrainState | None = None, frozen: PyTree = None
) -> int:
    """Checks that weights, optimizer state and gradients fit, without activations.

    Args:
      state: an abstract TrainState.
      shardings: of its leaves, or None on one device.
      frozen: arrays that the step reads; those that are not on its devices are copied to each.

    Returns:
      Bytes needed on each device (hosts' CPU devices share one memory, and count together).

    Raises:
      ConfigError: they need more than is free.

    Example:
      >>> import optax
      >>> from mpjax.models import decoder
      >>> from mpjax.optim import wrap
      >>> from mpjax.train import init_state
      >>> model = decoder("llama-7b", "bf16")
      >>> opt = wrap(optax.adamw(1e-4), model.precision)
      >>> init = lambda: init_state(model.init(jax.random.key(0)), opt)
      >>> require_room(jax.eval_shape(init))  # doctest: +SKIP
      Traceback (most recent call last):
      mpjax.errors.ConfigError: memory: 6.74e+09 parameters need 107.8 GB for weights, ...
    """

    def size(tree: PyTree, cut: PyTree) -> int:
        leaves = jax.tree.leaves(tree)
        shapes = [leaf.shape for leaf in leaves]
        if cut is not None:
            pairs = zip(jax.tree.leaves(cut), shapes, strict=True)
            shapes = [sharding.shard_shape(shape) for sharding, shape in pairs]
        return sum(math.prod(s) * x.dtype.itemsize for s, x in zip(shapes, leaves, strict=True))

    need = size(state, shardings)
    need += size(state.params, None if shardings is None else shardings.params)  # gradients
    devices = jax.devices() if shardings is None else list(jax.tree.leaves(shardings)[0].device_set)
    there = set(devices[:1] if shardings is None else devices)
    for x in jax.tree.leaves(frozen):
        if not isinstance(x, jax.Array) or (shardings is not None and x.devices() != there):
            need += x.nbytes
    local = [d for d in devices if d.process_index == jax.process_index()]
    if local[0].platform == "cpu" and shardings is not None:
        need *= len(local)
    free = free_bytes(local[0])
    if need > free:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        other = "" if frozen is None else ", frozen arrays"
        raise ConfigError(
            f"memory: {count:.3g} parameters need {need / 1e9:.1f} GB for weights, optimizer state"
            f"{other} and gradients, {free / 1e9:.1f} GB is free on {local[0].device_kind}; choose"
            " a smaller model, cut it with --mesh fsdp=N over more devices, or store less"
            " (pure-bf16, moments=bf16)"
        )
    return need
