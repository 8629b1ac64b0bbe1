"""monitor: the same function, with statistics of its tensors beside its outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from mpjax.errors import ConfigError, brief, explains_calls, is_whole
from mpjax.interpret.core.control_flow import Rebind
from mpjax.interpret.core.location import Location, unmatched
from mpjax.interpret.core.retrace import Records, Result
from mpjax.interpret.core.trace import P, R, check_function, trace
from mpjax.interpret.core.walk import bind, scan_sizes, walk
from mpjax.interpret.monitor import measure
from mpjax.interpret.monitor.measure import Candidate, Pair, merge
from mpjax.interpret.monitor.report import KINDS, Monitored
from mpjax.interpret.monitor.statistics import Statistics
from mpjax.interpret.monitor.tensors import Leaf, Mark, Tensors, find_tensors
from mpjax.precision.rule import matches
from mpjax.typing import Array

_AT_ONCE = 2**26  # numbers that may wait for each other: 256 MiB
FORMATS = ("e4m3", "e5m2", "bf16", "fp16")


class Pending(NamedTuple):
    """A tensor that waits to be measured."""

    kind: str
    name: str
    x: Array
    layered: bool = False


class _Monitor:
    """One evaluation of a function with its tensors measured.

    What it records is counts and reals under (kind, name, number of the call, which of the two).
    """

    def __init__(
        self,
        tensors: Tensors,
        where: Sequence[str],
        what: Sequence[str],
        formats: tuple[Candidate, ...],
        sample: int,
    ) -> None:
        self._tensors, self._where, self._what = tensors, where, what
        self._formats, self._sample = formats, sample
        self._rebind = Rebind(fold=measure.fold)

    def run(self, closed: ClosedJaxpr, args: Sequence[Array]) -> Monitored:
        """Evaluates a program and returns what was measured."""
        outs, records, _ = self._evaluate(closed, args, Location(), whole=True)
        found: dict[str, dict[str, Any]] = {kind: {} for kind in Monitored._fields}
        for (kind, name), pair in _of_calls(records).items():
            found[kind][name] = Statistics(*pair, self._formats if kind in KINDS else ())
        for leaf in self._tensors.weights:
            if leaf.new is not None and "updates" in self._what and self._wants(leaf.name):
                same = _same_bits(args[leaf.argument], outs[leaf.new]).astype(jnp.float32)
                along = tuple(range(int(leaf.layered), same.ndim))
                found["unchanged"][leaf.name] = jnp.mean(same, axis=along)
        found["logit_max"] = {name: s.max for name, s in found["logit_max"].items()}
        found["gradient_ratio"] = {name: s.rms for name, s in found["gradient_ratio"].items()}
        return Monitored(**found)

    def _wants(self, path: str) -> bool:
        return any(pattern == "**" or matches(pattern, path) for pattern in self._where)

    def _evaluate(
        self, closed: ClosedJaxpr, args: Sequence[Array], outer: Location, whole: bool = False
    ) -> Result:
        records: Records = {}
        pending: list[Pending] = []
        squares: dict[str, Array] = {}  # of this jaxpr only: a value inside a loop cannot leave it

        def visit(eqn: JaxprEqn, location: Location, values: list[Array]) -> list[Array]:
            def run(inner: ClosedJaxpr, xs: Sequence[Array], number: int) -> Result:
                return self._evaluate(inner, xs, location)

            result = self._rebind(eqn, values, run)
            outs = bind(eqn, values) if result is None else result.outs
            for kind, name, pair in _pairs(result.records) if result is not None else ():
                _put(records, kind, name, pair if self._keeps_axis(eqn) else merge(pair))
            for mark in self._tensors.marks.get(id(eqn), ()):
                x = values[mark.at] if mark.at >= 0 else outs[-1 - mark.at]
                self._record(mark, location.path, x, pending, squares)
            if sum(p.x.size for p in pending) > _AT_ONCE:
                self._measure(pending, records)
            return outs

        outs = walk(closed, args, visit, outer, lines=False)
        if whole:
            for leaf in self._tensors.weights:
                self._leaf(leaf, args, outs, pending)
        self._measure(pending, records)
        return Result(outs, records)

    def _measure(self, pending: list[Pending], records: Records) -> None:
        """Measures what waits for it: tensors for the formats, and numbers of other kinds."""
        for stored in (True, False):
            chosen = [p for p in pending if (p.kind in KINDS) == stored]
            formats = self._formats if stored else ()
            tensors = [(p.x, p.layered) for p in chosen]
            pairs = measure.measure(tensors, formats, self._shares(chosen))
            for p, pair in zip(chosen, pairs, strict=True):
                _put(records, p.kind, p.name, pair)
        pending.clear()

    def _shares(self, pending: list[Pending]) -> list[int]:
        """How many numbers of each tensor are measured: those of one name share the sample.

        Each has its part of it by its size, so that what is joined is a sample of the whole.
        """
        rows = [p.x.size // (p.x.shape[0] if p.layered else 1) for p in pending]
        whole: dict[tuple[str, str], int] = {}
        for p, size in zip(pending, rows, strict=True):
            whole[p.kind, p.name] = whole.get((p.kind, p.name), 0) + size
        return [
            -(-self._sample * size // max(whole[p.kind, p.name], 1))
            for p, size in zip(pending, rows, strict=True)
        ]

    def _keeps_axis(self, eqn: JaxprEqn) -> bool:
        """Whether what is recorded inside has no axis of repetitions, or one that is of layers.

        A scan is over layers if it takes a weight, by its shape, slice by slice.
        """
        if eqn.primitive.name != "scan":
            return eqn.primitive.name != "shard_map"
        taken = eqn.invars[sum(scan_sizes(eqn)) :]
        shapes = [tuple(getattr(v.aval, "shape", ())) for v in taken]
        return any(len(shape) > 1 and shape in self._tensors.shapes for shape in shapes)

    def _record(
        self, mark: Mark, path: str, x: Array, pending: list[Pending], squares: dict[str, Array]
    ) -> None:
        if not self._wants(mark.name or path):
            return
        name = mark.name or (f"{path}:{mark.role}" if path else mark.role)
        if mark.kind == "squares":
            squares[name] = x
        elif mark.kind == "roots" and name in squares and "gradients" in self._what:
            ratio = _ratio(squares[name].astype(jnp.float32), x.astype(jnp.float32))
            pending.append(Pending("gradient_ratio", name, ratio, mark.layered))
        elif mark.kind == "logits" and "activations" in self._what:
            pending.append(Pending("logit_max", path or "softmax", jnp.max(x)))
        elif mark.kind in self._what:
            pending.append(Pending(mark.kind, name, x, mark.layered))

    def _leaf(
        self, leaf: Leaf, args: Sequence[Array], outs: Sequence[Array], pending: list[Pending]
    ) -> None:
        """Measures a weight and what the program returns for it."""
        if not self._wants(leaf.name):
            return
        found = {"weights": args[leaf.argument]}
        if leaf.new is not None:
            old, new = args[leaf.argument], measure.as_stored(outs[leaf.new])
            found["updates"] = new.astype(jnp.float32) - old.astype(jnp.float32)
        if leaf.gradient is not None:
            found["gradients"] = outs[leaf.gradient]
        for kind, x in found.items():
            if kind in self._what:
                pending.append(Pending(kind, leaf.name, x, leaf.layered))


def _ratio(g: Array, v: Array) -> Array:
    """g / sqrt(v); zero where v is zero, as before the first step."""
    return jnp.where(v > 0, g * lax.rsqrt(jnp.where(v > 0, v, jnp.float32(1))), jnp.float32(0))


def _same_bits(a: Array, b: Array) -> Array:
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[a.dtype.itemsize]
    return lax.bitcast_convert_type(a, bits) == lax.bitcast_convert_type(b, bits)


def _put(records: Records, kind: str, name: str, pair: Pair) -> None:
    call = 0
    while (kind, name, call, "counts") in records:
        call += 1
    records[kind, name, call, "counts"], records[kind, name, call, "reals"] = pair


def _pairs(records: Records) -> Iterator[tuple[str, str, Pair]]:
    """What was recorded, with kind and name."""
    for (kind, name, call, part), counts in records.items():
        if part == "counts":
            yield str(kind), str(name), (counts, records[kind, name, call, "reals"])


def _of_calls(records: Records) -> dict[tuple[str, str], Pair]:
    """Joins the records of several calls of one name; those of other leading axes stay apart."""
    calls: dict[tuple[str, str, tuple[int, ...]], list[Pair]] = {}
    for kind, name, pair in _pairs(records):
        calls.setdefault((kind, name, pair[0].shape), []).append(pair)
    found: dict[tuple[str, str], Pair] = {}
    for (kind, name, _), pairs in calls.items():
        while (kind, name) in found:
            name += "'"
        counts, reals = (jnp.stack(parts) for parts in zip(*pairs, strict=True))
        found[kind, name] = merge((counts, reals)) if len(pairs) > 1 else pairs[0]
    return found


@explains_calls
def monitor(
    fn: Callable[P, R],
    where: str | Sequence[str] = "**",
    what: Sequence[str] = KINDS,
    formats: Sequence[str] = FORMATS,
    sample: int = 0,
) -> Callable[P, tuple[R, Monitored]]:
    """Returns a function that also returns statistics of the tensors in it.

    Nothing of the function changes: its outputs, and their gradients, are those of `fn` itself.
    The statistics come from a second evaluation beside it, through which no gradient flows; where
    only they are used (`jax.jit(lambda *a: monitor(fn)(*a)[1])`) XLA leaves the first one out.
    Called every N steps on the arguments of a step, before the step that donates them, such a
    compiled function costs nothing between and changes no bit of the training.

    Statistics of tensors in a scan over layers (one that takes weights slice by slice) have a
    leading axis; those of other loops, of microbatches and shards, and of several calls at one
    line of a module, are joined.

    Args:
      fn: any function of JAX arrays: a loss, its gradient, a whole train step. Weights are the
        leaves below `params` in its arguments, else those of the first argument. Where it returns
        something for each of them, these are new weights (made of the old ones by sums and casts)
        or gradients.
      where: patterns of the paths to look at, as in rules.
      what: which kinds: `weights activations gradients activation_gradients updates`.
      formats: what each tensor might be stored in, names of Formats; `bf16` and `fp16` too.
      sample: how many numbers of each tensor, and of each layer, are measured, drawn once, one from
        each of so many equal parts; 0 is all. The largest and the smallest number of the whole
        tensor are always among them, and so is a NaN; all else is then an estimate: with 4096 the
        shares are off by 0.02 points on average, by 1.6 at worst. All numbers cost as much as 6
        to 12 steps, 4096 as 1.5 to 2.5. Tensors of one name share the sample by size.

    Returns:
      A function of the same arguments that returns `(outputs, Monitored)`. Jit it: otherwise it
      runs operation by operation.

    Raises:
      ConfigError: an unknown kind or format; when called, a pattern that matches nothing, or a
        function that cannot be traced.

    Example:
      >>> import jax
      >>> loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]))
      >>> params, x = {"w": jnp.full((3, 2), 1e-6)}, jnp.ones((4, 3))
      >>> (value, stats), grads = jax.value_and_grad(monitor(loss), has_aux=True)(params, x)
      >>> sorted(stats.activations), float(stats.weights["w"].underflow("e4m3"))
      (['lhs', 'product'], 1.0)
    """
    check_function("monitor", fn)
    if not isinstance(what, list | tuple | set) or not all(kind in KINDS for kind in what):
        raise ConfigError(f"monitor: what={brief(what)} must be a list of: {' '.join(KINDS)}")
    if not is_whole(sample, 0):
        raise ConfigError(
            f"monitor: sample={brief(sample)} must be a whole number, not negative; 0 measures all"
            " numbers"
        )
    if not isinstance(where, str | list | tuple):
        raise ConfigError(f"monitor: where={brief(where)}; write path patterns, such as ['**/mlp']")
    patterns = (where,) if isinstance(where, str) else tuple(where)
    found = measure.candidates(formats)

    @functools.wraps(fn)
    def monitored(*args: P.args, **kwargs: P.kwargs) -> tuple[R, Monitored]:
        program = trace("monitor", fn, args, kwargs, runs=True)
        tensors = find_tensors(program)
        _check(patterns, tensors.paths, [leaf.name for leaf in tensors.weights])
        still = [lax.stop_gradient(jnp.asarray(x)) for x in program.args]
        # Behind a barrier, so that XLA fuses the function's own operations as without a monitor.
        still = lax.optimization_barrier(still)
        stats = _Monitor(tensors, patterns, tuple(what), found, sample).run(program.closed, still)
        return fn(*args, **kwargs), stats

    return monitored


def _check(patterns: Sequence[str], paths: Sequence[str], weights: Sequence[str]) -> None:
    known = [path for path in (*paths, *weights) if path]
    for pattern in patterns:
        if pattern != "**" and not any(matches(pattern, path) for path in known):
            raise ConfigError(
                f"monitor: where={pattern!r} matches no path of the function;"
                f" {unmatched(pattern, paths, weights)}"
            )
