"""A Transformer: embeddings, blocks and the last norm, with what draws and runs them.

Shapes: B batch, T tokens, S source tokens, D width, G groups of heads, K head width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import jmp
from flax import linen as nn

from mpjax import ops
from mpjax.errors import ConfigError, brief
from mpjax.formats import weight_view, widest
from mpjax.models.core.checks import as_segments
from mpjax.models.core.layers import Embed, Norm, dropout, shifted
from mpjax.models.core.module import At, init_layers, part_key, run_collecting, run_module
from mpjax.models.core.network import Network
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.block import Attention, AttentionContext, Block, split_heads
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.kv_cache import Cache, cache_storage, empty
from mpjax.ops.rotary import sinusoid
from mpjax.ops.target import target_platform
from mpjax.precision import Precision, Recipe, dtype_name
from mpjax.typing import Array, ArrayLike, Key, ModelState, Params, PyTree, Tree

# Name -> module, examples of its inputs.
Parts: TypeAlias = dict[str, tuple[nn.Module, tuple[Array, ...]]]
Step: TypeAlias = Callable[[Array, PyTree], tuple[Array, PyTree]]  # one block, as scan calls it
Segments: TypeAlias = tuple[tuple[int, int], ...]  # ranges of consecutive layers: (start, stop)

COLLECTED = ("hidden", "queries", "keys", "values")

_REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerNetwork(Network):
    """A model of one or two Transformers, whose names begin its paths.

    Args:
      collect: see `collecting`.
    """

    config: BlockConfig
    collect: tuple[str, ...] = ()

    def transformer(self, at: At, name: str) -> Transformer:
        """Returns one of the Transformers."""
        raise NotImplementedError

    def collecting(self, *names: str) -> Self:
        """Returns the model whose calls leave intermediates of all blocks in the state.

        They are `state["collected"][TRANSFORMER][NAME]`, (L, B, T, features), with the first part
        of the Transformer's paths. Take them out before the state is given to another call.

        Args:
          names: `hidden`, the features behind a block; `queries`, `keys`, `values`, what
            self-attention projects, before its norms and rotary positions.

        Raises:
          ConfigError: another name.
        """
        for name in names:
            if name not in COLLECTED:
                known = " ".join(COLLECTED)
                raise ConfigError(f"collecting: unknown {brief(name)}; known: {known}")
        return dataclasses.replace(self, collect=names)

    def attention_kernels(self, tokens: int, *, masked: bool = False) -> tuple[str, ...]:
        """Returns the kernels that self-attention of a training runs on here; one, mostly.

        Args:
          tokens: of a row.
          masked: whether there is padding, or several documents are in a row.

        Raises:
          ConfigError: the kernel of the config does not serve here.

        Example:
          >>> from mpjax.models import decoder
          >>> from mpjax.ops import tracing_for
          >>> with tracing_for("tpu"):
          ...     decoder("tiny", "bf16").attention_kernels(1024)
          ('splash',)
        """
        c, at = self.config, self.precision.policy
        divided = ops.can_split(split_heads(self.shard, c.heads, c.groups))
        found: dict[str, None] = {}
        for path in self.paths:
            if path.endswith("/attention"):
                dtypes = (at(one).compute_dtype for one in (path, f"{path}/softmax"))
                found[ops.kernel_for(
                    c.kernel, *map(jnp.dtype, dtypes), queries=tokens, keys=tokens,
                    width=c.per_head, from_start=True, masked=masked or c.window > 0,
                    divided=divided,
                )] = None  # fmt: skip
        return tuple(found)

    def init_with_axes(self, at: At, key: Key) -> Params:
        """See `Network`; blocks are stacked."""
        return {self.root: self.transformer(at, self.root).init_with_axes(key)}

    @property
    def segments(self) -> Segments | dict[str, Segments]:
        """Ranges (start, stop) of consecutive layers of equal precision; of two, by name."""
        return self.named_segments[self.root] if self.root else self.named_segments

    @functools.cached_property
    def named_segments(self) -> dict[str, Segments]:
        """Name of a Transformer -> its segments."""
        return {name: self._segments(name, count) for name, count in self.layer_counts.items()}

    def _segments(self, name: str, layers: int) -> Segments:
        every: list[list[tuple[jmp.Policy, Recipe | None]]] = []
        for layer in range(layers):
            paths = [path for path in self.paths if path.startswith(f"{name}/layers/{layer}/")]
            every.append([(self.precision.policy(p), self.precision.recipe(p)) for p in paths])
        starts = [0] + [i for i in range(1, layers) if every[i] != every[i - 1]]
        return tuple(zip(starts, [*starts[1:], layers], strict=True))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Embeddings, blocks and the last norm of a model, or of one half of it.

    Args:
      model: that it belongs to.
      config: shape.
      at: path prefix of a part -> its context.
      name: first part of the paths.
      causal: whether a token attends to no later ones.
      cross: whether blocks attend to a source.
      types: number of token types.
      heads: parts that are drawn with the others and run by the model.
    """

    model: TransformerNetwork
    config: BlockConfig
    at: At
    name: str
    causal: bool = True
    cross: bool = False
    types: int = 0
    heads: Parts = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def parts(self) -> Parts:
        """The modules around the blocks, the heads included."""
        c = self.config
        ids, x = (jnp.zeros((1, 1), jnp.int32),), (jnp.zeros((1, 1, c.width)),)
        # Named by their paths, which are then the names in a traced program.
        name = f"{self.name}/{{}}".format

        def norm(own: str) -> Norm:
            return Norm(self.at(own), c.norm, c.bias, c.epsilon, name=name(own))

        def table(own: str, rows: int, axis: str | None) -> Embed:
            return Embed(self.at(own), rows, c.width, (axis, "embed"), name=name(own))

        parts: Parts = {"embed": (table("embed", c.vocabulary, "vocab"), ids)}
        if c.position == "learned":
            parts["position"] = (table("position", c.context, None), ids)
        if self.types:
            parts["token_type"] = (table("token_type", self.types, None), ids)
        if c.norm_embed:
            parts["norm_embed"] = (norm("norm_embed"), x)
        if c.norm_first:
            parts["norm"] = (norm("norm"), x)
        return parts | self.heads

    def _block(self, layer: int, name: str | None = None) -> Block:
        return Block(self.at("layers", str(layer)), self.config, self.causal, self.cross, name=name)

    def init_with_axes(self, key: Key, without: Sequence[str] = ()) -> Params:
        """Returns drawn parameters boxed with their logical axes; blocks are stacked.

        Args:
          key: of the draws.
          without: parts that have no weights of their own.
        """
        tree: dict[str, PyTree] = {}
        for name, (part, examples) in self.parts.items():
            if name not in without and (drawn := part.init(part_key(key, name), *examples)):
                tree[name] = drawn["params"]
        x = jnp.zeros((1, 1, self.config.width))
        context = AttentionContext(jnp.zeros(1, jnp.int32), source_BSD=x if self.cross else None)
        block = self._block(0)
        draw = lambda key: block.init(key, x, context)["params"]  # noqa: E731
        return tree | {"layers": init_layers(draw, key, self.config.layers)}

    def __call__(
        self, p: Params, ids_BT: Array, attention_context: AttentionContext, *,
        kinds_BT: Array | None = None, offset_BTD: ArrayLike | None = None, cache: Cache = (),
        amax: PyTree = None, key: Key | None = None, train: bool = False,
    ) -> tuple[Array, Cache, PyTree, PyTree]:  # fmt: skip
        """Returns the features (B, T, D), new cache, new amax histories and what is collected.

        Args:
          p: weights below the name.
          ids_BT: token ids.
          attention_context: their positions and what they attend to.
          kinds_BT: token types; None is all 0.
          offset_BTD: added to the rows of the token table, in float32, before they are scaled;
            None adds nothing.
          cache: keys and values along a leading layer axis.
          amax: histories of delayed scaling of the blocks, likewise, or None.
          key: of dropout and of recipes that draw, or None.
          train: whether dropout is on.
        """
        c = self.config
        x = self._embedded(p, ids_BT, kinds_BT, offset_BTD, attention_context, checked=not cache)
        x = self.model.shard(x, ("batch", "length", "embed"))
        dropping = train and c.dropout > 0
        if dropping:
            x = dropout(x, c.dropout, key, "embed")
        outputs, weights = [], (p["layers"], cache, amax or {}, jnp.arange(c.layers))
        for segment in self.model.named_segments[self.name]:
            x, out = self._run_segment(segment, x, weights, attention_context, key, dropping)
            outputs.append(out)
        cache, amax, found = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
        return (self._run("norm", p, x) if c.norm_first else x), cache, amax, found

    def _run(self, name: str, p: Params, x: Array) -> Array:
        return run_module(self.parts[name][0], p[name], x)[0]

    def _embedded(
        self, p: Params, ids_BT: Array, kinds_BT: Array | None, offset_BTD: ArrayLike | None,
        context: AttentionContext, checked: bool,
    ) -> Array:  # fmt: skip
        """The embeddings of tokens, of their positions and of their types."""
        c, positions = self.config, context.positions
        assert positions is not None
        x = self._run("embed", p, ids_BT)
        dtype = x.dtype
        if offset_BTD is not None:
            x = shifted(x, offset_BTD, self.name)
        if c.scale_embed:
            x = x * jnp.asarray(c.width**0.5, x.dtype)
        if c.position != "rotary":
            if checked and ids_BT.shape[1] > c.context and c.position == "learned":
                raise ConfigError(
                    f"model: sequence of {ids_BT.shape[1]} tokens is longer than"
                    f" context={c.context}; set context={ids_BT.shape[1]} or shorten it"
                )
            if c.position == "learned":
                at = self._run("position", p, positions)
            else:
                at = sinusoid(positions, c.width)
            x = x + (at[None] if at.ndim == 2 else at).astype(x.dtype)
        if self.types:
            kinds_BT = jnp.zeros_like(ids_BT) if kinds_BT is None else kinds_BT
            x = x + self._run("token_type", p, kinds_BT).astype(x.dtype)
        # With an offset all of this was float32.
        return self._run("norm_embed", p, x) if c.norm_embed else x.astype(dtype)

    def _run_segment(
        self, segment: tuple[int, int], x: Array, stacked: PyTree, context: AttentionContext,
        key: Key | None, dropping: bool,
    ) -> tuple[Array, PyTree]:  # fmt: skip
        """The features after a segment's last block; its cache and amax histories."""
        c, (start, stop) = self.config, segment
        unroll = c.loop == "unroll" or (c.loop == "auto" and target_platform() == "cpu")
        step = self._step(start, context, key, dropping)

        def named(name: str) -> Step:
            one = functools.partial(step, name=name)
            if c.remat == "none":
                return one
            return jax.checkpoint(one, policy=_REMAT[c.remat], prevent_cse=unroll)

        xs = _layers(stacked, segment, c.layers)
        if not unroll:
            return jax.lax.scan(named(f"{self.name}/layers"), x, xs)
        outs = []
        for layer, one in enumerate(_unstack(xs, stop - start), start):
            x, out = named(f"{self.name}/layers/{layer}")(x, one)
            outs.append(out)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

    def _step(
        self, start: int, attention_context: AttentionContext, key: Key | None, dropping: bool
    ) -> Callable[..., tuple[Array, PyTree]]:
        """Returns what runs one block of the segment that begins at a layer."""

        def run(x: Array, one: PyTree, name: str) -> tuple[Array, PyTree]:
            params, cached, history, layer = one
            own = None if key is None else jax.random.fold_in(key, layer)
            args = self._block(start, name), weight_view(params), x, attention_context, cached
            options: Any = dict(history=history, rngs=self.model.rngs(own, dropping))
            if not self.model.collect:
                (x, cached), history = run_module(*args, dropping, **options)
                return x, (cached, history, {})
            (x, cached), history, found = run_collecting(*args, dropping, **options)
            found = found["attention"] | found
            return x, (cached, history, {name: found[name] for name in self.model.collect})

        return run

    def source_cache(self, stacked: Params, source_BSD: Array) -> Cache:
        """Returns keys and values of the source in all blocks, (L, B, S, G, K).

        Delayed scaling takes the current tensors here, as it does wherever it has no history.
        """
        context = AttentionContext(None, source_BSD=source_BSD)

        def keys_values(start: int, p: Params) -> Cache:
            own = Attention(
                self.at("layers", str(start), "cross_attention"), self.config, across=True
            )
            return run_module(own, weight_view(p), None, context)[0][1]

        outputs = [
            jax.lax.map(
                functools.partial(keys_values, segment[0]),
                _layers(stacked["cross_attention"], segment, self.config.layers),
            )
            for segment in self.model.named_segments[self.name]
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _layers(tree: Tree, segment: tuple[int, int], layers: int) -> Tree:
    """The layers of a segment, of arrays with a leading layer axis."""
    return tree if segment == (0, layers) else jax.tree.map(lambda a: a[slice(*segment)], tree)


def _unstack(tree: Tree, count: int) -> list[Tree]:
    """Layers of a stacked tree; the gradient of a split is one concatenation, not L additions."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[p[0] for p in jax.lax.split(leaf, [1] * count, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]


def attention_context_of(
    tokens: int, keep_BT: ArrayLike | None, state: ModelState
) -> AttentionContext:
    """Returns the positions of a decoder's tokens and their mask.

    Args:
      tokens: their number T.
      keep_BT: what is no padding, bool or 0 and 1; None is all.
      state: `position`, `layers` and perhaps `pads` of a cache, or without them.

    Raises:
      ConfigError: padding is given beside a cache.
    """
    if "position" not in state:
        if keep_BT is None:
            return AttentionContext(jnp.arange(tokens))
        keep_BT = jnp.asarray(keep_BT).astype(bool)  # tokenizers give 0 and 1
        # Only tokens are counted, so padding changes no position.
        return AttentionContext(jnp.maximum(jnp.cumsum(keep_BT, axis=1) - 1, 0), keep_BS=keep_BT)
    if keep_BT is not None:
        raise ConfigError(
            "model: keep is given beside a cache; give the padding as init_cache(pads=...)"
        )
    first = state["position"]
    slots_T = jnp.arange(tokens) + first
    if "pads" not in state:
        return AttentionContext(slots_T, first)
    pads_B1 = state["pads"][:, None]
    keep_BS = jnp.arange(state["layers"][0].shape[2])[None, :] >= pads_B1
    return AttentionContext(jnp.maximum(slots_T[None, :] - pads_B1, 0), first, keep_BS)


def packed_context(
    ids_BT: Array, segments: ArrayLike, keep: ArrayLike | None, state: ModelState, where: str
) -> AttentionContext:
    """Returns the positions of the tokens of packed documents, and which document each is of.

    Positions begin at 0 in each document. Padding is like a document, so nothing sees it.

    Args:
      ids_BT: the tokens.
      segments: (B, T) numbers, equal in a document and another in the next; 0 is padding.
      keep: what else would say where padding is, None.
      state: without a cache.
      where: what takes them.

    Raises:
      ConfigError: they are no such numbers, or stand beside a cache or `keep`.

    Example:
      >>> ids = jnp.ones((1, 5), jnp.int32)
      >>> packed_context(ids, [[1, 1, 2, 2, 0]], None, {}, "decoder").positions.tolist()
      [[0, 1, 0, 1, 0]]
    """
    if "position" in state:
        raise ConfigError(
            f"{where}: segments are given beside a cache, whose rows are one text each; leave one"
            " of them out"
        )
    if keep is not None:
        raise ConfigError(
            f"{where}: segments and keep are given; segments are 0 at padding, leave keep out"
        )
    segments_BT = as_segments(segments, ids_BT.shape, where)
    slots_1T = jnp.arange(ids_BT.shape[1])[None, :]
    new_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
    # A document is known by its first slot: a number that comes again is another document.
    first_BT = jax.lax.cummax(jnp.where(new_BT, slots_1T, 0), axis=1)
    return AttentionContext(slots_1T - first_BT, segments_BT=first_BT)


def empty_cache(
    config: BlockConfig, precision: Precision, batch: int, length: int, storage: str | Storage
) -> ModelState:
    """Returns the empty keys and values of a decoder's blocks, and the position 0."""
    c = config
    if c.position == "learned" and length > c.context:
        raise ConfigError(
            f"model: cache of {length} tokens is longer than context={c.context}; generate"
            " fewer tokens"
        )
    attention = [f"decoder/layers/{i}/attention" for i in range(c.layers)]
    dtype = functools.reduce(widest, (precision.policy(path).compute_dtype for path in attention))
    shape = (c.layers, batch, length, c.groups, c.per_head)
    form = cache_storage(storage or dtype_name(dtype))
    return {
        "layers": (empty(shape, form, dtype), empty(shape, form, dtype)),
        "position": jnp.int32(0),
    }
