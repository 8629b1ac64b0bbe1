"""The quality of low-precision inference: perplexity and accuracy against the original.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, explains_calls
from mpjax.formats.checks import batch_rows
from mpjax.markdown import table
from mpjax.models.core.batch_fields import check_batch, read_batch
from mpjax.models.core.checks import each_batch, language_inputs, targets_of
from mpjax.models.core.storage import Storage, stored_bytes
from mpjax.models.inference.quantize_weights import has_scales, quantize_weights
from mpjax.models.inference.settings import CacheStorage, as_cache
from mpjax.models.transformer.decoder import Decoder
from mpjax.precision import get_precision
from mpjax.typing import Array, Batch, Params


class Judged(NamedTuple):
    """How well a model predicts a text.

    Args:
      loss: mean cross-entropy of the next token, nats.
      accuracy: share of next tokens that have the largest logit.
      tokens: how many it predicted, those that have a weight.
    """

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss; inf beyond the largest number."""
        return exp(self.loss)


def exp(x: float) -> float:
    """Returns e^x as floating-point arithmetic has it: inf beyond its range, NaN for NaN."""
    return math.inf if x > math.log(sys.float_info.max) else math.exp(x)


_FIELDS = ("inputs", "targets", "keep", "attention_mask", "segments", "weights")


@functools.partial(jax.jit, static_argnames=("model", "cache"))
def _sums(model: Decoder, params: Params, batch: Batch, cache: str | Storage) -> tuple[Array, ...]:
    ids_BT, masks = language_inputs(batch, "judge")
    targets_BT, weights_BT = targets_of(batch, ids_BT.shape, "judge"), batch.get("weights")
    B, T = targets_BT.shape
    state = (model.init_state() or {}) | (model.init_cache(B, T, cache) if cache else {})
    logits_BTV, _ = model.apply(params, ids_BT, state=state or None, **masks)
    if weights_BT is None:
        weights_BT = jnp.ones((B, T), jnp.float32)
    weights_BT = jnp.asarray(weights_BT).astype(jnp.float32)
    logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)  # sums of V terms
    # As in the loss: a target that is no token is NaN, where an index would wrap around.
    known_BT = (targets_BT >= 0) & (targets_BT < logp_BTV.shape[-1])
    index_BT1 = jnp.where(known_BT, targets_BT, 0)[..., None]
    nll = -jnp.take_along_axis(logp_BTV, index_BT1, axis=-1)[..., 0]
    right = (jnp.argmax(logits_BTV, axis=-1) == targets_BT).astype(jnp.float32)
    nll, right = (jnp.where(known_BT, x, jnp.nan) for x in (nll, right))
    # where, not times: a term without weight may be infinite.
    nll, right = (jnp.sum(jnp.where(weights_BT != 0, weights_BT * x, 0)) for x in (nll, right))
    return nll, right, jnp.sum(weights_BT), jnp.count_nonzero(weights_BT)


