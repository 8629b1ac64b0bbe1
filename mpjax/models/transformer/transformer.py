"""A Transformer: embeddings, blocks and the last norm, described once, drawn and run from that.

Shapes: B batch, T tokens, S source tokens, D width, G groups of heads, K head width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax.errors import ConfigError
from mpjax.formats import weight_view
from mpjax.models.core.layers import Embed, Norm
from mpjax.models.core.module import At, init_layers, part_key, unsharded
from mpjax.models.core.network import Network
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.block import Attention, AttentionContext, Block
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.kv_cache import cache_storage, empty
from mpjax.ops.rotary import sinusoid
from mpjax.precision import Precision, dtype_name, wider

Parts = dict[str, tuple[nn.Module, tuple[Any, ...]]]  # name -> module, examples of its inputs
Segments = tuple[tuple[int, int], ...]  # ranges of consecutive layers: (start, stop)

_REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def equal_segments(precision: Precision, paths: Sequence[str], root: str, layers: int) -> Segments:
    """Returns ranges of consecutive layers whose policies and recipes are equal: (start, stop)."""

    def policies(layer: int) -> list[Any]:
        found = [path for path in paths if path.startswith(f"{root}/layers/{layer}/")]
        return [(precision.policy(path), precision.recipe(path)) for path in found]

    every = [policies(layer) for layer in range(layers)]
    starts = [0] + [i for i in range(1, layers) if every[i] != every[i - 1]]
    return tuple(zip(starts, [*starts[1:], layers], strict=True))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Embeddings, blocks and the last norm of a model, or of one half of it.

    Args:
      config: shape.
      at: path prefix of a part -> its context.
      name: first part of the paths.
      causal: whether a token attends to no later ones.
      cross: whether blocks attend to a source.
      types: number of token types.
      heads: parts that are drawn with the others and run by the model.
      segments: ranges of layers of equal precision; needed to run it, not to draw it.
      rounding: whether a recipe draws random numbers.
      shard: constrains activations to logical axes.
    """

    config: BlockConfig
    at: At
    name: str
    causal: bool = True
    cross: bool = False
    types: int = 0
    heads: Parts = dataclasses.field(default_factory=dict)
    segments: Segments = ()
    rounding: bool = False
    shard: Any = unsharded

    @functools.cached_property
    def parts(self) -> Parts:
        """The modules around the blocks, the heads included."""
        c = self.config
        ids, x = (jnp.zeros((1, 1), jnp.int32),), (jnp.zeros((1, 1, c.width)),)
        # Named as their paths: what a traced program calls them.
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

    def running(self, model: Network, segments: Segments) -> Transformer:
        """Returns it with what only a model with its Precision knows."""
        return dataclasses.replace(
            self, segments=segments, rounding=model.rounds, shard=model.shard
        )

    def _block(self, layer: int, name: str | None = None) -> Block:
        return Block(self.at("layers", str(layer)), self.config, self.causal, self.cross, name=name)

    def init_with_axes(self, key: Any, without: Sequence[str] = ()) -> Any:
        """Returns drawn parameters boxed with their logical axes; blocks are stacked.

        Args:
          key: of the draws.
          without: parts whose weights are another's.
        """
        made = {
            name: part.init(part_key(key, name), *examples)
            for name, (part, examples) in self.parts.items()
            if name not in without
        }
        tree = {name: variables["params"] for name, variables in made.items() if variables}
        x = jnp.zeros((1, 1, self.config.width))
        context = AttentionContext(jnp.zeros(1, jnp.int32), source_BSD=x if self.cross else None)
        block = self._block(0)
        draw = lambda key: block.init(key, x, context)["params"]  # noqa: E731
        return tree | {"layers": init_layers(draw, key, self.config.layers)}

    def __call__(
        self, p: Any, ids_BT: Any, attention_context: AttentionContext, *, kinds_BT: Any = None,
        cache: Any = None, amax: Any = None, key: Any = None, train: bool = False,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Returns the features (B, T, D), the new cache and the new amax histories.

        Args:
          p: weights below the name.
          ids_BT: token ids.
          attention_context: where they stand and what they attend to.
          kinds_BT: token types; None is all 0.
          cache: keys and values along a leading layer axis, or None.
          amax: histories of delayed scaling of the blocks, likewise, or None.
          key: of dropout and of recipes that draw, or None.
          train: whether dropout is on.
        """
        c = self.config
        x = self._embedded(p, ids_BT, kinds_BT, attention_context, checked=cache is None)
        x = self.shard(x, ("batch", "length", "embed"))
        dropping = train and c.dropout > 0
        if dropping:
            if key is None:
                raise ConfigError("model: dropout needs a key; pass key= or train=False")
            x = nn.Dropout(c.dropout, deterministic=False).apply(
                {}, x, rngs={"dropout": part_key(key, "embed")}
            )
        outputs, weights = [], (p["layers"], cache, amax or {}, jnp.arange(c.layers))
        for segment in self.segments:
            x, out = self._run_segment(segment, x, weights, attention_context, key, dropping)
            outputs.append(out)
        cache, amax = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
        return (self._run("norm", p, x) if c.norm_first else x), cache, amax

    def _run(self, name: str, p: Any, x: Any) -> Any:
        return self.parts[name][0].apply({"params": p[name]}, x)

    def _embedded(
        self, p: Any, ids_BT: Any, kinds_BT: Any, context: AttentionContext, checked: bool
    ) -> Any:
        """The embeddings of tokens, of their positions and of their types."""
        c = self.config
        x = self._run("embed", p, ids_BT)
        if c.scale_embed:
            x = x * jnp.asarray(c.width**0.5, x.dtype)
        if c.position != "rotary":
            if checked and ids_BT.shape[1] > c.context and c.position == "learned":
                raise ConfigError(
                    f"model: sequence of {ids_BT.shape[1]} tokens is longer than"
                    f" context={c.context}; set context={ids_BT.shape[1]} or shorten it"
                )
            if c.position == "learned":
                at = self._run("position", p, context.positions)
            else:
                at = sinusoid(context.positions, c.width)
            x = x + (at[None] if at.ndim == 2 else at).astype(x.dtype)
        if self.types:
            kinds_BT = jnp.zeros_like(ids_BT) if kinds_BT is None else kinds_BT
            x = x + self._run("token_type", p, kinds_BT).astype(x.dtype)
        return self._run("norm_embed", p, x) if c.norm_embed else x

    def _run_segment(
        self, segment: tuple[int, int], x: Any, stacked: Any, context: AttentionContext, key: Any,
        dropping: bool,
    ) -> tuple[Any, Any]:  # fmt: skip
        """The features behind a segment's last block; its cache and amax histories."""
        c, (start, stop) = self.config, segment
        unroll = c.loop == "unroll" or (c.loop == "auto" and jax.default_backend() == "cpu")
        step = self._step(start, context, key, dropping)

        def named(name: str) -> Callable[..., Any]:
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
        self, start: int, attention_context: AttentionContext, key: Any, dropping: bool
    ) -> Callable[..., Any]:
        """Returns what runs one block of the segment that begins at a layer."""

        def run(x: Any, one: Any, name: str) -> tuple[Any, Any]:
            params, cached, history, layer = one
            rngs = {}
            if key is not None:
                own = jax.random.fold_in(key, layer)
                rngs = {"dropout": own} if dropping else {}
                if self.rounding:
                    rngs["rounding"] = part_key(own, "rounding")
            variables = {"params": weight_view(params)}
            run_block = functools.partial(self._block(start, name).apply, rngs=rngs)
            if not history:
                out = run_block(variables, x, attention_context, cached, dropping)
                return out[0], (out[1], history)
            out, updated = run_block(
                variables | {"amax": history}, x, attention_context, cached, dropping,
                mutable=["amax"],
            )  # fmt: skip
            return out[0], (out[1], updated["amax"])

        return run

    def source_cache(self, stacked: Any, source_BSD: Any) -> tuple[Any, Any]:
        """Returns keys and values of the source in all blocks, (L, B, S, G, K).

        Delayed scaling takes the current tensors here, as it does wherever it has no history.
        """
        context = AttentionContext(None, source_BSD=source_BSD)

        def keys_values(start: int, p: Any) -> Any:
            own = Attention(
                self.at("layers", str(start), "cross_attention"), self.config, across=True
            )
            return own.apply({"params": weight_view(p)}, None, context)[1]

        outputs = [
            jax.lax.map(
                functools.partial(keys_values, segment[0]),
                _layers(stacked["cross_attention"], segment, self.config.layers),
            )
            for segment in self.segments
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _layers(tree: Any, segment: tuple[int, int], layers: int) -> Any:
    """The layers of a segment, of arrays with a leading layer axis."""
    return tree if segment == (0, layers) else jax.tree.map(lambda a: a[slice(*segment)], tree)


def _unstack(tree: Any, count: int) -> list[Any]:
    """Layers of a stacked tree; the gradient of a split is one concatenation, not L additions."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[p[0] for p in jax.lax.split(leaf, [1] * count, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]


def attention_context_of(tokens: int, keep_BT: Any, state: Any) -> AttentionContext:
    """Returns where the tokens of a decoder's call stand.

    Args:
      tokens: T.
      keep_BT: what is no padding, bool or 0 and 1; None is all.
      state: `position`, `layers` and perhaps `pads` of a cache, or without them.

    Raises:
      ConfigError: padding is given beside a cache.
    """
    if "position" not in state:
        if keep_BT is None:
            return AttentionContext(jnp.arange(tokens))
        keep_BT = jnp.asarray(keep_BT).astype(bool)  # tokenizers give 0 and 1
        # Tokens are counted, padding is not: on either side it changes no token's position.
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


def empty_cache(
    config: BlockConfig, precision: Precision, batch: int, length: int, storage: str | Storage
) -> dict[str, Any]:
    """Returns the empty keys and values of a decoder's blocks, and the position 0."""
    c = config
    if c.position == "learned" and length > c.context:
        raise ConfigError(
            f"model: cache of {length} tokens is longer than context={c.context}; generate"
            " fewer tokens"
        )
    attention = [f"decoder/layers/{i}/attention" for i in range(c.layers)]
    dtype = functools.reduce(wider, (precision.policy(path).compute_dtype for path in attention))
    shape = (c.layers, batch, length, c.groups, c.per_head)
    form = cache_storage(storage or dtype_name(dtype))
    return {
        "layers": (empty(shape, form, dtype), empty(shape, form, dtype)),
        "position": jnp.int32(0),
    }
