"""The encoder-decoder: a bidirectional encoder of the source, a causal decoder of the target.

Shapes: B batch, S source tokens, T target tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats import weight_view
from mpjax.models.core.batch_fields import seq2seq_batch
from mpjax.models.core.checks import Ids, as_ids, below, keep_of
from mpjax.models.core.module import At, part_key
from mpjax.models.core.network import NextToken
from mpjax.models.core.sizes import FieldValue
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.block import AttentionContext
from mpjax.models.transformer.kv_cache import Cache
from mpjax.models.transformer.seq2seq_config import Seq2SeqConfig, seq2seq_config
from mpjax.models.transformer.transformer import (
    Transformer,
    TransformerNetwork,
    attention_context_of,
    empty_cache,
)
from mpjax.precision import Precision, get_precision
from mpjax.precision.policy import CARRIED
from mpjax.typing import Array, ArrayLike, Batch, Key, ModelState, Params

HALVES = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Seq2Seq(TransformerNetwork, NextToken):
    """An encoder-decoder and its Precision; paths begin with `encoder` or `decoder`.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    root: ClassVar[str] = ""
    stateless_product: ClassVar[str] = "decoder/head"

    config: Seq2SeqConfig

    def transformer(self, at: At, name: str) -> Transformer:
        """See `TransformerNetwork`."""
        c, own = self.config, functools.partial(at, name)
        if name == "encoder":
            return Transformer(self, c.encoder, own, name, causal=False)
        return Transformer(self, c, own, name, cross=True, heads=self.heads(own))

    def init_with_axes(self, at: At, key: Key) -> Params:
        """See `Network`; blocks are stacked."""
        shared = () if self.config.source_vocabulary else ("embed",)  # it is the decoder's
        return {
            half: self.transformer(at, half).init_with_axes(
                part_key(key, half), without=shared if half == "encoder" else ()
            )
            for half in HALVES
        }

    @property
    def layer_counts(self) -> dict[str, int]:
        """See `Network`."""
        return {"encoder": self.config.encoder.layers, "decoder": self.config.layers}

    @property
    def extra_sites(self) -> dict[str, str]:
        """The look-up in a shared table, the tied head's product, and the loss."""
        paths = {"decoder/head": "product", "decoder/loss": "module"}
        return paths if self.config.source_vocabulary else paths | {"encoder/embed": "module"}

    def _run(
        self, half: str, p: Params, ids: Array, context: AttentionContext, state: ModelState,
        key: Key | None, train: bool, offset: ArrayLike | None = None, cache: Cache = (),
    ) -> tuple[Array, Cache, ModelState]:  # fmt: skip
        """Features, cache and the state with this half's new amax histories."""
        histories = state.get("amax", {})
        x, cache, amax, found = self.transformer(self.at, half)(
            p, ids, context, offset_BTD=offset, cache=cache,
            amax=histories.get(half, {}).get("layers"), key=key, train=train,
        )  # fmt: skip
        if amax:
            state = state | {"amax": histories | {half: {"layers": amax}}}
        if found:
            state = state | {"collected": state.get("collected", {}) | {half: found}}
        return x, cache, state

    def _read(
        self, p: Params, source: Ids, keep: ArrayLike | None, state: ModelState, key: Key | None,
        train: bool, offset: ArrayLike | None = None,
    ) -> tuple[Array, Array | None, ModelState]:  # fmt: skip
        """The encoder's features, which of them are no padding, and the new state."""
        own = below(p, "encoder")
        if not self.config.source_vocabulary:
            own = own | {"embed": below(p, "decoder")["embed"]}
        ids = as_ids(source, "seq2seq: source")
        keep_BS = None if keep is None else jnp.asarray(keep).astype(bool)
        if keep_BS is not None and keep_BS.shape != ids.shape:
            raise ConfigError(
                f"seq2seq: source_keep has shape {keep_BS.shape}, source {ids.shape}; give one for"
                " each token"
            )
        key = None if key is None else part_key(key, "source")
        context = AttentionContext(jnp.arange(ids.shape[1]), keep_BS=keep_BS)
        x, _, state = self._run("encoder", own, ids, context, state, key, train, offset)
        return x, keep_BS, state

    @jax.named_scope(CARRIED)
    def features(
        self, params: Params, inputs: Ids | Mapping[str, Ids], *, state: ModelState = None,
        key: Key | None = None, train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the decoder's features (B, T, D) and the new state, as `apply`."""
        state, p, offset = state or {}, weight_view(params), None
        if "position" in state:
            ids, keep, own, source = as_ids(inputs, "seq2seq"), state.get("source_keep"), None, None
        else:
            if not isinstance(inputs, dict) or not {"source", "inputs"} <= set(inputs):
                raise ConfigError(
                    "seq2seq: without a state from start() the input is a dict of source (B, S) and"
                    " inputs (B, T), and of source_keep and keep if there is padding"
                )
            if "segments" in inputs:
                raise ConfigError(
                    "seq2seq: segments are given, and a target has one source; give one pair a row,"
                    " as bucket_batches does"
                )
            ids = as_ids(inputs["inputs"], "seq2seq: inputs")
            source_keep = keep_of(inputs, "seq2seq", keep="source_keep")
            source, keep, state = self._read(
                p, inputs["source"], source_keep, state, key, train, inputs.get("source_offset")
            )
            offset = inputs.get("offset")
            own = keep_of(inputs, "seq2seq", mask="decoder_attention_mask")
        context = attention_context_of(ids.shape[1], own, state)
        context = context._replace(source_BSD=source, keep_source_BS=keep)
        cached = state.get("layers", ())
        x, cache, new = self._run(
            "decoder", p["decoder"], ids, context, state, key, train, offset, cached
        )
        if "layers" in state:
            new = new | {"layers": cache, "position": state["position"] + ids.shape[1]}
        return x, new or None

    def apply(
        self, params: Params, inputs: Ids | Mapping[str, Ids], *, state: ModelState = None,
        key: Key | None = None, train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the logits of the target (B, T, V) and the new state.

        Args:
          params: from `init`.
          inputs: a dict of `source` (B, S) and `inputs` (B, T) token ids, and of `source_keep`
            (B, S) and `keep` (B, T), True or 1 where there is no padding, which may be called
            `attention_mask` and `decoder_attention_mask`, and of `source_offset` (B, S, D) and
            `offset` (B, T, D), added to the token embeddings, in float32; with a state from
            `start`, the next token ids of the target alone.
          state: from `start`, amax histories from `init_state`, or None.
          key: of dropout and of recipes that draw, needed only for training.
          train: whether dropout is on.
        """
        x, state = self.features(params, inputs, state=state, key=key, train=train)
        return self._logits(weight_view(params)["decoder"], x, key), state

    def loss(
        self, params: Params, batch: Batch, *, state: ModelState = None, key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the mean cross-entropy of the target's next tokens and the state.

        Args:
          batch: what `apply` takes, `targets` (B, T), and `weights` (B, T) of the tokens in the
            mean: 0 at padding. Or `input_ids`, `attention_mask`, `decoder_input_ids` and `labels`
            as transformers has them, -100 among the labels where there is no target.
        """
        batch = self.read_batch(batch)
        x, state = self.features(params, batch, state=state, key=key, train=train)
        return self._loss(weight_view(params)["decoder"], x, batch, key, train), state

    def read_batch(self, batch: Batch) -> Batch:
        """See `NextToken`."""
        return seq2seq_batch(batch)

    def start(
        self, params: Params, source: Ids, *, length: int, source_keep: ArrayLike | None = None,
        storage: str | Storage = "", state: ModelState = None,
    ) -> ModelState:  # fmt: skip
        """Reads a source once; returns the state from which `apply` continues a target.

        It holds the keys and values of the source in every block.

        Args:
          params: from `init`.
          source: token ids (B, S).
          length: tokens of the target that it can hold.
          source_keep: (B, S), True or 1 where there is no padding; None is all.
          storage: of the target's keys and values; by default the compute dtype.
          state: amax histories of a training with delayed scaling.
        """
        p = weight_view(params)
        x, keep, new = self._read(p, source, source_keep, state or {}, None, False)
        cache = empty_cache(self.config, self.precision, x.shape[0], length, storage)
        across = self.transformer(self.at, "decoder").source_cache(p["decoder"]["layers"], x)
        new = new | cache | {"layers": cache["layers"] + across}
        return new if keep is None else new | {"source_keep": keep}


def seq2seq(
    size: str | Seq2SeqConfig, precision: str | Precision = "fp32", **changes: FieldValue
) -> Seq2Seq:
    """Returns an encoder-decoder that carries its Precision.

    Args:
      size: `seq2seq-tiny transformer-base transformer-big`, or a Seq2SeqConfig.
      precision: anything that `get_precision` reads.
      changes: fields of Seq2SeqConfig.

    Raises:
      ConfigError: unknown size or field, a path that no rule covers, a rule that matches nothing.

    Example:
      >>> model = seq2seq("seq2seq-tiny", "bf16", layers=1, width=32, vocabulary=50)
      >>> params = model.init(jax.random.key(0))
      >>> batch = {"source": jnp.zeros((1, 5), jnp.int32), "inputs": jnp.zeros((1, 3), jnp.int32)}
      >>> model.apply(params, batch)[0].shape
      (1, 3, 50)

    References:
      Vaswani et al. 2017, Attention Is All You Need.
    """
    return Seq2Seq(seq2seq_config(size, **changes), get_precision(precision))
