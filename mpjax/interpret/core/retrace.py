"""A jaxpr traced again, through a transform, at other dtypes and with recorded values behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import AbstractValue, Atom, ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import DynamicJaxprTracer

from mpjax.typing import Array, DType, DTypeLike

RecordKey: TypeAlias = tuple[str | int | None, ...]  # each transform has its own
Records: TypeAlias = dict[RecordKey, Array]
Bounds: TypeAlias = Sequence[float | None]


class Result(NamedTuple):
    """What a jaxpr or an equation gave.

    Args:
      outs: its outputs.
      records: what was recorded in it, by key.
      bounds: where autocast evaluates, the bound of each output that is a weak constant, or None.
    """

    outs: list[Array]
    records: Records = {}
    bounds: Bounds = ()


# Evaluates one of an equation's jaxprs: of a `while` the test is 0 and the body 1, of a `cond` its
# number is the branch's.
Run: TypeAlias = Callable[[ClosedJaxpr, Sequence[Array], int], Result]


def as_closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """Returns a jaxpr without constants, as some equations hold it, as a closed one."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def aval_of(atom: Atom | SymbolicZero) -> ShapedArray:
    """Returns the shape and dtype of a variable; of a token or a reference these are missing."""
    aval: Any = atom.aval
    return aval


def avals_of(values: Sequence[Array]) -> list[ShapedArray]:
    """Returns the avals of values, with sharding and varying axes."""
    return [jax.typeof(x) for x in values]


def is_float(x: object) -> bool:
    """Returns whether a value or aval is a real floating-point array."""
    return _floating(getattr(x, "dtype", None))


@functools.cache
def _floating(dtype: DType | None) -> bool:
    # cached: slow, and asked of every argument
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def cast(x: Array, dtype: DTypeLike) -> Array:
    """Returns a floating-point value in another dtype; everything else as it is."""
    if x.dtype == dtype or not is_float(x):
        return x
    if is_staged(x):  # as below, without the way through jit
        return lax.convert_element_type_p.bind(
            x, new_dtype=jnp.dtype(dtype), weak_type=False, sharding=None
        )
    return _convert(jnp.dtype(dtype))(x)


def is_staged(x: object) -> bool:
    """Returns whether a value is written into a jaxpr, as under jit: nothing is worked out."""
    return isinstance(x, DynamicJaxprTracer)


@functools.cache
def _convert(dtype: DType) -> Callable[[Array], Array]:
    """A cast whose derivative JAX keeps."""
    return jax.jit(lambda x: lax.convert_element_type(x, dtype), inline=True)


class Traced(NamedTuple):
    """A jaxpr after a transform.

    Args:
      closed: it, with the recorded values behind its own outputs.
      consts: values that became its first inputs.
      keys: of the recorded values.
      bounds: as in `Result`.
    """

    closed: ClosedJaxpr
    consts: tuple[Array, ...]
    keys: tuple[RecordKey, ...]
    bounds: Bounds

    @property
    def avals(self) -> list[ShapedArray]:
        """The types of its own outputs."""
        return self.closed.out_avals[: len(self.closed.out_avals) - len(self.keys)]

    @property
    def recorded(self) -> dict[RecordKey, ShapedArray]:
        """The types of the recorded values, by key."""
        return dict(zip(self.keys, self.closed.out_avals[len(self.avals) :], strict=True))

    def split(self, outs: Sequence[Array]) -> Result:
        """Returns the outputs with what was recorded by key."""
        own = len(self.avals)
        return Result(list(outs[:own]), dict(zip(self.keys, outs[own:], strict=True)), self.bounds)


def retrace(
    fn: Callable[..., Result], avals: Sequence[AbstractValue], held: ClosedJaxpr | None = None
) -> Traced:
    """Traces a function of values at their avals, which keep sharding and varying axes.

    Args:
      fn: evaluates a jaxpr.
      avals: of its inputs.
      held: that jaxpr, whose name and source the new one takes; by default it has its own.
    """
    recorded: list[tuple[tuple[RecordKey, ...], Bounds]] = []

    def flat(*args: Array) -> list[Array]:
        outs, records, bounds = fn(*args)
        recorded.append((tuple(records), bounds))
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
