"""Linear, Norm and Embed: weights and their policies around the operations of `mpjax.ops`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats.checks import as_array
from mpjax.models.core.module import (
    Context,
    Layer,
    part_key,
    parts_of,
    run_module,
    save_input,
    unsharded,
)
from mpjax.typing import Array, ArrayLike, Axes, Key, Params, Shard


class Linear(Layer):
    """x W + b; the weight is normal with variance gain^2 / inputs.

    Args:
      features: outputs F.
      axes: logical axes of the (D, F) kernel.
      bias: whether there is b.
      gain: of the initial weight.
    """

    features: int
    axes: tuple[str | None, str | None]
    bias: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Array | ops.Saved) -> Array:
        inputs = (x.x if isinstance(x, ops.Saved) else x).shape[-1]
        init = nn.initializers.normal(self.gain * inputs**-0.5)
        kernel = self.weight("kernel", init, (inputs, self.features), self.axes)
        y = self.multiply(x, kernel, sums=self._sums(inputs))
        if not self.bias:
            return y
        bias = self.weight("bias", nn.initializers.zeros, (self.features,), (self.axes[1],))
        return ops.shift_by(y, bias, self.gradient_dtype)

    def _sums(self, inputs: int) -> ops.Sums | None:
        """How devices hold the terms of the product's sums; those of `embed` lie on each whole."""
        shard = self.context.shard

        def parts(axis: str | None, size: int) -> int:
            return 1 if axis == "embed" else parts_of(shard, axis, size)

        both = parts(self.axes[0], inputs), parts(self.axes[1], self.features)
        return None if both == (1, 1) else ops.Sums(both, self.axes, shard)


class Norm(Layer):
    """LayerNorm or RMSNorm.

    Args:
      kind: `layer` or `rms`.
      bias: whether LayerNorm has a bias.
      epsilon: added to the variance.
    """

    kind: str
    bias: bool
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = (x.shape[-1],)
        scale = self.weight("scale", nn.initializers.ones, width, (None,))
        centre, bias = self.kind == "layer", None
        if self.bias and centre:
            bias = self.weight("bias", nn.initializers.zeros, width, (None,))
        norm = functools.partial(
            ops.norm, policy=self.policy(), centre=centre, epsilon=self.epsilon,
            gradient_dtype=self.gradient_dtype,
        )  # fmt: skip
        return ops.from_saved(norm, (save_input(self, x),), scale, bias)


class Embed(Layer):
    """A table of vectors, looked up by id.

    Args:
      rows: number of ids.
      width: of a vector, D.
      axes: logical axes of the table.
      deviation: of the initial numbers.
    """

    rows: int
    width: int
    axes: tuple[str | None, str | None]
    deviation: float = 0.02

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        init = nn.initializers.normal(self.deviation)
        table = self.weight("table", init, (self.rows, self.width), self.axes)
        shard = self.context.shard
        cut = None if shard is unsharded else Cut(shard, self.axes, self.width)
        return ops.look_up(table, ids, self.policy().output_dtype, self.gradient_dtype, cut)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a mesh holds a table; see `mpjax.ops.linear.TableCut`.

    Args:
      shard: the sharding constraint.
      axes: logical axes of the table.
      width: of a row.
    """

    shard: Shard
    axes: tuple[str | None, str | None]
    width: int

    def whole(self, table: Array) -> Array:
        """Gathered by width: rows cut by width would be repartitioned by batch."""
        return self.shard(table, (self.axes[0], None))

    def every(self, ids: Array) -> Array:
        """The ids of the tokens whose gradients `by_width` brings."""
        return self.shard(ids, self._tokens(ids.ndim))

    def by_width(self, dy: Array) -> Array:
        """Each device has the gradients of all tokens, for its part of the width."""
        return self.shard(dy, (*self._tokens(dy.ndim - 1), self.axes[1]))

    def replicas(self, rows: int) -> int:
        """How many devices with the same part of the width have rows of a batch of their own."""
        return parts_of(self.shard, "replicas", rows) if self._cuts_width else 0

    @property
    def _cuts_width(self) -> bool:
        return parts_of(self.shard, self.axes[1], self.width) > 1

    def _tokens(self, ndim: int) -> Axes:
        """Axes of a batch, without the devices that cut the width."""
        first = "replicas" if self._cuts_width else "batch"
        return (first, *(None,) * (ndim - 1)) if ndim > 1 else (None,)


def shifted(x: Array, offset: ArrayLike, where: str) -> Array:
    """Returns rows of a table plus an offset of their shape, in float32.

    16-bit rows lie on the grid of their dtype, and would take an offset below half a unit of it
    away again; in float32 it is there until the embedding is passed on.

    Raises:
      ConfigError: an offset of another shape.
    """
    offset = as_array(offset, f"{where}: offset")
    if offset.shape != x.shape:
        raise ConfigError(
            f"{where}: offset has shape {offset.shape}, the embeddings {x.shape}; give a vector for"
            " each token"
        )
    return x.astype(jnp.float32) + offset.astype(jnp.float32)


def dropout(x: Array, rate: float, key: Key | None, name: str) -> Array:
    """Returns x with dropout, of a key for this name.

    Raises:
      ConfigError: no key.
    """
    if key is None:
        raise ConfigError("model: dropout needs a key; pass key= or train=False")
    module, rngs = nn.Dropout(rate, deterministic=False), {"dropout": part_key(key, name)}
    return run_module(module, {}, x, rngs=rngs)[0]


def head_logits(
    head: nn.Module | None, context: Context, p: Params, x: Array, key: Key | None = None
) -> Array:
    """Returns features as logits in the output dtype of the head.

    Args:
      head: its module, or None where it is the transposed embedding.
      context: of the head.
      p: weights of the model, `head` or `embed` among them.
      x: features (..., D).
      key: of recipes that draw, or None.
    """
    # All chunks of a loss share one key: the rounding of each number is still unbiased.
    key = None if key is None else part_key(key, "head")
    if head is not None:
        return run_module(head, p["head"], x, rngs={} if key is None else {"rounding": key})[0]
    with jax.named_scope(context.full()):
        return ops.linear(
            x, p["embed"]["table"], context.policy(), transposed=True, where=context.full(),
            gradient_dtype=context.precision.gradient_dtype, recipe=context.recipe(), key=key,
        )  # fmt: skip
