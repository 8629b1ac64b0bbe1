"""The bidirectional encoder (BERT) with its heads.

Parameters are the same tree under every Precision: the weights of all blocks are stacked along a
leading layer axis. Shapes: B batch, T tokens, D width, V vocabulary, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats import weight_view
from mpjax.models.core.batch_fields import check_ids, encoder_batch
from mpjax.models.core.checks import Ids, as_ids, below, keep_of
from mpjax.models.core.module import At, part_key, run_module
from mpjax.models.core.sizes import FieldValue
from mpjax.models.transformer.block import AttentionContext
from mpjax.models.transformer.encoder_config import EncoderConfig, encoder_config
from mpjax.models.transformer.heads import ClassHead, MaskedHead, MeanPooler, Pooler, TaskHeads
from mpjax.models.transformer.transformer import (
    Parts,
    Transformer,
    TransformerNetwork,
    packed_context,
)
from mpjax.precision import Precision, get_precision
from mpjax.precision.policy import CARRIED
from mpjax.typing import Array, ArrayLike, Batch, Key, ModelState, Params

_INPUTS = ("ids", "keep", "types", "offset", "segments")


def _head_parts(c: EncoderConfig, at: At) -> Parts:
    """The pooler and the heads that a configuration has, each with examples of its inputs."""
    x_BTD, x_BD = jnp.zeros((1, 1, c.width)), jnp.zeros((1, c.width))
    name = "encoder/{}".format

    def classes(own: str, count: int, rate: float) -> ClassHead:
        return ClassHead(at(own), count, rate, name=name(own))

    parts: Parts = {}
    if c.pools:
        pooler = functools.partial(Pooler, width=c.width) if c.pool == "first" else MeanPooler
        parts["pooler"] = (pooler(at("pooler"), name=name("pooler")), (x_BTD,))
    if c.head in ("masked", "pretrain"):
        table = jnp.zeros((c.vocabulary, c.width))
        parts["masked"] = (MaskedHead(at("masked"), c, name=name("masked")), (x_BTD, table))
    if c.head == "pretrain":
        parts["next"] = (classes("next", 2, 0.0), (x_BD,))
    if c.head in ("class", "token"):
        x = x_BD if c.head == "class" else x_BTD
        parts[c.head] = (classes(c.head, c.classes, c.dropout), (x,))
    if c.task_heads:
        several = TaskHeads(
            at("task_heads"), tuple(c.task_shapes.items()), c.dropout, name=name("task_heads")
        )
        parts["task_heads"] = (several, (x_BTD, x_BD))
    return parts


@dataclasses.dataclass(frozen=True)
class Encoder(TransformerNetwork):
    """An encoder and its Precision: `apply(params, inputs) -> outputs, state`.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    root: ClassVar[str] = "encoder"

    config: EncoderConfig

    def transformer(self, at: At, name: str = "encoder") -> Transformer:
        """See `TransformerNetwork`."""
        c = self.config
        return Transformer(self, c, at, name, False, types=c.types, heads=_head_parts(c, at))

    def _inputs(self, inputs: Ids | Mapping[str, ArrayLike]) -> dict[str, Any]:
        fields: dict[str, Any] = {"ids": inputs}
        if isinstance(inputs, Mapping):
            fields = encoder_batch(inputs)
        if "segments" in fields and self.config.pools:
            raise ConfigError(
                f"encoder: segments are given, and head={self.config.head!r} pools a row as one"
                " text; set head='masked' or head='token', or give one text a row"
            )
        if "attention_mask" in fields:
            fields["keep"] = keep_of(fields, "encoder")
            del fields["attention_mask"]
        if odd := sorted(set(fields) - set(_INPUTS)):
            raise ConfigError(
                f"encoder: the input holds {odd[0]!r}; give ids, and keep and types if any"
            )
        if "types" in fields and not self.config.types:
            raise ConfigError(
                "encoder: token types are given and types=0; leave them out, or set types=2"
            )
        for name, value in fields.items():
            if name != "offset" and jnp.shape(value) != jnp.shape(fields["ids"]):
                raise ConfigError(
                    f"encoder: {name} has shape {jnp.shape(value)}, ids"
                    f" {jnp.shape(fields['ids'])}; give one for each token"
                )
        return fields

    def read_batch(self, batch: Batch) -> Batch:
        """Returns a batch under our names, whether it is traced or not."""
        return encoder_batch(batch)

    def check_batch(self, batch: Batch) -> None:
        """Checks the token ids of a batch that the host has at hand.

        Raises:
          ConfigError: an id that is no token of the model, or a type that it does not have.
        """
        read, c = encoder_batch(batch), self.config
        check_ids(read["ids"], c.vocabulary, "encoder: ids")
        if c.types and read.get("types") is not None:
            check_ids(read["types"], c.types, "encoder: types")

    @jax.named_scope(CARRIED)
    def apply(
        self, params: Params, inputs: Ids | Mapping[str, ArrayLike], *, state: ModelState = None,
        key: Key | None = None, train: bool = False,
    ) -> tuple[dict[str, Array], ModelState]:  # fmt: skip
        """Returns outputs by name and the new state.

        Args:
          params: from `init`.
          inputs: token ids (B, T), or a dict of `ids`, `keep` (B, T; True or 1 where there is no
            padding), `types` (B, T; 0 or 1 for the two texts of a pair), `offset` (B, T, D; added
            to the token embeddings, in float32) and, in place of `keep`, `segments` (B, T; 1, 2 ...
            for the texts of a row, 0 at padding), where no output is of a whole row. transformers'
            `input_ids`, `attention_mask` and `token_type_ids` are other names for the first three.
          state: amax histories from `init_state`, or None.
          key: of dropout and of recipes that draw, needed only for training.
          train: whether dropout is on.

        Returns:
          `features` (B, T, D); `pooled` (B, D) for heads `none`, `pretrain` and `class`; logits:
          `masked` (B, T, V) for `masked` and `pretrain`, `next` (B, 2; 0 is the next sentence) for
          `pretrain`, `class` (B, C), `token` (B, T, C), and of each task head by its name. Outputs
          at padding are undefined.
        """
        c, p, fields = self.config, below(weight_view(params), "encoder"), self._inputs(inputs)
        histories = (state or {}).get("amax", {})
        keep = jnp.asarray(fields["keep"]).astype(bool) if "keep" in fields else None
        ids = as_ids(fields["ids"], "encoder")
        if "segments" in fields:
            context = packed_context(ids, fields["segments"], keep, {}, "encoder")
        else:
            context = AttentionContext(jnp.arange(ids.shape[1]), keep_BS=keep)
        transformer = self.transformer(self.at)
        x, _, amax, found = transformer(
            p, ids, context, kinds_BT=fields.get("types"), offset_BTD=fields.get("offset"),
            amax=histories.get("layers"), key=key, train=train,
        )  # fmt: skip
        new = dict(histories) | ({"layers": amax} if amax else {})
        parts, out = transformer.heads, {"features": x}

        def run(name: str, *args: object) -> Any:
            rngs = self.rngs(None if key is None else part_key(key, name), train)
            module, own = parts[name][0], p.get(name, {})
            y, history = run_module(module, own, *args, history=histories.get(name), rngs=rngs)
            if history:
                new[name] = history
            return y

        if c.pools:
            out["pooled"] = run("pooler", x, *([keep] if c.pool == "mean" else []))
        pooled = out.get("pooled")
        takes: dict[str, tuple[object, ...]]
        takes = {"next": (pooled,), "class": (pooled, train), "token": (x, train)}
        takes["masked"] = (x, p["embed"]["table"])
        out |= {name: run(name, *takes[name]) for name in parts if name in takes}
        if "task_heads" in parts:
            out |= run("task_heads", x, pooled, train)
        if new:
            state = (state or {}) | {"amax": new}
        return out, ((state or {}) | {"collected": {"encoder": found}} if found else state)


def encoder(
    size: str | EncoderConfig, precision: str | Precision = "fp32", **changes: FieldValue
) -> Encoder:
    """Returns a bidirectional encoder that carries its Precision.

    Args:
      size: `bert-tiny bert-mini bert-base bert-large minilm-l6`, or an EncoderConfig.
      precision: anything that `get_precision` reads.
      changes: fields of EncoderConfig, such as `head="class", classes=3`.

    Raises:
      ConfigError: unknown size or field, a path that no rule covers, a rule that matches nothing.

    Example:
      >>> model = encoder("bert-tiny", "bf16", layers=1, width=32, vocabulary=50, head="class")
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.zeros((1, 4), jnp.int32))[0]["class"].shape
      (1, 2)

    References:
      Devlin et al. 2019, BERT.
    """
    return Encoder(encoder_config(size, **changes), get_precision(precision))
