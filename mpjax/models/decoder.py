"""The decoder: embedding, blocks in segments of equal precision, head and loss.

Parameters are one canonical tree whatever the Precision: the weights of all blocks are stacked
along a leading layer axis. Shapes: B batch, T tokens, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats import weight_view
from mpjax.models.block import Sight
from mpjax.models.config import DecoderConfig, decoder_config
from mpjax.models.network import Network
from mpjax.models.skeleton import At, init_boxed, outer_parts, part_key
from mpjax.models.stack import Stack
from mpjax.ops.rotary import sinusoid
from mpjax.precision import Precision, get_precision, wider
from mpjax.precision.policy import CARRIED


@dataclasses.dataclass(frozen=True)
class Model(Network):
    """A decoder and its Precision: `init(key) -> params`, `apply(params, ids) -> logits, state`.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    root: ClassVar[str] = "decoder"
    unthreaded: ClassVar[str] = "decoder/head"

    def boxed(self, at: At, key: Any) -> Any:
        """Returns drawn parameters boxed with their logical axes; blocks are stacked."""
        return init_boxed(self.config, at, key)

    @property
    def depth(self) -> int:
        """How many layers are stacked below `decoder/layers`."""
        return self.config.layers

    @property
    def further(self) -> dict[str, str]:
        """The tied head's product and the loss."""
        return {"decoder/head": "product", "decoder/loss": "module"}

    def _block_paths(self, layer: int) -> list[str]:
        return [path for path in self.paths if path.startswith(f"decoder/layers/{layer}/")]

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Ranges of consecutive layers whose policies are equal: (start, stop)."""

        def policies(layer: int) -> list[Any]:
            found = self._block_paths(layer)
            return [(self.precision.policy(path), self.precision.recipe(path)) for path in found]

        starts = [0] + [i for i in range(1, self.config.layers) if policies(i) != policies(i - 1)]
        return tuple(zip(starts, [*starts[1:], self.config.layers], strict=True))

    @jax.named_scope(CARRIED)
    def features(
        self, params: Any, ids_BT: Any, *, keep: Any = None, state: Any = None, key: Any = None,
        train: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Returns the features behind the last norm (B, T, D) and the new state, as `apply`."""
        c, p, state = self.config, weight_view(params)["decoder"], state or {}
        parts = outer_parts(c, self.at)
        T = ids_BT.shape[1]
        if "position" not in state and T > c.context and c.position == "learned":
            raise ConfigError(
                f"model: sequence of {T} tokens is longer than context={c.context}; set"
                f" context={T} or shorten it"
            )
        sight = self._sight(T, keep, state)
        x: Any = parts["embed"][0].apply({"params": p["embed"]}, ids_BT)
        if c.scale_embed:
            x = x * jnp.asarray(c.width**0.5, x.dtype)
        if c.position != "rotary":
            if c.position == "learned":
                at: Any = parts["position"][0].apply({"params": p["position"]}, sight.positions)
            else:
                at = sinusoid(sight.positions, c.width)
            x = x + (at[None] if at.ndim == 2 else at).astype(x.dtype)
        x = self.shard(x, ("batch", "length", "embed"))
        dropping = train and c.dropout > 0
        if dropping:
            if key is None:
                raise ConfigError("model: dropout needs a key; pass key= or train=False")
            x = nn.Dropout(c.dropout, deterministic=False).apply(
                {}, x, rngs={"dropout": part_key(key, "embed")}
            )
        stack = Stack(c, self.at, self.segments, rounding=self.rounds)
        amax = state.get("amax", {}).get("layers", {})
        x, cache, amax = stack(p["layers"], x, sight, state.get("layers"), amax, key, dropping)
        if c.norm_first:
            x = parts["norm"][0].apply({"params": p["norm"]}, x)
        new = dict(state)
        if "layers" in state:
            new |= {"layers": cache, "position": state["position"] + T}
        if amax:
            new["amax"] = state["amax"] | {"layers": amax}
        return x, new or None

    def _sight(self, T: int, keep_BT: Any, state: Any) -> Sight:
        if "position" not in state:
            if keep_BT is None:
                return Sight(jnp.arange(T))
            # Tokens are counted, padding is not: on either side it changes no token's position.
            return Sight(jnp.maximum(jnp.cumsum(keep_BT, axis=1) - 1, 0), keep_BS=keep_BT)
        if keep_BT is not None:
            raise ConfigError(
                "model: keep beside a cache; the cache knows the padding: init_cache(pads=...)"
            )
        first = state["position"]
        slots_T = jnp.arange(T) + first
        if "pads" not in state:
            return Sight(slots_T, first)
        pads_B1 = state["pads"][:, None]
        keep_BS = jnp.arange(state["layers"][0].shape[2])[None, :] >= pads_B1
        return Sight(jnp.maximum(slots_T[None, :] - pads_B1, 0), first, keep_BS)

    def _unembed(self, params: Any, x: Any, key: Any = None) -> Any:
        """Features to logits in the head's output dtype."""
        p = weight_view(params)["decoder"]
        # One key for all chunks of a loss in chunks: each number is still rounded without bias.
        key = None if key is None else part_key(key, "head")
        if not self.config.tied:
            head, _ = outer_parts(self.config, self.at)["head"]
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
        self, params: Any, ids_BT: Any, *, keep: Any = None, state: Any = None, key: Any = None,
        train: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Returns the logits (B, T, V) and the new state.

        Args:
          params: from `init`.
          ids_BT: token ids.
          keep: (B, T) bool, False where there is padding, on either side; None is all True.
            Logits at padding mean nothing.
          state: a key/value cache from `init_cache`, amax histories from `init_state`, or None.
          key: of dropout and of recipes that draw, needed only for training.
          train: whether dropout is on.
        """
        x, state = self.features(params, ids_BT, keep=keep, state=state, key=key, train=train)
        logits = self._unembed(params, x, key)
        cap = self.config.logit_cap
        return (cap * jnp.tanh(logits / cap) if cap else logits), state

    def loss(
        self, params: Any, batch: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        """Returns the mean next-token cross-entropy and the state.

        Args:
          batch: `{"inputs": (B, T), "targets": (B, T)}` token ids; `keep` (B, T) bool where there
            is padding, and `weights` (B, T) of the tokens in the mean, if they are not all alike.
        """
        c = self.config
        x, state = self.features(
            params, batch["inputs"], keep=batch.get("keep"), state=state, key=key, train=train
        )
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
            weights_BT=batch.get("weights"),
        )
        return loss, state

    def init_cache(self, batch: int, length: int, *, pads: Any = None) -> Any:
        """Returns an empty key/value cache, in the products' compute dtype.

        Args:
          batch: B.
          length: tokens that it can hold, padding included.
          pads: (B,) tokens of padding on the left of each row; None is none.
        """
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
        shape = (c.layers, batch, length, c.groups, c.per_head)
        state = {
            "layers": (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),
            "position": jnp.int32(0),
        }
        return state if pads is None else state | {"pads": jnp.asarray(pads, jnp.int32)}


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
    return Model(decoder_config(size, **changes), get_precision(precision))
