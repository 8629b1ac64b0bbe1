"""A jaxpr traced again, through a transform, at other dtypes and with recorded values behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr
from jax.interpreters.partial_eval import DynamicJaxprTracer

from mpjax.formats import widest

Records = dict[Any, Any]


class Result(NamedTuple):
    """What a jaxpr or an equation gave.

    Args:
      outs: its outputs.
      records: what was recorded in it, by key.
      note: what the transform wants to know about the outputs at trace time.
    """

    outs: list[Any]
    records: Records = {}
    note: Any = None


# Evaluates one of an equation's jaxprs: of a `while` the test is 0 and the body 1, of a `cond` its
# number is the branch's.
Run = Callable[[ClosedJaxpr, Sequence[Any], int], Result]


def is_float(x: Any) -> bool:
    """Returns whether a value or aval is a real floating-point array."""
    return _floating(x.dtype)


@functools.cache
def _floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)  # slow, and asked of every argument


def cast(x: Any, dtype: Any) -> Any:
    """Returns a floating-point value in another dtype; everything else as it is."""
    if x.dtype == dtype or not is_float(x):
        return x
    if is_staged(x):  # as below, without the way through jit
        return lax.convert_element_type_p.bind(
            x, new_dtype=jnp.dtype(dtype), weak_type=False, sharding=None
        )
    return _convert(jnp.dtype(dtype))(x)


def is_staged(x: Any) -> bool:
    """Returns whether a value is written into a jaxpr, as under jit: nothing is worked out."""
    return isinstance(x, DynamicJaxprTracer)


@functools.cache
def _convert(dtype: Any) -> Callable[[Any], Any]:
    """A cast whose derivative JAX keeps."""
    return jax.jit(lambda x: lax.convert_element_type(x, dtype), inline=True)


class Traced(NamedTuple):
    """A jaxpr after a transform.

    Args:
      closed: it, with the recorded values behind its own outputs.
      consts: values that became its first inputs.
      keys: names of the recorded values.
      note: what the transform noted.
    """

    closed: ClosedJaxpr
    consts: tuple[Any, ...]
    keys: tuple[Any, ...]
    note: Any

    @property
    def own(self) -> int:
        """How many of the outputs are its own."""
        return len(self.closed.out_avals) - len(self.keys)

    def split(self, outs: Sequence[Any]) -> Result:
        """Returns the outputs with what was recorded by name."""
        records = dict(zip(self.keys, outs[self.own :], strict=True))
        return Result(list(outs[: self.own]), records, self.note)


def retrace(
    fn: Callable[..., Result], avals: Sequence[Any], held: ClosedJaxpr | None = None
) -> Traced:
    """Traces a function of values at their avals, which keep sharding and varying axes.

    Args:
      fn: evaluates a jaxpr.
      avals: of its inputs.
      held: that jaxpr, whose name and source the new one takes; by default it has its own.
    """
    recorded: list[tuple[tuple[Any, ...], Any]] = []

    def flat(*args: Any) -> list[Any]:
        outs, records, note = fn(*args)
        recorded.append((tuple(records), note))
        return [*outs, *records.values()]

    closed = jax.make_jaxpr(flat)(*avals)
    jaxpr, consts = closed.jaxpr, tuple(closed.consts)
    if held is not None:
        source = held.jaxpr.debug_info.func_src_info
        jaxpr = jaxpr.replace(debug_info=jaxpr.debug_info._replace(func_src_info=source))
        closed = ClosedJaxpr(jaxpr, consts)
    if consts:
        info = jaxpr.debug_info.with_unknown_names()
        jaxpr = jaxpr.replace(
            constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], debug_info=info
        )
        closed = ClosedJaxpr(jaxpr, ())
    return Traced(closed, consts, *recorded[0])


def at_least(outs: Sequence[Any], carry: Sequence[Any]) -> list[Any]:
    """Returns a loop's outputs, those carried at least as wide as the carry came in."""
    results = [
        cast(x, widest(x.dtype, c.dtype)) if is_float(x) else x
        for x, c in zip(outs, carry, strict=False)
    ]
    return [*results, *outs[len(results) :]]


def widen(carry: list[Any], body: Traced) -> bool:
    """Casts a loop's carry to what its body gives; returns whether that changed anything."""
    wanted = [aval.dtype for aval in body.closed.out_avals[: len(carry)]]
    changed = wanted != [c.dtype for c in carry]
    carry[:] = [cast(c, dtype) for c, dtype in zip(carry, wanted, strict=True)]
    return changed
