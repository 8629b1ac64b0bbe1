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

from mpjax.formats import slice_view
from mpjax.models.core.checks import as_counts, as_ids, below, language_inputs, targets_of
from mpjax.models.core.module import At
from mpjax.models.core.network import Network
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.decoder_config import DecoderConfig, decoder_config
from mpjax.models.transformer.heads import next_token_head, next_token_logits, next_token_loss
from mpjax.models.transformer.transformer import (
    Segments,
    Transformer,
    attention_context_of,
    empty_cache,
    equal_segments,
)
from mpjax.precision import Precision, get_precision
from mpjax.precision.policy import CARRIED


@dataclasses.dataclass(frozen=True)
class Decoder(Network):
    """A decoder and its Precision: `init(key) -> params`, `apply(params, ids) -> logits, state`.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    root: ClassVar[str] = "decoder"
    stateless_product: ClassVar[str] = "decoder/head"

    def _described(self, at: At) -> Transformer:
        return Transformer(self.config, at, "decoder", heads=next_token_head(self.config, at))

    def _transformer(self) -> Transformer:
        return self._described(self.at).running(self, self.segments)

    def init_with_axes(self, at: At, key: Any) -> Any:
        """See `Network`; blocks are stacked."""
        return {"decoder": self._described(at).init_with_axes(key)}

    @property
    def layer_counts(self) -> dict[str, int]:
        """See `Network`."""
        return {"decoder": self.config.layers}

    @property
    def extra_sites(self) -> dict[str, str]:
        """The tied head's product and the loss."""
        return {"decoder/head": "product", "decoder/loss": "module"}

    @functools.cached_property
    def segments(self) -> Segments:
        """Ranges of consecutive layers whose policies are equal: (start, stop)."""
        return equal_segments(self.precision, self.paths, "decoder", self.config.layers)

    @jax.named_scope(CARRIED)
    def features(
        self, params: Any, ids_BT: Any, *, keep: Any = None, state: Any = None, key: Any = None,
        train: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Returns the features behind the last norm (B, T, D) and the new state, as `apply`."""
        state, ids_BT = state or {}, as_ids(ids_BT, "decoder")
        T = ids_BT.shape[1]
        x, cache, amax = self._transformer()(
            below(slice_view(params), "decoder"), ids_BT, attention_context_of(T, keep, state),
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
        p, cap = slice_view(params)["decoder"], self.config.logit_cap
        return next_token_logits(self._transformer(), p, x, key, cap), state

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
        loss = next_token_loss(self._transformer(), self.config, p, x, batch, key, train)
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
        state = empty_cache(self.config, self.precision, batch, length, storage)
        return state if pads is None else state | {"pads": jnp.asarray(as_counts(pads, "pads"))}


def decoder(
    size: str | DecoderConfig, precision: str | Precision = "fp32", **changes: Any
) -> Decoder:
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
    return Decoder(decoder_config(size, **changes), get_precision(precision))
