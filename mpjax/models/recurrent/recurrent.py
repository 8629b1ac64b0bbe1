"""A recurrent language model: embedding, LSTM or GRU cells, head and loss.

The weights of all cells are stacked along a leading layer axis, as a decoder's blocks are. Shapes:
B batch, T tokens, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.formats import weight_view, widest
from mpjax.models.core.checks import Ids, as_ids, below
from mpjax.models.core.layers import Embed, dropout, shifted
from mpjax.models.core.module import At, init_layers, part_key, run_module
from mpjax.models.core.network import LanguageModel
from mpjax.models.core.sizes import FieldValue
from mpjax.models.recurrent.cell import Cell
from mpjax.models.recurrent.config import RecurrentConfig, recurrent_config
from mpjax.precision import Precision, get_precision
from mpjax.precision.policy import CARRIED
from mpjax.typing import Array, ArrayLike, Key, ModelState, Params


@dataclasses.dataclass(frozen=True)
class Recurrent(LanguageModel):
    """A recurrent language model: `init(key) -> params`, `apply(params, ids) -> logits, state`.

    `recurrent` makes it; see there.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    config: RecurrentConfig
    root: ClassVar[str] = "recurrent"
    stateless_product: ClassVar[str] = "recurrent/head"

    def _embed(self, at: At) -> Embed:
        c, axes, name = self.config, ("vocab", "embed"), "recurrent/embed"
        # A cell has no norm before it: from 0.02 the loss is 0.5 nats higher after 300 steps.
        return Embed(at("embed"), c.vocabulary, c.width, axes, deviation=0.2, name=name)

    def _cell(self, at: At, layer: int) -> Cell:
        context = at("layers", str(layer), "cell")
        return Cell(context, self.config.cell, name=f"recurrent/layers/{layer}/cell")

    def init_with_axes(self, at: At, key: Key) -> Params:
        """See `Network`."""
        c, x_TBD = self.config, jnp.zeros((1, 1, self.config.width))
        embed = self._embed(at).init(part_key(key, "embed"), jnp.zeros((1, 1), jnp.int32))
        draw = lambda key: self._cell(at, 0).init(key, x_TBD, None)["params"]  # noqa: E731
        tree = {"embed": embed["params"], "layers": {"cell": init_layers(draw, key, c.layers)}}
        for name, (head, _) in self.heads(at).items():
            tree[name] = head.init(part_key(key, name), x_TBD)["params"]
        return {"recurrent": tree}

    @jax.named_scope(CARRIED)
    def features(
        self, params: Params, ids_BT: Ids, *, keep: ArrayLike | None = None,
        offset: ArrayLike | None = None, segments: ArrayLike | None = None,
        state: ModelState = None, key: Key | None = None, train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the last cell's outputs (B, T, D) and the new state, as `apply`."""
        if segments is not None:
            raise ConfigError(
                "recurrent: segments are given, and its state goes from one document into the next;"
                " give one a row, as bucket_batches does"
            )
        keep_TB = None if keep is None else jnp.asarray(keep).astype(bool).T
        c, p, state = self.config, below(weight_view(params), "recurrent"), state or {}
        ids = as_ids(ids_BT, "recurrent")

        def drop(x: Array, name: str) -> Array:
            return dropout(x, c.dropout, key, name) if train and c.dropout > 0 else x

        # Time is the first axis, as the scan needs it.
        x_TBD, _ = run_module(self._embed(self.at), p["embed"], ids.T)
        if offset is not None:
            x_BTD = shifted(x_TBD.swapaxes(0, 1), offset, "recurrent")
            x_TBD = x_BTD.swapaxes(0, 1).astype(x_TBD.dtype)  # as it is without
        x_TBD = self.shard(drop(x_TBD, "embed"), ("length", "batch", None))
        carried, amax = state.get("layers"), state.get("amax", {}).get("layers", {})
        ends, histories = [], []
        for layer in range(c.layers):
            pick = lambda a: a[layer]  # noqa: B023, E731
            own = jax.tree.map(pick, p["layers"]["cell"])
            history = jax.tree.map(pick, amax.get("cell"))
            rngs = {}
            if key is not None and self.rounds:
                rngs = {"rounding": jax.random.fold_in(part_key(key, "layers"), layer)}
            (x_TBD, end), history = run_module(
                self._cell(self.at, layer), own, x_TBD, jax.tree.map(pick, carried), keep_TB,
                history=history, rngs=rngs,
            )  # fmt: skip
            x_TBD = self.shard(drop(x_TBD, str(layer)), ("length", "batch", None))
            ends.append(end)
            histories.append(history)
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        if carried is not None:
            # In the dtypes of the input state, so that a loop can carry it.
            fitted = [jax.tree.map(lambda a, b: a.astype(b.dtype), end, carried) for end in ends]
            state = state | {"layers": jax.tree.map(stack, *fitted)}
        if amax:
            threaded = {"cell": jax.tree.map(stack, *histories)}
            state = state | {"amax": state["amax"] | {"layers": threaded}}
        return x_TBD.swapaxes(0, 1), state or None

    def init_cache(self, batch: int, length: int = 0) -> ModelState:
        """Returns a zero state of all cells, in the widest dtype among theirs.

        Args:
          batch: rows B.
          length: not used; a decoder's cache grows with it.
        """
        del length
        c = self.config
        cells = [f"recurrent/layers/{i}/cell" for i in range(c.layers)]
        paths = [*cells, *(f"{cell}/state" for cell in cells)]
        dtype = functools.reduce(widest, (self.precision.policy(p).output_dtype for p in paths))
        names = ("hidden", "cell") if c.cell == "lstm" else ("hidden",)
        return {"layers": {name: jnp.zeros((c.layers, batch, c.width), dtype) for name in names}}


def recurrent(
    size: str | RecurrentConfig, precision: str | Precision = "fp32", **changes: FieldValue
) -> Recurrent:
    """Returns a recurrent language model that carries its Precision.

    Its cells have the paths `recurrent/layers/0/cell/{input,hidden,state}`: the products with W
    and U, and the gates with the cell's memory, which mixed presets keep in float32.

    Args:
      size: `tiny small zaremba-medium` or a RecurrentConfig.
      precision: anything that `get_precision` reads.
      changes: fields of RecurrentConfig.

    Raises:
      ConfigError: unknown size or field, a path that no rule covers, a rule that matches nothing.

    Example:
      >>> model = recurrent("tiny", "bf16", width=16, cell="gru")
      >>> params = model.init(jax.random.key(0))
      >>> logits, state = model.apply(
      ...     params, jnp.zeros((2, 4), jnp.int32), state=model.init_cache(2)
      ... )
      >>> logits.shape, state["layers"]["hidden"].dtype.name
      ((2, 4, 256), 'float32')

    References:
      Zaremba et al. 2014, Recurrent Neural Network Regularization.
    """
    return Recurrent(recurrent_config(size, **changes), get_precision(precision))
