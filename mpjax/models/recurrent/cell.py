"""LSTM and GRU cells: one product for all inputs, then a scan over time.

Shapes: T tokens, B batch, D width, G gates times D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.formats.delayed import AmaxHistory
from mpjax.models.core.layers import Linear
from mpjax.models.core.module import Layer
from mpjax.models.recurrent.config import CELLS
from mpjax.precision import wider

State = dict[str, Any]
Product = Callable[[Any, Any, Any], tuple[Any, Any]]  # (h, amax seen, time) -> h U, amax seen


class Hidden(Layer):
    """h U as a function that a scan can call; the weight is normal with variance 1 / D.

    Args:
      features: outputs G.
    """

    features: int

    @nn.compact
    def __call__(self, width: int) -> tuple[Product, AmaxHistory | None]:
        init = nn.initializers.normal(width**-0.5)
        kernel = self.weight("kernel", init, (width, self.features), ("embed", "mlp"))
        # Gathered once, not at every time step; and its gradient is summed over time as wide as
        # over tokens: the scan would else add T terms in the dtype that the weight is stored in.
        kernel = self.context.shard(kernel, (None, None))
        kernel = kernel.astype(wider(kernel.dtype, self.gradient_dtype))
        policy, gradient_dtype = self.policy(), self.gradient_dtype
        recipe = self.context.recipe(self.path)
        where = "/".join((*self.context.prefix, *self.path))
        if recipe is None or self.is_initializing():
            return (
                lambda h, observed_amax, t: (
                    ops.linear(h, kernel, policy, gradient_dtype=gradient_dtype),
                    observed_amax,
                ),
                None,
            )
        key = self.make_rng("rounding") if self.has_rng("rounding") else None
        amax = None
        if recipe.history and self.has_variable("amax", "kernel"):
            amax = AmaxHistory(*self.get_variable("amax", "kernel"))

        def product(h: Any, observed_amax: Any, t: Any) -> tuple[Any, Any]:
            own = None if key is None else jax.random.fold_in(key, t)
            told = None if amax is None else amax._replace(observed_amax=observed_amax)
            out = ops.linear(h, kernel, policy, recipe=recipe, key=own, amax=told, where=where)
            return (out, observed_amax) if told is None else (out[0], out[1].observed_amax)

        return product, amax


class Cell(Layer):
    r"""One recurrent layer over a whole sequence.

    LSTM: $i, f, g, o = xW + b + hU$; $c' = \sigma(f + 1) c + \sigma(i) \tanh(g)$;
    $h' = \sigma(o) \tanh(c')$. GRU: $r, z, n = xW + b$ and $hU$ apart;
    $n' = \tanh(n_x + \sigma(r) n_h)$; $h' = (1 - \sigma(z)) n' + \sigma(z) h$.

    The products `input` and `hidden` have their own rules. Gates are computed in the compute dtype
    of `state`, and what is handed from step to step (c; h of a GRU) has its output dtype: in
    bfloat16 a forget gate is at most 0.996 or 1, and a sum over many steps loses its small terms.
    What goes upwards, and into the next step of an LSTM, has the output dtype of the cell itself.

    Args:
      kind: `lstm` or `gru`.

    References:
      Hochreiter and Schmidhuber 1997; Jozefowicz et al. 2015 (forget bias 1); Cho et al. 2014 (GRU,
      its reset behind the product as in cuDNN).
    """

    kind: str

    @nn.compact
    def __call__(self, x_TBD: Any, state: State | None, keep_TB: Any = None) -> tuple[Any, State]:
        T, B, D = x_TBD.shape
        gates = CELLS[self.kind] * D
        inputs_TBG = Linear(self.context, gates, ("embed", "mlp"), bias=True, name="input")(x_TBD)
        hidden = Hidden(self.context, gates, name="hidden")
        product, amax = hidden(D)
        policy, own = self.policy("state"), self.policy()
        update: Callable[..., State] = _lstm if self.kind == "lstm" else _gru
        dtypes = {"hidden": own.output_dtype, "cell": policy.output_dtype}
        if self.kind == "gru":
            dtypes = {"hidden": policy.output_dtype}
        first = {
            name: jnp.zeros((B, D), dtype) if state is None else state[name].astype(dtype)
            for name, dtype in dtypes.items()
        }
        first = {name: self.context.shard(x, ("batch", None)) for name, x in first.items()}

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            state, observed_amax = carry
            inputs_BG, t, keep_B = inputs
            with jax.named_scope("hidden"):
                turned_BG, observed_amax = product(state["hidden"], observed_amax, t)
            with jax.named_scope("state"):
                memory_BD = state["cell" if self.kind == "lstm" else "hidden"]
                wide = (x.astype(policy.compute_dtype) for x in (inputs_BG, turned_BG, memory_BD))
                new = update(*wide)
                new = {name: new[name].astype(dtype) for name, dtype in dtypes.items()}
                if keep_B is not None:  # padding is not remembered
                    new = {n: jnp.where(keep_B[:, None], x, state[n]) for n, x in new.items()}
                state = new
            return (state, observed_amax), new["hidden"].astype(own.output_dtype)

        observed_amax: Any = None if amax is None else amax.observed_amax
        inputs = (inputs_TBG, jnp.arange(T), keep_TB)
        (last, observed_amax), y_TBD = jax.lax.scan(step, (first, observed_amax), inputs)
        if amax is not None:
            hidden.put_variable("amax", "kernel", amax._replace(observed_amax=observed_amax))
        return y_TBD, last


def _lstm(x_BG: Any, h_BG: Any, c_BD: Any) -> State:
    i, f, g, o = jnp.split(x_BG + h_BG, 4, axis=-1)
    c_BD = jax.nn.sigmoid(f + 1) * c_BD + jax.nn.sigmoid(i) * jnp.tanh(g)
    return {"hidden": jax.nn.sigmoid(o) * jnp.tanh(c_BD), "cell": c_BD}


def _gru(x_BG: Any, h_BG: Any, h_BD: Any) -> State:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (jnp.split(a, 3, axis=-1) for a in (x_BG, h_BG))
    n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
    z = jax.nn.sigmoid(z_x + z_h)
    return {"hidden": (1 - z) * n + z * h_BD}
