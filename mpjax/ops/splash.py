"""The splash kernel of TPUs: scores stay in the memory of the core, and masked blocks are left out.

Shapes: as `mpjax.ops.attention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpjax.errors import ConfigError

_LANES = 128  # blocks are a multiple of it
_BLOCK = 512  # at most: larger blocks of four operands do not fit into the memory of a core


def block_length(length: int) -> int:
    """Returns the length of a block of queries or keys; 0 if none divides the sequence.

    Example:
      >>> block_length(2048), block_length(384), block_length(100)
      (512, 384, 0)
    """
    return max((n for n in range(_LANES, _BLOCK + 1, _LANES) if length % n == 0), default=0)


def splash_attention(
    q_BHTK: Float[Array, "B H T K"],
    k_BGTK: Float[Array, "B G T K"],
    v_BGTK: Float[Array, "B G T K"],
    ids_BT: tuple[Int[Array, "B T"], ...],
    *,
    causal: bool,
    window: int,
    interpret: bool = False,
) -> Float[Array, "B H T K"]:
    """Attends by JAX's own kernel, whose scores, softmax and sums are float32.

    Args:
      q_BHTK: queries, scaled.
      k_BGTK: keys of the same tokens.
      v_BGTK: values.
      ids_BT: of queries and of keys, of which a query sees those of its own id; empty sees all.
      causal: whether a query sees no key behind its own position.
      window: a query sees keys less than `window` positions away; 0 is all.
      interpret: whether it runs on any platform, slowly.

    Raises:
      ConfigError: a length that no block divides.

    Example:
      >>> x = jnp.ones((1, 2, 128, 8), jnp.bfloat16)
      >>> y = splash_attention(x, x[:, :1], x[:, :1], (), causal=True, window=0, interpret=True)
      >>> y.shape, y.dtype.name
      ((1, 2, 128, 8), 'bfloat16')
    """
    # Here: 0.4 s that other platforms need not wait for.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    H, T = q_BHTK.shape[1:3]
    block = block_length(T)
    if not block:
        raise ConfigError(f"attention: splash needs a multiple of {_LANES} tokens; here: {T}")
    if window:
        visible: masks.Mask = masks.LocalMask((T, T), (window - 1, 0 if causal else window - 1), 0)
    else:
        visible = masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
        block_kv_dq=block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([visible] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    if not ids_BT:
        return jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK)
    ids = kernels.SegmentIds(*(one.astype(jnp.int32) for one in ids_BT))
    return jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK, ids)