@explains_calls
def judge(
    model: Decoder, params: Params, batches: Iterable[Batch], *, cache: CacheStorage = ""
) -> Judged:
    """Returns how well a model predicts a text.

    Args:
      model: a decoder.
      params: its weights, quantised or not.
      batches: `{"inputs": (B, T), "targets": (B, T)}` token ids; `keep` (B, T) bool where there is
        padding, which may be called `attention_mask`, and `weights` (B, T) of the targets, if they
        are not all alike, or `segments` (B, T) of packed documents; or what transformers calls
        `input_ids`, `labels` and `attention_mask`.
      cache: storage of keys and values, as in `generate`; by default there is no cache.

    Raises:
      ConfigError: no batch, one that is something else, an id that is no token, or `keep` or
        `segments` beside a cache.

    Example:
      >>> from mpjax.models import decoder
      >>> model = decoder("tiny", layers=1, width=16, heads=2)
      >>> ids = jnp.arange(8, dtype=jnp.int32).reshape(1, 8)
      >>> batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
      >>> judge(model, model.init(jax.random.key(0)), [batch]).tokens
      7
    """
    loss = right = weight = 0.0
    tokens, storage = 0, as_cache(cache)
    for batch in each_batch(batches, "judge"):
        check_batch(model, batch)
        read = read_batch(model, batch)
        held = {name: read[name] for name in _FIELDS if name in read}
        batch_rows(held, "judge")
        nll, hits, weights, targets = _sums(model, params, held, storage)
        loss, right, weight = loss + float(nll), right + float(hits), weight + float(weights)
        tokens += int(targets)
    if not tokens:
        raise ConfigError("judge: no batch with a target; give some text")
    return Judged(loss / weight, right / weight, tokens)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a trained model.

    Args:
      weights: storage, as `quantize_weights` reads it.
      rules: of the weights.
      precision: that it computes in; empty is the model's own.
      cache: storage of keys and values.
      calibrated: whether its weights are rounded with the `moments` of `compare`.

    Example:
      >>> print(Variant("int4@32", cache="int8"))
      int4@32 weights, int8 cache
    """

    weights: str = "f32"
    rules: tuple[str, ...] = ()
    precision: str = ""
    cache: CacheStorage = ""
    calibrated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.cache, str):  # None or a dtype
            object.__setattr__(self, "cache", str(as_cache(self.cache)))

    def __str__(self) -> str:
        parts = [f"{self.weights} weights{' (calibrated)' * self.calibrated}", *self.rules]
        parts += [f"precision {self.precision}"] * bool(self.precision)
        return ", ".join([*parts, *([f"{self.cache} cache"] * bool(self.cache))])


class Compared(NamedTuple):
    """The quality and the size of a variant.

    Args:
      variant: what ran.
      judged: how it predicts.
      change: of its perplexity against the first variant, in percent.
      weight_bytes: of all weights.
      cache_bytes: of keys and values of one token in all layers.
    """

    variant: Variant
    judged: Judged
    change: float
    weight_bytes: int
    cache_bytes: float


@explains_calls
def compare(
    model: Decoder, params: Params, batches: Iterable[Batch], variants: Sequence[Variant], *,
    moments: Mapping[str, Array] | None = None,
) -> list[Compared]:  # fmt: skip
    """Returns perplexity, accuracy and bytes of ways to run a trained model.

    Args:
      model: a decoder.
      params: its weights as they were trained.
      batches: `{"inputs": (B, T), "targets": (B, T)}` token ids.
      variants: the first is what the others are compared with.
      moments: from `input_moments`, for variants that are calibrated.

    Raises:
      ConfigError: a calibrated variant without moments, or with nothing to round by them.

    Example:
      >>> from mpjax.models import Variant, compare, decoder
      >>> model = decoder("tiny", layers=1, width=16, heads=2)
      >>> ids = jnp.arange(8, dtype=jnp.int32).reshape(1, 8)
      >>> batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
      >>> params = model.init(jax.random.key(0))
      >>> rows = compare(model, params, [batch], [Variant(), Variant("int8")])
      >>> [str(row.variant) for row in rows], rows[0].change
      (['f32 weights', 'int8 weights'], 0.0)
    """
    for variant in (v for v in variants if v.calibrated):  # before the others run
        if not moments:
            raise ConfigError(
                f"compare: {variant} needs moments; pass moments=input_moments(model, params, ...)"
                " of another text"
            )
        if not has_scales(variant.weights, variant.rules):
            raise ConfigError(
                f"compare: {variant}: nothing is rounded to a grid with scales; drop calibrated, or"
                " store weights as int4@32"
            )
    batches, rows = list(each_batch(batches, "compare")), list[Compared]()
    for variant in variants:
        own = model
        if variant.precision:
            own = dataclasses.replace(model, precision=get_precision(variant.precision))
        stored = quantize_weights(
            params, variant.weights, rules=variant.rules,
            moments=moments if variant.calibrated else None,
        )  # fmt: skip
        judged = judge(own, stored, batches, cache=variant.cache)
        slots = jax.eval_shape(lambda m=own, v=variant: m.init_cache(1, 64, v.cache)["layers"])
        first = rows[0].judged if rows else judged
        change = 100 * (exp(judged.loss - first.loss) - 1)
        rows.append(
            Compared(variant, judged, change, stored_bytes(stored), stored_bytes(slots) / 64)
        )
    return rows


def as_markdown(rows: Sequence[Compared]) -> str:
    """Returns a table of `compare`'s rows."""
    head = ("variant", "perplexity", "change", "accuracy", "weights, MB", "cache, bytes a token")
    return table(
        head,
        [
            (
                row.variant, f"{row.judged.perplexity:.4f}", f"{row.change:+.3f} %",
                f"{100 * row.judged.accuracy:.2f} %", f"{row.weight_bytes / 1e6:.1f}",
                f"{row.cache_bytes:,.0f}",
            )
            for row in rows
        ],
    )  # fmt: skip
