"""What replicas have for themselves that train apart."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpjax.optim import OptState
from mpjax.optim.update_rules import UpdateState
from mpjax.typing import Array, ModelState, Params, Tree


class LocalState(NamedTuple):
    """State of replicas that train apart; every leaf has a first axis of replicas.

    Args:
      params: weights of each, as stored.
      opt_state: of the optimizer of each.
      model_state: what the model of each threads through itself.
    """

    params: Params
    opt_state: OptState
    model_state: ModelState

    @classmethod
    def first(
        cls, params: Params, opt_state: OptState, model_state: ModelState, replicas: int
    ) -> LocalState:
        """Returns the state before the first step: the same in all replicas."""

        def each(x: Array) -> Array:
            return jnp.broadcast_to(x[None], (replicas, *x.shape))

        return jax.tree.map(each, cls(params, opt_state, model_state))

    def with_weights(self, params: Params, update_state: UpdateState) -> LocalState:
        """Returns the state with common weights in all replicas.

        Args:
          params: as stored.
          update_state: of the update rule of the common weights.
        """
        opt_state = self.opt_state._replace(
            update_state=_joined(update_state, self.opt_state.update_state)
        )
        return self._replace(params=_joined(params, self.params), opt_state=opt_state)


def _joined(common: Tree, local: Tree) -> Tree:
    """Replicas' leaves as the common ones are; counts and keys of draws stay each replica's."""

    def take(x: Array, each: Array) -> Array:
        draws = jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize >= 4
        return each if draws else jnp.broadcast_to(x[None], each.shape)

    joined: Tree = jax.tree.map(take, common, local)
    return joined
