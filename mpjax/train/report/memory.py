"""Bytes of live training state: by kind, in all and on the fullest device."""

from __future__ import annotations

import math
from collections import Counter

import jax

from mpjax.formats import is_quantized
from mpjax.train.step import TrainState


def _shards(leaf: jax.Array) -> list[tuple[jax.Device, int]]:
    return [(shard.device, shard.data.nbytes) for shard in leaf.addressable_shards]


def state_bytes(state: TrainState) -> dict[str, int]:
    """Returns the bytes of a train state by kind.

    A leaf that several devices hold whole is counted once per device: these bytes are really
    taken. An uneven shard is counted with its padding.

    Args:
      state: real arrays.

    Returns:
      `params`, `moments` (the optimizer's own state), `master` (float32 copies, or whatever the
      update rule keeps), `rest` (loss scale, counters, keys, and what replicas,
      objectives and schedules keep), `total`, and `device`, the largest
      sum on one device.
    """
    kinds = {
        "params": state.params,
        "moments": state.opt_state.inner,
        "master": state.opt_state.update_state,
        # All else, so that a part which is added to the state is counted too.
        "rest": state._replace(
            params=None,
            opt_state=state.opt_state._replace(inner=None, update_state={}),
        ),
    }
    sizes = {
        kind: sum(size for leaf in jax.tree.leaves(tree) for _, size in _shards(leaf))
        for kind, tree in kinds.items()
    }
    devices: Counter[jax.Device] = Counter()
    for leaf in jax.tree.leaves(state):
        for device, size in _shards(leaf):
            devices[device] += size
    return sizes | {"total": sum(sizes.values()), "device": max(devices.values())}


def _weights(state: TrainState) -> int:
    leaves = jax.tree.leaves(state.params, is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def bytes_per_parameter(state: TrainState) -> float:
    r"""Returns bytes of weights and optimizer state per weight, $(P + M + W + r) / n$.

    $P$ weights, $M$ moments, $W$ master copies, $r$ scales and counters, $n$ weights counted once.
    float32 Adam is 4 + 8 + 0 = 12; on several devices, copies that they share count each time.
    """
    return state_bytes(state)["total"] / _weights(state)


def formula(state: TrainState) -> str:
    """Returns `bytes_per_parameter` written out.

    Example:
      >>> import optax
      >>> from mpjax.models import decoder
      >>> from mpjax.train import build
      >>> state, _ = build(decoder("tiny", layers=1, width=16, heads=2), optax.sgd(0.1))
      >>> print(formula(state)[:35])
      (32960 params + 0 moments + 0 maste
    """
    size, count = state_bytes(state), _weights(state)
    parts = " + ".join(f"{size[kind]} {kind}" for kind in ("params", "moments", "master", "rest"))
    return f"({parts}) bytes / {count} parameters = {size['total'] / count:.3f}"
