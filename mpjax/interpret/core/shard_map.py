"""A `shard_map` around what a transform makes of its body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.interpret.core.retrace import Result, Run


def varying(x: Any, axes: Sequence[str]) -> Any:
    """Returns a value as one that differs between the shards of a `shard_map` along these axes."""
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def gathered(x: Any) -> Any:
    """Returns an array whole, where its type says how an Explicit mesh cuts it."""
    sharding = jax.typeof(x).sharding
    if not any(part is not None for part in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def agreed(mask: Any, x: Any) -> Any:
    """Returns a mask that differs between shards only along the axes along which x does."""
    extra = jax.typeof(mask).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return lax.pmax(mask.astype(jnp.int32), tuple(sorted(extra))) > 0 if extra else mask


def run_shards(eqn: JaxprEqn, args: Sequence[Any], run: Run) -> Result:
    """Runs a `shard_map` with its jaxpr evaluated by `run`, and records of each shard."""
    p, traced = eqn.params, []
    axes = tuple(axis for axis in p["mesh"].axis_names if axis in p["newly_manual_axes"])
    held = p["jaxpr"] if isinstance(p["jaxpr"], ClosedJaxpr) else ClosedJaxpr(p["jaxpr"], ())

    def inner(*xs: Any) -> tuple[tuple[Any, ...], list[Any]]:
        outs, records, note = run(held, xs, 0)
        traced.append((tuple(records), note))
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
    keys, note = traced[0]
    return Result(list(outs), dict(zip(keys, recorded, strict=True)), note)
