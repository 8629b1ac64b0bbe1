"""The first fault that matters, among all that a program makes.

An infinity that does not reach an output or a finiteness check is ignored, as in
`where(x > 0, log(x), 0)` at 0 or `minimum(1, 1 / norm)` at norm 0 (see `propagation`). If none
reaches one, a fault may still have made wrong finite numbers, as in 1 / (1 + inf). To find out,
every fault of a program but one is repaired (replaced by the nearest finite number), for each fault
in turn. If an output differs from that of the program with all faults repaired, the fault matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from mpjax.interpret.core.retrace import Records
from mpjax.interpret.nonfinite.fault import can_make, is_inexact
from mpjax.interpret.nonfinite.instrument import Digests, InstrumentedProgram
from mpjax.interpret.nonfinite.propagation import Propagation
from mpjax.interpret.nonfinite.sites import SEEN, Found, Key, Site
from mpjax.typing import Array

_FIRST, _AT_ONCE = 8, 32  # sites that one more program checks: the first one, later ones


class FirstFault(NamedTuple):
    """The first fault that matters.

    Args:
      found: the site and when it broke.
      others: sites that are not finite for other reasons.
      reached: whether an output is not finite because of it, and not only wrong.
      outs: the numbers of the outputs that are not finite because of it.
      instrumented: the plain run.
      records: of the run in which it was checked.
    """

    found: Found
    others: frozenset[Key]
    reached: bool
    outs: frozenset[int]
    instrumented: InstrumentedProgram
    records: Records

    @property
    def site(self) -> Site:
        """The operation."""
        return self.instrumented.sites[self.found.key]


def find_first_fault(closed: ClosedJaxpr, args: Sequence[Array], shards: bool) -> FirstFault | None:
    """Returns the first fault that affects an output, or None.

    Args:
      closed: the program.
      args: its arguments.
      shards: whether to look at which devices it broke on.
    """
    plain = InstrumentedProgram(closed)
    records, _ = plain(args)
    checked: list[Key] = []
    instrumented: InstrumentedProgram | None = None
    healthy: Digests = []
    nonfinite = plain.found(records)
    broken = frozenset(f.key for f in nonfinite)
    while new := [
        f.key for f in nonfinite if f.key not in checked and can_make(plain.sites[f.key].eqn)
    ]:
        checked += new[: _AT_ONCE if checked else _FIRST]
        only = frozenset(checked)
        looked = InstrumentedProgram(closed, checked=tuple(checked), shards=shards, only=only)
        records, _ = looked(args)
        found = [f for f in looked.found(records) if f.key in checked and f.code < SEEN]
        for one in found:
            propagation = Propagation(closed, {one.key}, plain.sites, broken)
            if propagation.affects_output:
                others = broken - propagation.reached_sites
                return FirstFault(one, others, True, propagation.outs, plain, records)
        if found:  # finite numbers that they made wrong need a program that repairs them
            instrumented = InstrumentedProgram(closed, checked=tuple(checked), shards=shards)
            records, healthy = instrumented(args, checked)
            nonfinite = instrumented.found(records)
    if instrumented is None:
        return None
    # All others are finite by now, or not finite for a reason that is no fault.
    found = [f for f in nonfinite if f.code < SEEN]
    keys = [f.key for f in found]
    for one in found:
        records, outputs = instrumented(args, [key for key in keys if key != one.key])
        if outputs != healthy:
            return _alone(plain, instrumented, args, one.key, records)
    if not found:
        return None
    records, outputs = instrumented(args)
    nan_among_inputs = any(is_inexact(x) and bool(jnp.any(jnp.isnan(x))) for x in args)
    if outputs == healthy and (nan_among_inputs or not any(nan for _, nan in outputs)):
        return None
    # no fault alone affects an output, together they do
    return _alone(plain, instrumented, args, found[0].key, records)


def _alone(
    plain: InstrumentedProgram,
    instrumented: InstrumentedProgram,
    args: Sequence[Array],
    key: Key,
    records: Records,
) -> FirstFault:
    (found,) = [f for f in instrumented.found(records) if f.key == key]
    without, _ = instrumented(args, [key])
    others = frozenset(f.key for f in instrumented.found(without)) - {key}
    return FirstFault(found, others, False, frozenset(), plain, records)
