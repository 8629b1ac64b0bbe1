r"""The mean of gradients over replicas, by narrow messages.

With $N$ replicas, gradients $g_i$ and residuals $e_i$, replica $i$ has $x_i = g_i + e_i$ to send:

  parts   $x_i$ is cut into $N$ rows; row $j$ goes encoded to replica $j$, which decodes what it got
          of all and averages it: $y_j = \frac{1}{N} \sum_i C(x_i)_j$
  means   $y_j$ goes encoded to all: the mean is $\bar g_j = C(y_j)$
  rest    $e_i \leftarrow x_i - C(x_i)$, and to its own row $i$ the replica adds $N (y_i - C(y_i))$

so that in every step $N \bar g + \sum_i e_i = \sum_i (g_i + e_i)$ up to the rounding of float32:
what is not sent in one step is sent in a later one.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from mpjax.errors import ConfigError, is_whole
from mpjax.optim.compression.codec import (
    Message,
    largest_count,
    largest_numbers,
    make_codec,
    message_bytes,
    orthonormal,
)
from mpjax.optim.per_layer.layer_stacks import stacks
from mpjax.paths import leaves_with_names
from mpjax.precision.compression import Compression
from mpjax.typing import Array, Grads, Params, Shape

Named: TypeAlias = dict[str, Array]  # by path


class ExchangeState(NamedTuple):
    """What a replica keeps between steps, by path of each weight that is compressed.

    Args:
      residual: what was not sent yet, in the shape of the weight; empty without feedback.
      momentum: running means, in the shape of the weight; empty without.
      basis: right factors of `powersgd`, (layers, columns, rank), alike in all replicas.
      steps: steps so far; None without a warm-up.
    """

    residual: Named
    momentum: Named
    basis: Named
    steps: Array | None


def compressed_paths(params: Params, compression: Compression) -> frozenset[str]:
    """Returns the paths of the weights that are compressed; the others are sent in float32.

    Args:
      params: whole weights, or their shapes.
      compression: settings; `least` counts the numbers of a whole weight.
    """
    sizes = {name: math.prod(x.shape) for name, x in leaves_with_names(params)}
    chosen = {name for name, size in sizes.items() if size >= max(1, compression.least)}
    if compression.kind == "powersgd":
        rank, found = compression.rank, _matrices(params)
        chosen = {n for n in chosen & found.keys() if _smaller(rank, *found[n][1:])}
    return frozenset(chosen)


def _smaller(rank: int, rows: int, columns: int) -> bool:
    return rank * (rows + columns) < rows * columns


def _matrices(params: Params) -> dict[str, tuple[int, int, int]]:
    """Weights as (layers, rows, columns); vectors are left out."""
    prefixes = tuple("/".join(path) + "/" for path in stacks(params))
    found = {}
    for name, x in leaves_with_names(params):
        layered = name.startswith(prefixes)
        layers, rest = (x.shape[0], x.shape[1:]) if layered else (1, x.shape)
        if len(rest) > 1:
            found[name] = layers, rest[0], math.prod(rest[1:])
    return found


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Takes the mean of gradients over replicas, inside a `jax.shard_map`.

    Args:
      compression: what is sent: a Compression or its text, such as `int8@256`.
      axis: name of the mesh axis that tells the replicas apart.
      replicas: its size.
      paths: of the weights that are compressed, where a device holds a part of each; by default
        `compressed_paths` of what a device holds.

    Raises:
      ConfigError: a text that is no compression, or fewer than two replicas.

    Example:
      >>> import numpy as np
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> def mean(g):
      ...     exchange = Exchange("bf16,min=0", "data", 2)
      ...     return exchange.mean(g[0], exchange.init(g[0]))[0]
      >>> if jax.device_count() > 1:
      ...     mesh = Mesh(np.array(jax.devices()[:2]), "data")
      ...     options = dict(in_specs=P("data"), out_specs=P(), check_vma=False)
      ...     both = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      ...     assert jax.shard_map(mean, mesh=mesh, **options)(both).tolist() == [2.0, 4.0]
    """

    compression: Compression
    axis: str
    replicas: int
    paths: frozenset[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "compression", Compression.parse(self.compression))
        if self.compression.kind == "none":
            raise ConfigError("compression: none sends nothing; name a form, such as int8@256")
        if not is_whole(self.replicas, 2):
            raise ConfigError(
                f"compression: {self.compression} is sent between replicas, and the axis"
                f" {self.axis!r} has {self.replicas}; give it at least 2, or set compression=none"
            )

    def init(self, params: Params) -> ExchangeState:
        """Returns the state before the first step.

        Args:
          params: the weights as a device holds them, or their shapes.
        """
        c, basis, chosen = self.compression, {}, self._chosen(params)
        sent = {n: x.shape for n, x in leaves_with_names(params) if n in chosen}
        if c.kind == "powersgd":
            for name, (layers, rows, columns) in self._shapes(params).items():
                rank = min(c.rank, rows, columns)
                basis[name] = first_basis(name, (layers, columns, rank))

        def zeros(wanted: object) -> Named:
            return {n: jnp.zeros(s, jnp.float32) for n, s in sent.items()} if wanted else {}

        steps = jnp.int32(0) if c.warmup else None
        return ExchangeState(zeros(c.feedback), zeros(c.momentum), basis, steps)

    def mean(self, grads: Grads, state: ExchangeState) -> tuple[Grads, ExchangeState]:
        r"""Returns the mean of gradients over the replicas, alike in all, and the next state.

        Gradients are to be finite in every replica.

        Args:
          grads: of this replica, in the structure of the weights.
          state: of this replica.
        """
        named = {name: g.astype(jnp.float32) for name, g in leaves_with_names(grads)}
        chosen, warmup = self._chosen(grads), self.compression.warmup
        means = self._exact({name: g for name, g in named.items() if name not in chosen})
        sent = {name: g for name, g in named.items() if name in chosen}
        if sent:
            shapes = self._shapes(grads)
            if not warmup:
                found, state = self._compressed(sent, state, shapes)
            else:
                assert state.steps is not None
                found, new = lax.cond(
                    state.steps < warmup,
                    lambda: self._warm(sent, state),
                    lambda: self._compressed(sent, state, shapes),
                )
                state = new._replace(steps=state.steps + 1)
            means |= found
        ordered = [means[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(grads), ordered), state

    def sent_bytes(self, params: Params) -> float:
        """Returns the bytes that a replica sends in a step after the warm-up.

        Collectives count as rings: of an array that all reduce each replica sends twice its size
        times (N - 1) / N, of one that all gather N - 1 times its own part.

        Args:
          params: the weights as a device holds them, or their shapes.
        """
        c, N, chosen = self.compression, self.replicas, self._chosen(params)
        sizes = {name: math.prod(x.shape) for name, x in leaves_with_names(params)}
        exact = sum(size for name, size in sizes.items() if name not in chosen)
        sent = [size for name, size in sizes.items() if name in chosen]
        ring = 2 * (N - 1) / N
        if c.kind == "topk":
            return ring * 4 * exact + (N - 1) * sum(8 * largest_count(c.share, n) for n in sent)
        if c.kind == "powersgd":
            for layers, rows, columns in self._shapes(params).values():
                exact += layers * (rows + columns) * min(c.rank, rows, columns)
            return ring * 4 * exact
        codec = make_codec(c)
        coded = sum(message_bytes(codec, N, _width(n, N, codec.block)) for n in sent)
        return ring * (4 * exact + coded)

    def _chosen(self, params: Params) -> frozenset[str]:
        return compressed_paths(params, self.compression) if self.paths is None else self.paths

    def _shapes(self, params: Params) -> dict[str, tuple[int, int, int]]:
        """The matrices that `powersgd` factors."""
        if self.compression.kind != "powersgd":
            return {}
        chosen = self._chosen(params)
        return {name: shape for name, shape in _matrices(params).items() if name in chosen}

    def _exact(self, leaves: Named) -> Named:
        """Float32 means, in one collective."""
        if not leaves:
            return {}
        total = lax.psum(jnp.concatenate([x.reshape(-1) for x in leaves.values()]), self.axis)
        parts = _split(total / self.replicas, [x.size for x in leaves.values()])
        shapes = {name: x.shape for name, x in leaves.items()}
        return {n: x.reshape(shape) for (n, shape), x in zip(shapes.items(), parts, strict=True)}

    def _with_momentum(self, grads: Named, before: Named) -> Named:
        """What stands for the gradient: `topk` a running sum of its own, `sign` a running mean."""
        c = self.compression
        if not c.momentum:
            return grads
        share = 1 - c.momentum if c.kind == "sign" else 1
        return {n: c.momentum * before[n] + share * g for n, g in grads.items()}

    def _as_gradient(self, means: Named, before: Named) -> Named:
        """The gradients whose running means are these."""
        c = self.compression
        if not c.momentum or c.kind != "sign":
            return means
        return {n: (m - c.momentum * before[n]) / (1 - c.momentum) for n, m in means.items()}

    def _warm(self, grads: Named, state: ExchangeState) -> tuple[Named, ExchangeState]:
        """A step that is sent in float32."""
        c, before = self.compression, state.momentum
        own = self._with_momentum(grads, before)
        means = self._exact(own)
        if c.momentum:
            state = state._replace(momentum=means if c.kind == "sign" else own)
        return self._as_gradient(means, before), state

    def _compressed(
        self, grads: Named, state: ExchangeState, shapes: Mapping[str, tuple[int, int, int]]
    ) -> tuple[Named, ExchangeState]:
        c, before = self.compression, state.momentum
        own = self._with_momentum(grads, before)
        whole = {n: g + state.residual[n] for n, g in own.items()} if c.feedback else own
        momentum: Named = {}
        if c.kind == "powersgd":
            means, residual, basis = self._factors(whole, state.basis, shapes)
            state = state._replace(basis=basis)
        elif c.kind == "topk":
            means, residual, places = self._largest(whole)
            if c.momentum:  # of a number that was sent it is spent
                momentum = {n: _without(u, places[n]) for n, u in own.items()}
        else:
            means, residual = self._two_exchanges(whole)
            momentum = means if c.momentum else {}
        residual = residual if c.feedback else {}
        state = state._replace(residual=residual, momentum=momentum)
        return self._as_gradient(means, before), state

    def _two_exchanges(self, whole: Named) -> tuple[Named, Named]:
        """Parts to their owners and means to all, both encoded."""
        codec, N, own = make_codec(self.compression), self.replicas, lax.axis_index(self.axis)
        rows = {n: _rows(x, N, codec.block) for n, x in whole.items()}
        sent = {n: codec.encode(x) for n, x in rows.items()}
        got = _together(sent, lambda a: lax.all_to_all(a, self.axis, 0, 0, tiled=True))
        owned = {n: jnp.sum(codec.decode(m), axis=0, keepdims=True) / N for n, m in got.items()}
        answers = {n: codec.encode(y) for n, y in owned.items()}
        every = _together(answers, lambda a: lax.all_gather(a, self.axis, axis=0, tiled=True))
        means, residual = {}, {}
        for name, x in whole.items():
            means[name] = _unrows(codec.decode(every[name]), x.shape)
            left = rows[name] - codec.decode(sent[name])
            lost = N * (owned[name] - codec.decode(answers[name]))
            part = lax.dynamic_slice_in_dim(left, own, 1) + lost
            left = lax.dynamic_update_slice_in_dim(left, part, own, 0)
            residual[name] = _unrows(left, x.shape)
        return means, residual

    def _largest(self, whole: Named) -> tuple[Named, Named, Named]:
        """Means of what replicas sent, what they did not, and which numbers each did send."""
        flat = {n: x.reshape(-1) for n, x in whole.items()}
        share = self.compression.share
        sent = {n: largest_numbers(x, largest_count(share, x.size)) for n, x in flat.items()}
        messages = {n: (values[None], places[None]) for n, (values, places) in sent.items()}
        every = _together(messages, lambda a: lax.all_gather(a, self.axis, axis=0, tiled=True))
        means, residual = {}, {}
        for name, x in whole.items():
            values, places = (a.reshape(-1) for a in every[name])
            total = jnp.zeros_like(flat[name]).at[places].add(values)
            means[name] = (total / self.replicas).reshape(x.shape)
            residual[name] = _without(x, sent[name][1])
        return means, residual, {n: places for n, (_, places) in sent.items()}

    def _factors(
        self, whole: Named, basis: Named, shapes: Mapping[str, tuple[int, int, int]]
    ) -> tuple[Named, Named, Named]:
        """Means of low rank, what they leave of this replica's, and the next right factors."""
        matrices = {n: x.reshape(shapes[n]) for n, x in whole.items()}
        left = self._exact({n: _times(m, basis[n]) for n, m in matrices.items()})
        left = {n: orthonormal(p) for n, p in left.items()}
        right = self._exact({n: _times(m.swapaxes(1, 2), left[n]) for n, m in matrices.items()})
        means = {
            n: _times(left[n], right[n].swapaxes(1, 2)).reshape(x.shape) for n, x in whole.items()
        }
        return means, {n: x - means[n] for n, x in whole.items()}, right


def first_basis(path: str, shape: Shape) -> Array:
    """Returns right factors before the first step, alike in all replicas.

    Args:
      path: of the weight.
      shape: (layers, columns, rank).
    """
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
    return jax.random.normal(key, shape, jnp.float32)


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _without(x: Array, places: Array) -> Array:
    """An array with zeros at some places of it as a vector."""
    return x.reshape(-1).at[places].set(0.0).reshape(x.shape)


def _split(x: Array, sizes: list[int]) -> list[Array]:
    """The last axis cut into parts of these sizes."""
    return list(lax.split(x, sizes, axis=x.ndim - 1))


def _width(size: int, rows: int, block: int) -> int:
    """Numbers of a row of whole blocks."""
    return -(-size // (rows * block)) * block


def _rows(x: Array, rows: int, block: int) -> Array:
    """An array as rows of whole blocks, the last ones filled up with zeros."""
    width = _width(x.size, rows, block)
    return jnp.pad(x.reshape(-1), (0, rows * width - x.size)).reshape(rows, width)


def _unrows(x: Array, shape: Shape) -> Array:
    """Undoes `_rows`."""
    return x.reshape(-1)[: math.prod(shape)].reshape(shape)


def _together(
    messages: Mapping[str, Message], work: Callable[[Array], Array]
) -> dict[str, Message]:
    """Sends messages of (rows, ...) arrays: first parts in one collective, second ones in one."""
    found: list[list[Array]] = []
    for arrays in zip(*messages.values(), strict=True):
        flat = [a.reshape(a.shape[0], -1) for a in arrays]
        cut = _split(work(jnp.concatenate(flat, axis=1)), [a.shape[1] for a in flat])
        found.append(
            [c.reshape(c.shape[0], *a.shape[1:]) for c, a in zip(cut, arrays, strict=True)]
        )
    return dict(zip(messages, zip(*found, strict=True), strict=True))
