"""The stack of blocks: segments of equal precision, each unrolled or scanned."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.models.block import Block
from mpjax.models.config import DecoderConfig
from mpjax.models.skeleton import At, part_key

_REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Runs the blocks of a decoder.

    Args:
      config: shape.
      at: path prefix of a part -> its context.
      segments: ranges of consecutive layers of equal precision, (start, stop).
      rounding: whether a recipe draws random numbers.
    """

    config: DecoderConfig
    at: At
    segments: tuple[tuple[int, int], ...]
    rounding: bool

    def __call__(
        self, stacked: Any, x: Any, positions_T: Any, state: Any, key: Any, dropping: bool
    ) -> tuple[Any, Any]:
        """Returns the features behind the last block and the new state.

        Args:
          stacked: weights of all blocks along a leading layer axis.
          x: features (B, T, D).
          positions_T: positions of the tokens.
          state: `layers` (key/value cache), `position` and `amax`, each if there is one, or None.
          key: of dropout and of recipes that draw, or None.
          dropping: whether dropout is on.
        """
        c, state = self.config, state or {}
        amax = state.get("amax", {}).get("layers", {})
        unroll = c.loop == "unroll" or (c.loop == "auto" and jax.default_backend() == "cpu")
        outputs = []
        for start, stop in self.segments:
            context = self.at("layers", str(start))

            def run(x: Any, one: Any, name: str, context: Any = context) -> tuple[Any, Any]:
                params, cached, seen, layer = one
                block = Block(context, c, name=name)
                rngs = {}
                if key is not None:
                    own = jax.random.fold_in(key, layer)
                    rngs = {"dropout": own} if dropping else {}
                    if self.rounding:
                        rngs["rounding"] = part_key(own, "rounding")
                variables = {"params": params}
                if not seen:
                    out = block.apply(variables, x, positions_T, cached, dropping, rngs=rngs)
                    return out[0], (out[1], seen)
                out, updated = block.apply(
                    variables | {"amax": seen}, x, positions_T, cached, dropping, rngs=rngs,
                    mutable=["amax"],
                )  # fmt: skip
                return out[0], (out[1], updated["amax"])

            def named(name: str, run: Any = run) -> Any:
                one = functools.partial(run, name=name)
                if c.remat == "none":
                    return one
                return jax.checkpoint(one, policy=_REMAT[c.remat], prevent_cse=unroll)

            part = lambda a: a[start:stop] if (start, stop) != (0, c.layers) else a  # noqa: B023, E731
            xs = jax.tree.map(part, (stacked, state.get("layers"), amax, jnp.arange(c.layers)))
            if unroll:
                outs = []
                for layer, one in enumerate(_unstack(xs, stop - start), start):
                    x, out = named(f"decoder/layers/{layer}")(x, one)
                    outs.append(out)
                out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
            else:
                x, out = jax.lax.scan(named("decoder/layers"), x, xs)
            outputs.append(out)
        cache, amax = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
        new = dict(state)
        if "layers" in state:
            new |= {"layers": cache, "position": state["position"] + x.shape[1]}
        if amax:
            new["amax"] = state["amax"] | {"layers": amax}
        return x, new or None


def _unstack(tree: Any, count: int) -> list[Any]:
    """Layers of a stacked tree; the gradient of a split is one concatenation, not L additions."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[p[0] for p in jax.lax.split(leaf, [1] * count, axis=0)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]
