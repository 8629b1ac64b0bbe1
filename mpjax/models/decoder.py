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

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats import slice_view
from mpjax.models.block import Sight
from mpjax.models.cache import cache_storage, empty
from mpjax.models.config import DecoderConfig, decoder_config
from mpjax.models.network import Network
from mpjax.models.skeleton import At, decoder_parts, init_boxed, part_key
from mpjax.models.stack import Stack, equal_segments
from mpjax.models.storage import Storage
from mpjax.models.trunk import Trunk
from mpjax.precision import Precision, dtype_name, get_precision, wider
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
        return {"decoder": init_boxed(self.config, at, key, decoder_parts(self.config, at))}

    @property
    def depth(self) -> int:
        """How many layers are stacked below `decoder/layers`."""
        return self.config.layers

    @property
    def further(self) -> dict[str, str]:
        """The tied head's product and the loss."""
        return {"decoder/head": "product", "decoder/loss": "module"}

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Ranges of consecutive layers whose policies are equal: (start, stop)."""
        return equal_segments(self.precision, self.paths, "decoder", self.depth)

    @jax.named_scope(CARRIED)
    def features(
        self, params: Any, ids_BT: Any, *, keep: Any = None, state: Any = None, key: Any = None,
        train: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Returns the features behind the last norm (B, T, D) and the new state, as `apply`."""
        state = state or {}
        T = ids_BT.shape[1]
        stack = Stack(self.config, self.at, self.segments, rounding=self.rounds)
        x, cache, amax = Trunk(stack, self.shard)(
            slice_view(params)["decoder"], ids_BT, self._sight(T, keep, state),
            cache=state.get("layers"), amax=state.get("amax", {}).get("layers"), key=key,
            train=train,
        )  # fmt: skip
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
            keep_BT = jnp.asarray(keep_BT).astype(bool)  # tokenizers give 0 and 1
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
        p = slice_view(params)["decoder"]
        # One key for all chunks of a loss in chunks: each number is still rounded without bias.
        key = None if key is None else part_key(key, "head")
        if not self.config.tied:
            head, _ = decoder_parts(self.config, self.at)["head"]
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

    def init_cache(
        self, batch: int, length: int, storage: str | Storage = "", *, pads: Any = None
    ) -> Any:
        """Returns an empty key/value cache.

        Args:
          batch: B.
          length: tokens that it can hold, padding included.
          storage: of keys and values, such as `bf16`, `int8` or `e4m3` with a scale for each token
            and head; by default the products' compute dtype.
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
        form = cache_storage(storage or dtype_name(dtype))
        state = {
            "layers": (empty(shape, form, dtype), empty(shape, form, dtype)),
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
