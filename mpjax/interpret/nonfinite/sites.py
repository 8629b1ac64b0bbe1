"""Sites, the operations that could make an infinity or a NaN, and reading what they recorded.

A record is a row of int32: a code, see `fault`, and the iterations (from 1) of the `while` loops
around the site, from outside in. Scans and shards of a `shard_map` stack records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from mpjax.interpret.core.location import Location, location_of
from mpjax.interpret.core.retrace import Records
from mpjax.interpret.nonfinite.direction import holders
from mpjax.interpret.nonfinite.fault import FINE, NAN
from mpjax.typing import Array

WHILES = 3  # nested `while` loops whose iterations are told apart
HEAD = 1 + WHILES
FLAGS, RANGES, MASK = "flags", "ranges", "mask"  # before the key of what they are of
SEEN = NAN + 1  # the code of an output that is not finite, without fault or not checked for one

# A site is known by the numbers of the equations that hold it, from outside in, and its own; None
# stands for an iteration.
Key: TypeAlias = tuple[int | None, ...]


class Site(NamedTuple):
    """An operation that could make an infinity or a NaN.

    Args:
      eqn: its equation.
      location: where it stands, without its line.
      levels: what is around it, from outside in: `scan`, `reverse` (a scan from its end), `while`
        or `shard` (of a `shard_map`).
    """

    eqn: JaxprEqn
    location: Location
    levels: tuple[str, ...]


class Found(NamedTuple):
    """A site that was not finite, and when it was so first.

    Args:
      key: the site.
      order: the key with its iterations; smaller is earlier.
      layers: the iterations alone, from outside in.
      shards: indices of the shards of `shard_map` around it in which it was not finite.
      stands: the index of its record in the recorded array.
      code: see `fault`; `SEEN` where it is no fault, or was not checked for one.
    """

    key: Key
    order: tuple[int, ...]
    layers: tuple[int, ...]
    shards: tuple[int, ...]
    stands: tuple[int, ...]
    code: int


def first(old: Array, new: Array, iteration: Array) -> Array:
    """The fold of `while`: the first fault stays, with its iteration; else the first record."""
    number = jnp.broadcast_to(iteration + 1, (*new.shape[:-1], 1)).astype(new.dtype)
    parts = [new[..., :1], number, new[..., 1 : HEAD - 1], new[..., HEAD:]]
    before, now = old[..., :1], new[..., :1]
    fault = (now > FINE) & (now < SEEN)
    take = ((before == FINE) & (now != FINE)) | ((before == SEEN) & fault)
    return jnp.where(take, jnp.concatenate(parts, -1), old)


def when(site: Site, key: Key, record: np.ndarray) -> Found:
    """Returns when a site was not finite first; at fault first, if ever.

    Args:
      site: the site.
      key: of it.
      record: its record, with the axes of scans and shards.
    """
    times = [_at(site, key, record, tuple(index)) for index in np.argwhere(record[..., 0])]
    times = [f for f in times if f.code < SEEN] or times
    earliest = min(times, key=lambda f: (f.order, f.shards))
    shards = {f.shards for f in times if f.order == earliest.order and f.shards}
    return earliest._replace(shards=tuple(sorted(s for each in shards for s in each)))


def _at(site: Site, key: Key, record: np.ndarray, index: tuple[int, ...]) -> Found:
    value = record[index]
    whiles, axes = iter(value[1:HEAD]), iter(index)
    layers, shards, times = [], [], []
    for level in site.levels:
        number = int(next(whiles, 1)) - 1 if level == "while" else int(next(axes))
        if level == "shard":
            shards.append(number)
        else:
            layers.append(number)
            times.append(-number if level == "reverse" else number)
    left = iter(times)
    order = tuple(next(left) if part is None else part for part in key)
    return Found(key, order, tuple(layers), tuple(shards), index, int(value[0]))


def found_in(
    sites: Mapping[Key, Site], site_keys: Mapping[Key, Sequence[Key]], records: Records
) -> Iterator[Found]:
    """Yields the sites that were not finite or at fault.

    Args:
      sites: all sites.
      site_keys: for each jaxpr, the sites whose records are stacked in its own, in order.
      records: what was recorded, by key.
    """
    for site_codes, keys in site_keys.items():
        flags = np.asarray(records[FLAGS, *site_codes])
        for number, key in enumerate(keys):
            record = flags[..., number, :]
            if record[..., 0].any():
                yield when(sites[key], key, record)


def level(eqn: JaxprEqn) -> tuple[str, ...]:
    """Returns what an equation puts around the sites in it, see `Site`."""
    if eqn.primitive.name == "scan":
        return ("reverse" if eqn.params["reverse"] else "scan",)
    return {"while": ("while",), "shard_map": ("shard",)}.get(eqn.primitive.name, ())


def output_key(closed: ClosedJaxpr, number: int) -> Key:
    """Returns the key under which an output of a program is recorded; no site has it."""
    return len(closed.jaxpr.eqns), number


def location_at(closed: ClosedJaxpr, key: Key) -> Location:
    """Returns where a site stands, with its source line."""
    location = Location()
    for jaxpr, index in holders(closed, key):
        location = location_of(jaxpr.eqns[index], location)
    return location


def packed(codes: Sequence[Array]) -> Array:
    """Returns codes as records: each with room for the iterations of the loops around it.

    Args:
      codes: each a bool, whether all is finite, or an int32 code; the bools first.
    """
    fine = [code for code in codes if code.dtype == jnp.bool_]
    parts = [jnp.where(jnp.stack(fine), jnp.int32(FINE), jnp.int32(SEEN))] if fine else []
    parts += [jnp.stack(codes[len(fine) :])] if len(fine) < len(codes) else []
    column = jnp.concatenate(parts)[:, None]
    return jnp.concatenate([column, *[jnp.zeros_like(column)] * WHILES], axis=1)
