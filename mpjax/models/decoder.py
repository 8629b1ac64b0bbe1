"""The decoder: embedding, blocks in segments of equal precision, head and loss.

Parameters are one canonical tree whatever the Precision: the weights of all blocks are stacked
along a leading layer axis. Shapes: B batch, T tokens, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats import weight_view
from mpjax.formats.delayed import AmaxHistory
from mpjax.models.config import DecoderConfig, decoder_config
from mpjax.models.context import Context, unsharded
from mpjax.models.skeleton import init_boxed, outer_parts, part_key, paths, stored
from mpjax.models.stack import Stack
from mpjax.precision import Precision, Recipe, dtype_name, get_precision, wider
from mpjax.precision.policy import CARRIED


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder and its Precision: `init(key) -> params`, `apply(params, ids) -> logits, state`.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    config: DecoderConfig
    precision: Precision
    shard: Any = unsharded

    def __post_init__(self) -> None:
        self.precision.check(self.paths, self._of("weight"), self._of("product"))
        self._check_storage()
        head = self.recipes.get("decoder/head")
        if head is not None and head.history:
            raise ConfigError(
                f"decoder/head: recipe {head.name!r} keeps an amax history, which a loss taken in"
                " chunks cannot thread; take a recipe without history for the head, such as fp8"
            )

    def _at(self, *prefix: str) -> Context:
        return Context(self.precision, ("decoder", *prefix), self.shard)

    def sharded(self, shard: Any) -> Model:
        """Returns the model with its activations constrained by `shard(x, logical_axes)`."""
        return dataclasses.replace(self, shard=shard)

    @functools.cached_property
    def _sites(self) -> dict[str, str]:
        return paths(self.config)

    def _of(self, kind: str) -> list[str]:
        return [path for path, found in self._sites.items() if found == kind]

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """All paths that take a policy: modules, operations and parameters, with layer indices."""
        return tuple(self._sites)

    def _block_paths(self, layer: int) -> list[str]:
        return [path for path in self.paths if path.startswith(f"decoder/layers/{layer}/")]

    def _check_storage(self) -> None:
        layers = [self._block_paths(i) for i in range(self.config.layers)]
        for same in zip(*layers, strict=True):
            if self._sites[same[0]] != "weight":
                continue
            dtypes = [self.precision.policy(path).param_dtype for path in same]
            for path, dtype in zip(same, dtypes, strict=True):
                if dtype != dtypes[0]:
                    raise ConfigError(
                        f"{path}: stored in {dtype_name(dtype)}, layer 0 in"
                        f" {dtype_name(dtypes[0])}; layers are stacked in one array, so give all"
                        " the same p=, and vary only c= and o="
                    )

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Ranges of consecutive layers whose policies are equal: (start, stop)."""

        def policies(layer: int) -> list[Any]:
            found = self._block_paths(layer)
            return [(self.precision.policy(path), self.precision.recipe(path)) for path in found]

        starts = [0] + [i for i in range(1, self.config.layers) if policies(i) != policies(i - 1)]
        return tuple(zip(starts, [*starts[1:], self.config.layers], strict=True))

    @functools.cached_property
    def axes(self) -> Any:
        """Logical axes of each parameter, a tree of tuples."""
        boxed = jax.eval_shape(lambda: init_boxed(self.config, self._at, jax.random.key(0)))
        is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
        axes = jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)
        layers = axes["decoder"]["layers"]
        axes["decoder"]["layers"] = jax.tree.map(
            lambda names: ("layers", *names), layers, is_leaf=lambda x: isinstance(x, tuple)
        )
        return axes

    def init(self, key: Any) -> Any:
        """Returns new parameters; equal keys give equal float32 draws under every Precision."""
        return stored(nn.unbox(init_boxed(self.config, self._at, key)), self.precision)

    @jax.named_scope(CARRIED)
    def features(
        self, params: Any, ids_BT: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        """Returns the normalised features (B, T, D) and the new state (key/value cache)."""
        c, p = self.config, weight_view(params)["decoder"]
        parts = outer_parts(c, self._at)
        T = ids_BT.shape[1]
        decoding = state is not None and "position" in state
        if not decoding and T > c.context and c.position == "learned":
            raise ConfigError(
                f"model: sequence of {T} tokens is longer than context={c.context}; set"
                f" context={T} or shorten it"
            )
        positions_T = jnp.arange(T) + (state["position"] if decoding else 0)
        x: Any = parts["embed"][0].apply({"params": p["embed"]}, ids_BT)
        if c.position == "learned":
            at: Any = parts["position"][0].apply({"params": p["position"]}, positions_T)
            x = x + at[None].astype(x.dtype)
        x = self.shard(x, ("batch", "length", "embed"))
        dropping = train and c.dropout > 0
        if dropping:
            if key is None:
                raise ConfigError("model: dropout needs a key; pass key= or train=False")
            x = nn.Dropout(c.dropout, deterministic=False).apply(
                {}, x, rngs={"dropout": part_key(key, "embed")}
            )
        stack = Stack(c, self._at, self.segments, rounding=self._rounds)
        x, state = stack(p["layers"], x, positions_T, state, key, dropping)
        x = parts["norm"][0].apply({"params": p["norm"]}, x)
        return x, state

    @functools.cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Path of a product -> its recipe."""
        found = {path: self.precision.recipe(path) for path in self._of("product")}
        return {path: recipe for path, recipe in found.items() if recipe is not None}

    @property
    def _rounds(self) -> bool:
        return any(recipe.uses_key for recipe in self.recipes.values())

    def init_state(self) -> Any:
        """Returns what training threads through the model: amax histories of delayed scaling.

        None where no recipe keeps a history.
        """
        tree: dict[str, Any] = {}
        for path, recipe in self.recipes.items():
            if recipe.history:
                bare = [part for part in path.split("/")[1:] if not part.isdigit()]
                at = tree
                for part in bare:
                    at = at.setdefault(part, {})
                layers = (self.config.layers,) if bare[0] == "layers" else ()
                at["kernel"] = AmaxHistory.empty(recipe.history, layers)
        return {"amax": tree} if tree else None

    def _unembed(self, params: Any, x: Any, key: Any = None) -> Any:
        """Features to logits in the head's output dtype."""
        p = weight_view(params)["decoder"]
        # One key for all chunks of a loss in chunks: each number is still rounded without bias.
        key = None if key is None else part_key(key, "head")
        if not self.config.tied:
            head, _ = outer_parts(self.config, self._at)["head"]
            return head.apply(
                {"params": p["head"]}, x, rngs={} if key is None else {"rounding": key}
            )
        path = "decoder/head"
        with jax.named_scope(path):
            return ops.linear(
                x, p["embed"]["table"], self.precision.policy(path), transposed=True, where=path,
                gradient_dtype=self.precision.gradient_dtype, recipe=self.recipes.get(path),
                key=key,
            )  # fmt: skip

    def apply(
        self, params: Any, ids_BT: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        """Returns the logits (B, T, V) and the new state.

        Args:
          params: from `init`.
          ids_BT: token ids.
          state: a key/value cache from `init_cache`, amax histories from `init_state`, or None.
          key: of dropout and of recipes that draw, needed only for training.
          train: whether dropout is on.
        """
        x, state = self.features(params, ids_BT, state=state, key=key, train=train)
        logits = self._unembed(params, x, key)
        cap = self.config.logit_cap
        return (cap * jnp.tanh(logits / cap) if cap else logits), state

    def loss(
        self, params: Any, batch: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        """Returns the mean next-token cross-entropy and the state.

        Args:
          batch: `{"inputs": (B, T), "targets": (B, T)}` token ids.
        """
        c = self.config
        x, state = self.features(params, batch["inputs"], state=state, key=key, train=train)
        targets = batch["targets"]
        B, T = targets.shape
        loss = ops.cross_entropy(
            x,
            targets,
            functools.partial(self._unembed, params, key=key),
            self.precision.policy("decoder/loss"),
            chunk=ops.chunk_length(B, T, c.vocabulary, c.loss_chunk),
            z_loss=c.z_loss if train else 0.0,  # a regulariser, not part of what is judged
            logit_cap=c.logit_cap,
        )
        return loss, state

    def init_cache(self, batch: int, length: int) -> Any:
        """Returns an empty key/value cache for `length` tokens, in the products' compute dtype."""
        c = self.config
        if c.position == "learned" and length > c.context:
            raise ConfigError(
                f"model: cache of {length} tokens is longer than context={c.context}; generate"
                " fewer tokens"
            )
        attention = [f"decoder/layers/{i}/attention" for i in range(c.layers)]
        dtype = functools.reduce(
            wider, (self.precision.policy(path).compute_dtype for path in attention)
        )
        shape = (c.layers, batch, length, c.groups, c.head_width)
        return {
            "layers": (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),
            "position": jnp.int32(0),
        }


def decoder(
    size: str | DecoderConfig, precision: str | Precision = "fp32", **changes: Any
) -> Model:
    """Returns a decoder-only Transformer that carries its Precision.

    Args:
      size: `tiny small gpt2 gpt2-medium gpt2-large gpt2-xl llama-7b llama-13b llama3-8b`, or a
        DecoderConfig.
      precision: anything that `get_precision` reads.
      changes: fields of DecoderConfig.

    Raises:
      ConfigError: unknown size or field, a path that no rule covers, a rule that matches nothing.

    Example:
      >>> model = decoder("tiny", "bf16", layers=1, width=32, heads=2)
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.zeros((1, 4), jnp.int32))[0].shape
      (1, 4, 256)
    """
    if isinstance(size, DecoderConfig):
        size_changes = {f.name: getattr(size, f.name) for f in dataclasses.fields(size)}
        changes, size = size_changes | changes, "tiny"
    return Model(decoder_config(size, **changes), get_precision(precision))
