"""The first fault that matters, among all that a program makes.

An infinity that nobody feels is no fault: `where(x > 0, log(x), 0)` at 0, `minimum(1, 1 / norm)` at
norm 0. One matters that comes through to an output, or to what a gate asks whether it is finite,
see `reach`. If none does, one may matter that left finite numbers behind, as in 1 / (1 + inf).
That is tried: in a program in which every fault is repaired (the nearest finite number in its
place) one of them is let through. If an output changes, it matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from mpjax.interpret.nonfinite.fault import can_make, is_number
from mpjax.interpret.nonfinite.instrument import Watch
from mpjax.interpret.nonfinite.propagation import Reach
from mpjax.interpret.nonfinite.sites import SEEN, Found, Key

_FIRST, _AT_ONCE = 8, 32  # sites that are looked at closely in one more program: at first, later


class Culprit(NamedTuple):
    """The first fault that matters.

    Args:
      found: the site and when it broke.
      others: sites that are not finite for other reasons.
      reached: whether it came through to an output, not only finite numbers that it left behind.
      outs: the numbers of the outputs that it came through to.
      watch: the plain run.
      records: of the run in which it was looked at.
    """

    found: Found
    others: frozenset[Key]
    reached: bool
    outs: frozenset[int]
    watch: Watch
    records: dict[Any, Any]


def first_culprit(closed: ClosedJaxpr, args: Sequence[Any], shards: bool) -> Culprit | None:
    """Returns the first fault that an output feels, or None.

    Args:
      closed: the program.
      args: its arguments.
      shards: whether to look at which devices it broke on.
    """
    plain = Watch(closed)
    records, _ = plain(args)
    checked: list[Key] = []
    watch: Watch | None = None
    healthy: Any = None
    bad = plain.found(records)
    broken = frozenset(f.key for f in bad)
    while new := [f.key for f in bad if _is_new(f, plain, checked)]:
        checked += new[: _AT_ONCE if checked else _FIRST]
        looked = Watch(closed, checked=tuple(checked), shards=shards, only=frozenset(checked))
        records, _ = looked(args)
        found = [f for f in looked.found(records) if f.key in checked and f.code < SEEN]
        for one in found:
            reach = Reach(closed, {one.key}, plain.sites, broken)
            if reach.felt:
                return Culprit(one, broken - reach.touched, True, reach.outs, plain, records)
        if found:  # what they left behind is looked for in a program that repairs them
            watch = Watch(closed, checked=tuple(checked), shards=shards)
            records, healthy = watch(args, checked)
            bad = watch.found(records)
    if watch is None:
        return None
    # All others are finite by now, or not finite for a reason that is no fault.
    found = [f for f in bad if f.code < SEEN]
    keys = [f.key for f in found]
    for one in found:
        records, felt = watch(args, [key for key in keys if key != one.key])
        if felt != healthy:
            return _alone(plain, watch, args, one.key, records)
    if not found:
        return None
    records, felt = watch(args)
    given = any(is_number(x) and bool(jnp.any(jnp.isnan(x))) for x in args)
    if felt == healthy and (given or not any(nan for _, nan in felt)):
        return None
    # no fault alone is felt, together they are
    return _alone(plain, watch, args, found[0].key, records)


def _is_new(found: Found, plain: Watch, checked: Sequence[Key]) -> bool:
    return found.key not in checked and can_make(plain.sites[found.key].eqn)


def _alone(
    plain: Watch, watch: Watch, args: Sequence[Any], key: Key, records: dict[Any, Any]
) -> Culprit:
    (found,) = [f for f in watch.found(records) if f.key == key]
    without, _ = watch(args, [key])
    others = frozenset(f.key for f in watch.found(without)) - {key}
    return Culprit(found, others, False, frozenset(), plain, records)
