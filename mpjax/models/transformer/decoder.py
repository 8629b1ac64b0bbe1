"""The decoder: embedding, blocks in segments of equal precision, head and loss.

Parameters are the same tree under every Precision: the weights of all blocks are stacked along a
leading layer axis. Shapes: B batch, T tokens, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mpjax.formats import slice_view
from mpjax.models.core.checks import Counts, Ids, as_counts, as_ids, below
from mpjax.models.core.module import At
from mpjax.models.core.network import LanguageModel
from mpjax.models.core.sizes import FieldValue
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.decoder_config import DecoderConfig, decoder_config
from mpjax.models.transformer.transformer import (
    Transformer,
    TransformerNetwork,
    attention_context_of,
    empty_cache,
    packed_context,
)
from mpjax.precision import Precision, get_precision
from mpjax.precision.policy import CARRIED
from mpjax.typing import Array, ArrayLike, Key, ModelState, Params


@dataclasses.dataclass(frozen=True)
class Decoder(TransformerNetwork, LanguageModel):
    """A decoder and its Precision: `init(key) -> params`, `apply(params, ids) -> logits, state`.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    root: ClassVar[str] = "decoder"
    stateless_product: ClassVar[str] = "decoder/head"

    config: DecoderConfig

    def transformer(self, at: At, name: str = "decoder") -> Transformer:
        """See `TransformerNetwork`."""
        return Transformer(self, self.config, at, name, heads=self.heads(at))

    def _head_params(self, params: Params) -> Params:
        return slice_view(params)["decoder"]

    @jax.named_scope(CARRIED)
    def features(
        self, params: Params, ids_BT: Ids, *, keep: ArrayLike | None = None,
        offset: ArrayLike | None = None, segments: ArrayLike | None = None,
        state: ModelState = None, key: Key | None = None, train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the features after the last norm (B, T, D) and the new state, as `apply`."""
        state, ids = state or {}, as_ids(ids_BT, "decoder")
        T = ids.shape[1]
        if segments is None:
            context = attention_context_of(T, keep, state)
        else:
            context = packed_context(ids, segments, keep, state, "decoder")
        x, cache, amax, found = self.transformer(self.at)(
            below(slice_view(params), "decoder"), ids, context,
            offset_BTD=offset, cache=state.get("layers", ()),
            amax=state.get("amax", {}).get("layers"), key=key, train=train,
        )  # fmt: skip
        new = dict(state)
        if "layers" in state:
            new |= {"layers": cache, "position": state["position"] + T}
        if amax:
            new["amax"] = state["amax"] | {"layers": amax}
        if found:
            new["collected"] = {"decoder": found}
        return x, new or None

    def init_cache(
        self, batch: int, length: int, storage: str | Storage = "", *, pads: Counts | None = None
    ) -> ModelState:
        """Returns an empty key/value cache.

        Args:
          batch: rows B.
          length: tokens that it can hold, padding included.
          storage: of keys and values, such as `bf16`, or `int8` with a scale for each token and
            head; by default the compute dtype.
          pads: (B,) tokens of padding on the left of each row; None is none.
        """
        state = empty_cache(self.config, self.precision, batch, length, storage)
        return state if pads is None else state | {"pads": jnp.asarray(as_counts(pads, "pads"))}


def decoder(
    size: str | DecoderConfig, precision: str | Precision = "fp32", **changes: FieldValue
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
