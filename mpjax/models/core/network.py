"""The base of all models: a Precision, the paths that take it, one parameter tree, a state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats import is_quantized, weight_view
from mpjax.formats.delayed import AmaxHistory
from mpjax.models.core.batch_fields import check_ids, check_padding, language_batch
from mpjax.models.core.checks import Ids, language_inputs, targets_of
from mpjax.models.core.layers import Linear, head_logits
from mpjax.models.core.metadata import NONE, Metadata
from mpjax.models.core.module import At, Context, part_key, parts_of, stored, unsharded
from mpjax.models.core.sizes import ModelConfig
from mpjax.models.core.spread import Spread, first, spread
from mpjax.precision import Precision, Recipe, dtype_name, get_precision
from mpjax.typing import Array, ArrayLike, Axes, Batch, Key, ModelState, Params, PyTree, Shard


class _Outline(NamedTuple):
    """What takes a policy (path -> kind), and the logical axes of each parameter."""

    sites: dict[str, str]
    axes: PyTree


_OUTLINES: dict[tuple[type, ModelConfig], _Outline] = {}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and its Precision; each kind says what its parts are.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
      metadata: of the checkpoint that it was loaded from.
    """

    config: ModelConfig
    precision: Precision
    shard: Shard = unsharded
    # It affects no program, so models that differ in it alone share their programs.
    metadata: Metadata = dataclasses.field(default=NONE, compare=False, repr=False)

    root: ClassVar[str]  # first part of every path; empty if paths begin differently
    stateless_product: ClassVar[str] = ""  # path of a product that cannot thread an amax history

    def init_with_axes(self, at: At, key: Key) -> Params:
        """Returns drawn parameters boxed with their logical axes; equal layers are stacked."""
        raise NotImplementedError

    @property
    def layer_counts(self) -> dict[str, int]:
        """Root -> how many layers are stacked below `ROOT/layers`."""
        return {self.root: getattr(self.config, "layers", 0)}

    @property
    def extra_sites(self) -> dict[str, str]:
        """Path -> kind of what takes a policy and draws no parameters, such as a tied head."""
        head = {self.stateless_product: "product"} if self.stateless_product else {}
        return head | {f"{self.root}/loss": "module"}

    def __post_init__(self) -> None:
        self.precision.check(self.paths, self._of("weight"), self._of("product"))
        for path in self._of("weight"):
            root, *rest = path.split("/")
            if rest[0] == "layers":
                first = "/".join([root, "layers", "0", *rest[2:]])
                own, other = (self.precision.policy(p).param_dtype for p in (path, first))
                if own != other:
                    raise ConfigError(
                        f"{path}: stored in {dtype_name(own)}, layer 0 in {dtype_name(other)};"
                        " layers are stacked in one array, so give all the same p=, and vary only"
                        " c= and o="
                    )
        recipe = self.recipes.get(self.stateless_product)
        if recipe is not None and recipe.history:
            raise ConfigError(
                f"{self.stateless_product}: recipe {recipe.name!r} keeps an amax history, which a"
                " loss taken in chunks cannot thread; take a recipe without history for it, such as"
                " fp8"
            )

    def at(self, *prefix: str) -> Context:
        """Returns the context of a part."""
        return Context(self.precision, self._prefix + prefix, self.shard)

    @property
    def _prefix(self) -> tuple[str, ...]:
        return (self.root,) if self.root else ()

    def sharded(self, shard: Shard) -> Self:
        """Returns the model with its activations constrained by `shard(x, logical_axes)`."""
        return dataclasses.replace(self, shard=shard)

    @property
    def _outline(self) -> _Outline:
        """The same for every Precision, so it is traced once for each configuration."""
        own = (type(self), self.config)
        if own not in _OUTLINES:
            _OUTLINES[own] = self._traced()
        return _OUTLINES[own]

    def _traced(self) -> _Outline:
        sites: dict[str, str] = {}
        covers_all = get_precision("fp32")

        def at(*prefix: str) -> Context:
            return Context(covers_all, self._prefix + prefix, sites=sites)

        boxed = jax.eval_shape(lambda: self.init_with_axes(at, jax.random.key(0)))
        sites |= self.extra_sites

        def names(path: tuple[jax.tree_util.DictKey, ...], box: nn.Partitioned) -> Axes:
            return ("layers",) * (path[1].key == "layers") + tuple(box.names)

        is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
        axes = jax.tree_util.tree_map_with_path(names, boxed, is_leaf=is_box)
        every: dict[str, str] = {}
        for path, kind in sites.items():
            root, *rest = path.split("/")
            stacked = rest[:2] == ["layers", "0"]
            for i in range(self.layer_counts[root] if stacked else 1):
                every["/".join([root, "layers", str(i), *rest[2:]]) if stacked else path] = kind
        return _Outline(every, axes)

    def _of(self, kind: str) -> list[str]:
        return [path for path, found in self._outline.sites.items() if found == kind]

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """All paths that take a policy, of modules, operations and parameters."""
        return tuple(self._outline.sites)

    @functools.cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Path of a product -> its recipe."""
        found = ((path, self.precision.recipe(path)) for path in self._of("product"))
        return {path: recipe for path, recipe in found if recipe is not None}

    @property
    def rounds(self) -> bool:
        """Whether a recipe draws random numbers."""
        return any(recipe.uses_key for recipe in self.recipes.values())

    def rngs(self, key: Key | None, dropping: bool) -> dict[str, Key]:
        """Returns the keys that a part draws from, of its dropout and its recipes."""
        if key is None:
            return {}
        rounding = {"rounding": part_key(key, "rounding")} if self.rounds else {}
        return ({"dropout": key} if dropping else {}) | rounding

    @property
    def axes(self) -> PyTree:
        """Logical axes of each parameter, a tree of tuples."""
        return self._outline.axes

    def init(self, key: Key) -> Params:
        """Returns new parameters; equal keys give equal float32 draws under every Precision."""
        return _draw(dataclasses.replace(self, shard=unsharded), key)

    def init_state(self) -> ModelState:
        """Returns what training threads through the model: amax histories of delayed scaling.

        None where no recipe keeps a history.
        """
        tree: PyTree = {}
        for path, recipe in self.recipes.items():
            if recipe.history:
                bare = [part for part in path.split("/") if not part.isdigit()]
                layers = (self.layer_counts[bare[0]],) if bare[1] == "layers" else ()
                at = tree
                for part in bare[len(self._prefix) :]:
                    at = at.setdefault(part, {})
                at["kernel"] = AmaxHistory.empty(recipe.history, layers)
        return {"amax": tree} if tree else None


@dataclasses.dataclass(frozen=True)
class NextToken(Network):
    """A model of the next token: its head, `stateless_product`, and the loss of its logits."""

    config: Any  # what a DecoderConfig and a RecurrentConfig have in common

    def heads(self, at: At) -> dict[str, tuple[nn.Module, tuple[Array, ...]]]:
        """Returns the head and an example of its input; {} if it is the transposed embedding."""
        c, axes, name = self.config, ("embed", "vocab"), self.stateless_product
        if c.tied:
            return {}
        head = Linear(at("head"), c.vocabulary, axes, c.head_bias, name=name)
        return {"head": (head, (jnp.zeros((1, 1, c.width)),))}

    def read_batch(self, batch: Batch) -> Batch:
        """Returns a batch under the names that `loss` reads, whether it is traced or not."""
        raise NotImplementedError

    def check_batch(self, batch: Batch) -> None:
        """Checks the token ids of a batch that the host has at hand.

        Raises:
          ConfigError: an id that is no token of the model, or a batch that `loss` does not take.
        """
        read = self.read_batch(batch)
        where, own = self.stateless_product.split("/")[0], self.config.vocabulary
        source = getattr(self.config, "source_vocabulary", 0) or own
        for name, vocabulary in (("source", source), ("inputs", own)):
            if name in read:
                check_ids(read[name], vocabulary, f"{where}: {name}")
        check_ids(read["targets"], own, f"{where}: targets", read.get("weights"))

    def target_weight(self, batch: Batch) -> Array | None:
        """Returns what the targets of a batch weigh together, None if all weigh alike."""
        return ops.weight_sum(self.read_batch(batch))

    def _context(self, name: str) -> Context:
        return Context(self.precision, (self.stateless_product.split("/")[0], name), self.shard)

    def _unembed(self, p: Params, x: Array, key: Key | None) -> Array:
        """Features (..., D) as logits in the output dtype of the head; p holds its weights."""
        name = "embed" if self.config.tied else "head"
        head, _ = self.heads(self._context).get("head", (None, ()))
        return head_logits(head, self._context("head"), weight_view({name: p[name]}), x, key)

    def _apart(
        self, p: Params, x: Array, parts: int, key: Key | None
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Features, and `_unembed` for a loop in which each device has weights of its own.

        Else each turn of the loop would bring the weights together, and sum their gradients over
        the devices.
        """
        name = "embed" if self.config.tied else "head"
        context = self._context("head")
        weights, form = jax.tree.flatten(p[name], is_leaf=is_quantized)
        named = self.axes[context.prefix[0]][name]
        axes = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple))
        # A recipe takes the largest number of the whole batch; stored weights have scales too.
        plain = all(isinstance(w, jax.Array) for w in weights)
        if context.recipe() is not None or not plain:
            return x, lambda x: self._unembed(p, x, key)
        compute = jnp.dtype(context.policy().compute_dtype)
        summed = jnp.dtype(self.precision.gradient_dtype)
        specs = tuple(Spread(parts, compute, summed, one, self.shard) for one in axes)
        x, copies = spread(x, tuple(weights), specs)

        def unembed(x: Array) -> Array:
            rows = x.reshape(parts, -1, *x.shape[1:])
            each = {name: jax.tree.unflatten(form, [one.read() for one in copies])}
            logits = jax.vmap(lambda p, x: self._unembed(p, x, key))(each, rows)
            return logits.reshape(*x.shape[:-1], -1)

        return x, unembed

    def _logits(self, p: Params, x: Array, key: Key | None) -> Array:
        """`_unembed`, with the soft cap."""
        cap, logits = self.config.logit_cap, self._unembed(p, x, key)
        return cap * jnp.tanh(logits / cap) if cap else logits

    def _loss(self, p: Params, x: Array, batch: Batch, key: Key | None, train: bool) -> Array:
        """The mean cross-entropy of `targets`, by `weights` if the batch has them."""
        c, context = self.config, self._context("loss")
        B, T, D = x.shape
        targets, weights = targets_of(batch, (B, T), context.prefix[0]), batch.get("weights")
        parts = parts_of(self.shard, "batch", B)
        chunk = ops.chunk_length(B // parts, T, c.vocabulary, c.loss_chunk, D)
        apart = parts > 1 and chunk < T
        if apart:
            x, unembed = self._apart(p, x, parts, key)
        else:
            unembed = lambda x: self._unembed(p, x, key)  # noqa: E731
        loss = ops.cross_entropy(
            x, targets, unembed, context.policy(), chunk=chunk,
            z_loss=c.z_loss if train else 0.0,  # a regulariser, not part of the evaluation
            logit_cap=c.logit_cap,
            weights_BT=None if weights is None else jnp.asarray(weights),
        )  # fmt: skip
        return first(loss) if apart else loss


@dataclasses.dataclass(frozen=True)
class LanguageModel(NextToken):
    """A model that continues a text: a decoder or a recurrent network."""

    def _head_params(self, params: Params) -> Params:
        return params[self.root]

    def read_batch(self, batch: Batch) -> Batch:
        """See `NextToken`."""
        return language_batch(batch, self.root)

    def check_batch(self, batch: Batch) -> None:
        """See `NextToken`."""
        super().check_batch(batch)
        check_padding(batch, self.root)

    def features(
        self, params: Params, ids_BT: Ids, *, keep: ArrayLike | None = None,
        offset: ArrayLike | None = None, segments: ArrayLike | None = None,
        state: ModelState = None, key: Key | None = None, train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the inputs of the head (B, T, D) and the new state, as `apply`."""
        raise NotImplementedError

    def apply(
        self, params: Params, ids_BT: Ids, *, keep: ArrayLike | None = None,
        offset: ArrayLike | None = None, segments: ArrayLike | None = None,
        state: ModelState = None, key: Key | None = None, train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the logits (B, T, V) and the new state.

        Args:
          params: from `init`.
          ids_BT: token ids.
          keep: (B, T) bool, False where there is padding, on either side; None is all True.
            Logits at padding are undefined.
          offset: (B, T, D), added to the token embeddings, in float32; None adds nothing.
          segments: (B, T) integers where a row holds several documents: 1, 2 ... of each, 0 at
            padding. Tokens see those of their own document, in which positions begin at 0.
          state: from `init_cache`, an earlier call or `init_state` (amax histories), or None.
          key: of dropout and of recipes that draw, needed only for training.
          train: whether dropout is on.
        """
        x, state = self.features(
            params, ids_BT, keep=keep, offset=offset, segments=segments, state=state, key=key,
            train=train,
        )  # fmt: skip
        return self._logits(self._head_params(params), x, key), state

    def loss(
        self, params: Params, batch: Batch, *, state: ModelState = None, key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the mean next-token cross-entropy and the state.

        Args:
          batch: `{"inputs": (B, T), "targets": (B, T)}` token ids; `keep` (B, T) bool where there
            is padding, which may be called `attention_mask`, `weights` (B, T) of the tokens in the
            mean, if they are not all alike, `offset` (B, T, D) of their embeddings, and
            `segments` (B, T) of packed documents (`mpjax.data.packed_batches`), in place of `keep`
            and beside `weights`. Or `input_ids`, `labels` and `attention_mask` as transformers has
            them: labels are not moved, and -100 among them is no target.
        """
        batch = self.read_batch(batch)
        ids, masks = language_inputs(batch, self.root)
        targets_of(batch, ids.shape, self.root)  # before the forward pass
        x, state = self.features(
            params, ids, **masks, offset=batch.get("offset"), state=state, key=key, train=train
        )
        return self._loss(self._head_params(params), x, batch, key, train), state


# One program when called outside of a trace, inlined in one. `shard` has no effect on the draws, so
# `init` leaves it out of the static argument.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _draw(model: Network, key: Key) -> Params:
    return stored(nn.unbox(model.init_with_axes(model.at, key)), model.precision)
