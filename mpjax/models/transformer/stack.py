"""The stack of blocks: segments of equal precision, each unrolled or scanned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.formats import weight_view
from mpjax.models.core.module import At, part_key
from mpjax.models.transformer.block import Attention, AttentionContext, Block
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.precision import Precision

_REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def equal_segments(
    precision: Precision, paths: Sequence[str], root: str, layers: int
) -> tuple[tuple[int, int], ...]:
    """Returns ranges of consecutive layers whose policies and recipes are equal: (start, stop)."""

    def policies(layer: int) -> list[Any]:
        found = [path for path in paths if path.startswith(f"{root}/layers/{layer}/")]
        return [(precision.policy(path), precision.recipe(path)) for path in found]

    every = [policies(layer) for layer in range(layers)]
    starts = [0] + [i for i in range(1, layers) if every[i] != every[i - 1]]
    return tuple(zip(starts, [*starts[1:], layers], strict=True))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Runs the blocks of a model, or of one half of it.

    Args:
      config: shape.
      at: path prefix of a part -> its context.
      segments: ranges of consecutive layers of equal precision, (start, stop).
      rounding: whether a recipe draws random numbers.
      name: first part of the blocks' paths.
      causal: whether tokens see none behind them.
      cross: whether they attend to a source.
    """

    config: BlockConfig
    at: At
    segments: tuple[tuple[int, int], ...]
    rounding: bool
    name: str = "decoder"
    causal: bool = True
    cross: bool = False

    def __call__(
        self,
        stacked: Any,
        x: Any,
        attention_context: AttentionContext,
        cache: Any,
        amax: Any,
        key: Any,
        dropping: bool,
    ) -> tuple[Any, Any, Any]:
        """Returns the features behind the last block, the new cache and the new amax histories.

        Args:
          stacked: weights of all blocks along a leading layer axis.
          x: features (B, T, D).
          sight: where the tokens stand and what they see.
          cache: keys and values along a leading layer axis, or None.
          amax: histories of delayed scaling, likewise, or an empty dict.
          key: of dropout and of recipes that draw, or None.
          dropping: whether dropout is on.
        """
        c = self.config
        unroll = c.loop == "unroll" or (c.loop == "auto" and jax.default_backend() == "cpu")
        outputs = []
        for start, stop in self.segments:
            context = self.at("layers", str(start))

            def run(x: Any, one: Any, name: str, context: Any = context) -> tuple[Any, Any]:
                params, cached, seen, layer = one
                block = Block(context, c, self.causal, self.cross, name=name)
                rngs = {}
                if key is not None:
                    own = jax.random.fold_in(key, layer)
                    rngs = {"dropout": own} if dropping else {}
                    if self.rounding:
                        rngs["rounding"] = part_key(own, "rounding")
                variables = {"params": weight_view(params)}
                if not seen:
                    out = block.apply(variables, x, attention_context, cached, dropping, rngs=rngs)
                    return out[0], (out[1], seen)
                out, updated = block.apply(
                    variables | {"amax": seen}, x, attention_context, cached, dropping, rngs=rngs,
                    mutable=["amax"],
                )  # fmt: skip
                return out[0], (out[1], updated["amax"])

            def named(name: str, run: Any = run) -> Any:
                one = functools.partial(run, name=name)
                if c.remat == "none":
                    return one
                return jax.checkpoint(one, policy=_REMAT[c.remat], prevent_cse=unroll)

            part = lambda a: a[start:stop] if (start, stop) != (0, c.layers) else a  # noqa: B023, E731
            xs = jax.tree.map(part, (stacked, cache, amax, jnp.arange(c.layers)))
            if unroll:
                outs = []
                for layer, one in enumerate(_unstack(xs, stop - start), start):
                    x, out = named(f"{self.name}/layers/{layer}")(x, one)
                    outs.append(out)
                out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
            else:
                x, out = jax.lax.scan(named(f"{self.name}/layers"), x, xs)
            outputs.append(out)
        cache, amax = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
        return x, cache, amax

    def known(self, stacked: Any, source_BSD: Any) -> tuple[Any, Any]:
        """Returns keys and values of the source in all blocks, (L, B, S, G, K).

        Delayed scaling takes the current tensors here, as it does wherever it has no history.
        """
        attention_context, outputs = AttentionContext(None, source_BSD=source_BSD), []
        for start, stop in self.segments:
            context = self.at("layers", str(start), "cross_attention")
            across = Attention(context, self.config, across=True)
            params = jax.tree.map(lambda a: a[start:stop], stacked["cross_attention"])  # noqa: B023
            one = lambda p: across.apply({"params": weight_view(p)}, None, attention_context)[1]  # noqa: B023, E731
            outputs.append(jax.lax.map(one, params))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _unstack(tree: Any, count: int) -> list[Any]:
    """Layers of a stacked tree; the gradient of a split is one concatenation, not L additions."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[p[0] for p in jax.lax.split(leaf, [1] * count, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]
