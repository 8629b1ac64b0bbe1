"""LSTM and GRU cells: one product for all inputs, then a scan over time.

Shapes: T tokens, B batch, D width, G gates times D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.formats import widest
from mpjax.formats.delayed import AmaxHistory
from mpjax.models.core.layers import Linear
from mpjax.models.core.module import Layer, quantization, save_input
from mpjax.models.recurrent.config import CELLS
from mpjax.typing import Array, Key

State: TypeAlias = dict[str, Array]
# (h, observed amax, time) -> h U, observed amax; the amax is None without delayed scaling.
Product: TypeAlias = Callable[[Array, Array | None, Array], tuple[Array, Array | None]]


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
        # Gathered once, not at every time step. The cast is before the scan, which sums the
        # gradient over time in the dtype that the kernel has in it.
        kernel = self.context.shard(kernel, (None, None))
        kernel = kernel.astype(widest(kernel.dtype, self.gradient_dtype))
        policy, gradient_dtype = self.policy(), self.gradient_dtype
        recipe, key, amax = quantization(self)
        where = self.context.full(self.path)
        residuals = self.context.precision.residuals
        operand = None if recipe is None else recipe.fprop[0]

        def multiplied(
            h: Array, kernel: Array, key: Key | None, amax: AmaxHistory | None
        ) -> Array | tuple[Array, AmaxHistory]:
            return ops.linear(
                h, kernel, policy, gradient_dtype=gradient_dtype, recipe=recipe, key=key, amax=amax,
                where=where,
            )  # fmt: skip

        def product(h: Array, observed: Array | None, t: Array) -> tuple[Array, Array | None]:
            out = ops.from_saved(
                multiplied, (ops.save_for_backward(h, residuals, operand),), kernel,
                None if key is None else jax.random.fold_in(key, t),
                AmaxHistory(*amax[:2], observed) if amax and observed is not None else None,
            )  # fmt: skip
            return (out[0], out[1].observed_amax) if isinstance(out, tuple) else (out, None)

        return product, amax


class Cell(Layer):
    r"""One recurrent layer over a whole sequence.

    LSTM: $i, f, g, o = xW + b + hU$; $c' = \sigma(f + 1) c + \sigma(i) \tanh(g)$;
    $h' = \sigma(o) \tanh(c')$. GRU: $r, z, n = xW + b$ and $hU$ apart;
    $n' = \tanh(n_x + \sigma(r) n_h)$; $h' = (1 - \sigma(z)) n' + \sigma(z) h$.

    The products `input` and `hidden` have their own rules. Gates are computed in the compute dtype
    of `state`, and the carry (c; h of a GRU) has its output dtype: in bfloat16 a forget gate is at
    most 0.996 or 1, and a sum over many steps loses its small terms. The outputs, and h of an
    LSTM, have the output dtype of the cell itself.

    Args:
      kind: `lstm` or `gru`.

    References:
      Hochreiter and Schmidhuber 1997; Jozefowicz et al. 2015 (forget bias 1); Cho et al. 2014 (GRU,
      its reset gate after the product, as in cuDNN).
    """

    kind: str

    @nn.compact
    def __call__(
        self, x_TBD: Array, state: State | None, keep_TB: Array | None = None
    ) -> tuple[Array, State]:
        T, B, D = x_TBD.shape
        gates = CELLS[self.kind] * D
        told = Linear(self.context, gates, ("embed", "mlp"), bias=True, name="input")
        inputs_TBG = told(save_input(self, x_TBD, "input"))
        hidden = Hidden(self.context, gates, name="hidden")
        product, amax = hidden(D)
        policy, own = self.policy("state"), self.policy()
        update, memory = (_lstm, "cell") if self.kind == "lstm" else (_gru, "hidden")
        dtypes = {"hidden": own.output_dtype} | {memory: policy.output_dtype}
        first = {
            name: jnp.zeros((B, D), dtype) if state is None else state[name].astype(dtype)
            for name, dtype in dtypes.items()
        }
        first = {name: self.context.shard(x, ("batch", None)) for name, x in first.items()}

        def step(
            carry: tuple[State, Array | None], inputs: tuple[Array, Array, Array | None]
        ) -> tuple[tuple[State, Array | None], Array]:
            (state, observed_amax), (inputs_BG, t, keep_B) = carry, inputs
            with jax.named_scope("hidden"):
                turned_BG, observed_amax = product(state["hidden"], observed_amax, t)
            with jax.named_scope("state"):
                wide = (inputs_BG, turned_BG, state[memory])
                new = update(*(x.astype(policy.compute_dtype) for x in wide))
                new = {name: new[name].astype(dtype) for name, dtype in dtypes.items()}
                if keep_B is not None:  # padding leaves the state as it is
                    new = {n: jnp.where(keep_B[:, None], x, state[n]) for n, x in new.items()}
                state = new
            return (state, observed_amax), new["hidden"].astype(own.output_dtype)

        observed_amax = None if amax is None else amax.observed_amax
        inputs = (inputs_TBG, jnp.arange(T), keep_TB)
        (last, observed_amax), y_TBD = jax.lax.scan(step, (first, observed_amax), inputs)
        if amax is not None and observed_amax is not None:
            hidden.put_variable("amax", "kernel", amax._replace(observed_amax=observed_amax))
        return y_TBD, last


def _lstm(x_BG: Array, h_BG: Array, c_BD: Array) -> State:
    i, f, g, o = jnp.split(x_BG + h_BG, 4, axis=-1)
    c_BD = jax.nn.sigmoid(f + 1) * c_BD + jax.nn.sigmoid(i) * jnp.tanh(g)
    return {"hidden": jax.nn.sigmoid(o) * jnp.tanh(c_BD), "cell": c_BD}


def _gru(x_BG: Array, h_BG: Array, h_BD: Array) -> State:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (jnp.split(a, 3, axis=-1) for a in (x_BG, h_BG))
    n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
    z = jax.nn.sigmoid(z_x + z_h)
    return {"hidden": (1 - z) * n + z * h_BD}
