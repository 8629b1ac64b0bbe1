"""A `shard_map` around what a transform makes of its body."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.interpret.core.retrace import Result, Run, as_closed
from mpjax.typing import Array


def varying(x: Array, axes: Sequence[str]) -> Array:
    """Returns a value as one that differs between the shards of a `shard_map` along these axes."""
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def zeros(aval: ShapedArray) -> Array:
    """Returns zeros of a shape and dtype that differ between shards as their type says."""
    return varying(jnp.zeros(aval.shape, aval.dtype), sorted(aval.manual_axis_type.varying))


def gathered(x: Array) -> Array:
    """Returns an array whole, where its type says how an Explicit mesh cuts it."""
    sharding = jax.typeof(x).sharding
    if not any(part is not None for part in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def agreed(mask: Array, x: Array) -> Array:
    """Returns a mask that differs between shards only along the axes along which x does."""
    extra = jax.typeof(mask).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return lax.pmax(mask.astype(jnp.int32), tuple(sorted(extra))) > 0 if extra else mask


def run_shards(eqn: JaxprEqn, args: Sequence[Array], run: Run) -> Result:
    """Runs a `shard_map` with its jaxpr evaluated by `run`, and records of each shard."""
    p, traced = eqn.params, []
    axes = tuple(axis for axis in p["mesh"].axis_names if axis in p["newly_manual_axes"])

    def inner(*xs: Array) -> tuple[tuple[Array, ...], list[Array]]:
        outs, records, bounds = run(as_closed(p["jaxpr"]), xs, 0)
        traced.append((tuple(records), bounds))
        differ = axes if p["check_vma"] else ()
        return tuple(outs), [varying(x, differ)[None] for x in records.values()]

    outs, recorded = jax.shard_map(
        inner,
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=(tuple(p["out_specs"]), PartitionSpec(axes)),
        axis_names=set(axes),
        check_vma=p["check_vma"],
    )(*args)
    keys, bounds = traced[0]
    return Result(list(outs), dict(zip(keys, recorded, strict=True)), bounds)
