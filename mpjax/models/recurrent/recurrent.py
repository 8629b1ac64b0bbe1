"""A recurrent language model: embedding, LSTM or GRU cells, head and loss.

The weights of all cells are stacked along a leading layer axis, as a decoder's blocks are. Shapes:
B batch, T tokens, D width, L layers, V vocabulary.
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
from mpjax.models.core.checks import as_ids, below, language_inputs, targets_of
from mpjax.models.core.layers import Embed, Linear, head_logits
from mpjax.models.core.module import At, init_layers, part_key
from mpjax.models.core.network import Network
from mpjax.models.recurrent.cell import Cell
from mpjax.models.recurrent.config import RecurrentConfig, recurrent_config
from mpjax.precision import Precision, get_precision, wider
from mpjax.precision.policy import CARRIED


@dataclasses.dataclass(frozen=True)
class Recurrent(Network):
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

    @property
    def layer_counts(self) -> dict[str, int]:
        """See `Network`: cells above each other."""
        return {"recurrent": self.config.layers}

    @property
    def extra_sites(self) -> dict[str, str]:
        """See `Network`; a tied head draws no parameters."""
        return {"recurrent/head": "product", "recurrent/loss": "module"}

    def _embed(self, at: At) -> Embed:
        c, axes, name = self.config, ("vocab", "embed"), "recurrent/embed"
        # No norm stands before a cell: after 300 steps from 0.02 it is 0.5 nats behind (measured).
        return Embed(at("embed"), c.vocabulary, c.width, axes, deviation=0.2, name=name)

    def _head(self, at: At) -> Linear:
        axes = ("embed", "vocab")
        return Linear(at("head"), self.config.vocabulary, axes, name="recurrent/head")

    def _cell(self, at: At, layer: int) -> Cell:
        context = at("layers", str(layer), "cell")
        return Cell(context, self.config.cell, name=f"recurrent/layers/{layer}/cell")

    def init_with_axes(self, at: At, key: Any) -> Any:
        """See `Network`."""
        c, x_TBD = self.config, jnp.zeros((1, 1, self.config.width))
        embed = self._embed(at).init(part_key(key, "embed"), jnp.zeros((1, 1), jnp.int32))
        draw = lambda key: self._cell(at, 0).init(key, x_TBD, None)["params"]  # noqa: E731
        tree = {"embed": embed["params"], "layers": {"cell": init_layers(draw, key, c.layers)}}
        if not c.tied:
            tree["head"] = self._head(at).init(part_key(key, "head"), x_TBD)["params"]
        return {"recurrent": tree}

    @jax.named_scope(CARRIED)
    def features(
        self, params: Any, ids_BT: Any, *, keep: Any = None, state: Any = None, key: Any = None,
        train: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Returns the last cell's outputs (B, T, D) and the new state, as `apply`."""
        keep_TB = None if keep is None else jnp.asarray(keep).astype(bool).T
        c, p, state = self.config, below(weight_view(params), "recurrent"), state or {}
        ids_BT = as_ids(ids_BT, "recurrent")
        dropping = train and c.dropout > 0
        if dropping and key is None:
            raise ConfigError("model: dropout needs a key; pass key= or train=False")

        def drop(x: Any, name: str) -> Any:
            if not dropping:
                return x
            rngs = {"dropout": part_key(key, name)}
            return nn.Dropout(c.dropout, deterministic=False).apply({}, x, rngs=rngs)

        # Time first: the scan then takes its inputs as they lie.
        x_TBD: Any = self._embed(self.at).apply({"params": p["embed"]}, ids_BT.T)
        x_TBD = self.shard(drop(x_TBD, "embed"), ("length", "batch", None))
        carried, amax = state.get("layers"), state.get("amax", {}).get("layers", {})
        ends, histories = [], []
        for layer in range(c.layers):
            pick = lambda a: a[layer]  # noqa: B023, E731
            variables = {"params": jax.tree.map(pick, p["layers"]["cell"])}
            if amax:
                variables["amax"] = jax.tree.map(pick, amax["cell"])
            rngs = {}
            if key is not None and self.rounds:
                rngs = {"rounding": jax.random.fold_in(part_key(key, "layers"), layer)}
            (x_TBD, end), updated = self._cell(self.at, layer).apply(
                variables, x_TBD, jax.tree.map(pick, carried), keep_TB, rngs=rngs, mutable=["amax"]
            )
            x_TBD = self.shard(drop(x_TBD, str(layer)), ("length", "batch", None))
            ends.append(end)
            histories.append(updated.get("amax", {}))
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        if carried is not None:
            # as wide as what came in, so that a loop can carry it
            fitted = [jax.tree.map(lambda a, b: a.astype(b.dtype), end, carried) for end in ends]
            state = state | {"layers": jax.tree.map(stack, *fitted)}
        if amax:
            threaded = {"cell": jax.tree.map(stack, *histories)}
            state = state | {"amax": state["amax"] | {"layers": threaded}}
        return x_TBD.swapaxes(0, 1), state or None

    def _unembed(self, params: Any, x: Any, key: Any = None) -> Any:
        """Features to logits in the head's output dtype."""
        head = None if self.config.tied else self._head(self.at)
        return head_logits(head, self.at("head"), weight_view(params)["recurrent"], x, key)

    def apply(
        self, params: Any, ids_BT: Any, *, keep: Any = None, state: Any = None, key: Any = None,
        train: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Returns the logits (B, T, V) and the new state.

        Args:
          params: from `init`.
          ids_BT: token ids.
          keep: (B, T) bool, False where there is padding, on either side, which cells pass over;
            None is all True. Logits at padding mean nothing.
          state: what the cells remember, from `init_cache` or an earlier call; amax histories from
            `init_state`; None begins at zero and remembers nothing.
          key: of dropout and of recipes that draw, needed only for training.
          train: whether dropout is on.
        """
        x, state = self.features(params, ids_BT, keep=keep, state=state, key=key, train=train)
        return self._unembed(params, x, key), state

    def loss(
        self, params: Any, batch: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> tuple[Any, Any]:
        """Returns the mean next-token cross-entropy and the state.

        Args:
          batch: `{"inputs": (B, T), "targets": (B, T)}` token ids; `keep` (B, T) bool where there
            is padding, which may be called `attention_mask`, and `weights` (B, T) of the tokens in
            the mean, if they are not all alike.
        """
        c = self.config
        ids, keep = language_inputs(batch, "recurrent")
        targets = targets_of(batch, ids.shape, "recurrent")
        x, state = self.features(params, ids, keep=keep, state=state, key=key, train=train)
        B, T = targets.shape
        loss = ops.cross_entropy(
            x, targets, functools.partial(self._unembed, params, key=key),
            self.precision.policy("recurrent/loss"),
            chunk=ops.chunk_length(B, T, c.vocabulary, c.loss_chunk),
            weights_BT=batch.get("weights"),
        )  # fmt: skip
        return loss, state

    def init_cache(self, batch: int, length: int = 0) -> Any:
        """Returns cells that remember nothing, as wide as the widest cell's state.

        Args:
          batch: B.
          length: of what will be read; a recurrent memory does not grow with it.
        """
        del length  # a decoder's cache needs it, and what generates text passes it to both
        c = self.config
        cells = [f"recurrent/layers/{i}/cell" for i in range(c.layers)]
        paths = [*cells, *(f"{cell}/state" for cell in cells)]
        dtype = functools.reduce(wider, (self.precision.policy(p).output_dtype for p in paths))
        names = ("hidden", "cell") if c.cell == "lstm" else ("hidden",)
        return {"layers": {name: jnp.zeros((c.layers, batch, c.width), dtype) for name in names}}


def recurrent(
    size: str | RecurrentConfig, precision: str | Precision = "fp32", **changes: Any
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
