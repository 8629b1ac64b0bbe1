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
from mpjax.formats import slice_view
from mpjax.models.core.checks import as_counts, as_ids, below, language_inputs, targets_of
from mpjax.models.core.module import At
from mpjax.models.core.network import Network
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.decoder_config import DecoderConfig, decoder_config
from mpjax.models.transformer.heads import next_token_loss, unembed
from mpjax.models.transformer.parts import decoder_parts, init_boxed
from mpjax.models.transformer.stack import Stack, equal_segments
from mpjax.models.transformer.trunk import Trunk, empty_cache, sight_of
from mpjax.precision import Precision, get_precision
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
        state, ids_BT = state or {}, as_ids(ids_BT, "decoder")
        T = ids_BT.shape[1]
        stack = Stack(self.config, self.at, self.segments, rounding=self.rounds)
        x, cache, amax = Trunk(stack, self.shard)(
            below(slice_view(params), "decoder"), ids_BT, sight_of(T, keep, state),
            cache=state.get("layers"), amax=state.get("amax", {}).get("layers"), key=key,
            train=train,
        )  # fmt: skip
        new = dict(state)
        if "layers" in state:
            new |= {"layers": cache, "position": state["position"] + T}
        if amax:
            new["amax"] = state["amax"] | {"layers": amax}
        return x, new or None

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
        logits = unembed(self.config, self.at, slice_view(params)["decoder"], x, key)
        cap = self.config.logit_cap
        return (cap * jnp.tanh(logits / cap) if cap else logits), state

    @ops.counted(ops.weight_sum)
    def loss(
        self, params: Any, batch: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        """Returns the mean next-token cross-entropy and the state.

        Args:
          batch: `{"inputs": (B, T), "targets": (B, T)}` token ids; `keep` (B, T) bool where there
            is padding, which may be called `attention_mask`, and `weights` (B, T) of the tokens in
            the mean, if they are not all alike.
        """
        ids, keep = language_inputs(batch, "decoder")
        targets_of(batch, ids.shape, "decoder")
        x, state = self.features(params, ids, keep=keep, state=state, key=key, train=train)
        p = slice_view(params)["decoder"]
        return next_token_loss(self.config, self.at, p, x, batch, key, train), state

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
        state = empty_cache(self.config, self.precision, batch, length, storage)
        return state if pads is None else state | {"pads": jnp.asarray(as_counts(pads, "pads"))}


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
