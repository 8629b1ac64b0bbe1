"""The first fault that matters, among all that a program makes.

An infinity that nobody feels is no fault: `where(x > 0, log(x), 0)` at 0, `minimum(1, 1 / norm)` at
norm 0. Whether one is felt is tried: in a program in which every fault is repaired (the nearest
finite number in its place) one of them is let through. If an output changes, it matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr

from mpjax.interpret.sites import SEEN, Found, Key
from mpjax.interpret.watch import Watch

_AT_ONCE = 32  # sites that are looked at closely in one more program


class Culprit(NamedTuple):
    """The first fault that matters.

    Args:
      found: the site and when it broke.
      others: sites that are not finite without it too.
      watch: the plain run.
      records: of the run in which it alone was let through.
    """

    found: Found
    others: frozenset[Key]
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
    bad, checked, watch, healthy = plain.found(records), [], plain, None
    while new := [f.key for f in bad if f.key not in checked][:_AT_ONCE]:
        checked += new
        watch = Watch(closed, checked=tuple(checked), shards=shards)
        records, healthy = watch(args, checked)
        bad = watch.found(records)
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
    if felt == healthy and not any(nan for _, nan in felt):
        return None
    # no fault alone is felt, together they are
    return _alone(plain, watch, args, found[0].key, records)


def _alone(
    plain: Watch, watch: Watch, args: Sequence[Any], key: Key, records: dict[Any, Any]
) -> Culprit:
    (found,) = [f for f in watch.found(records) if f.key == key]
    without, _ = watch(args, [key])
    others = frozenset(f.key for f in watch.found(without)) - {key}
    return Culprit(found, others, plain, records)
