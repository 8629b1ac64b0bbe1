"""Cross-entropy over a large vocabulary, in chunks that never hold all logits.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jmp
from jaxtyping import Array, Float, Int, Shaped

from mpjax.errors import ConfigError
from mpjax.formats import widest
from mpjax.ops.softmax import log_sum_exp
from mpjax.precision import sum_dtype
from mpjax.typing import Shape

WHOLE = 2**24  # logits: 64 MiB of float32; above it the automatic chunk is smaller than T


def chunk_length(
    batch: int, tokens: int, vocabulary: int, chunk: int = 0, width: int = 0
) -> int:  # fmt: skip
    """Returns how many of T tokens are taken at a time: all, or the largest divisor that fits.

    Every chunk reads and writes the head's gradient, D * V numbers of float32, so that logits may
    be half as many before they are what takes the memory.

    Args:
      batch: rows B.
      tokens: T, tokens of a row.
      vocabulary: size V.
      chunk: tokens a chunk; 0 takes the largest divisor of T with
        B * chunk * V <= max(2^24, D * V / 2).
      width: D of the features, 0 where there is no head.

    Raises:
      ConfigError: the chunk does not divide T.

    Example:
      >>> chunk_length(8, 256, 4096), chunk_length(8, 1024, 50257)
      (256, 32)
      >>> chunk_length(4, 2048, 32000), chunk_length(4, 2048, 32000, width=4096)
      (128, 512)
    """
    if chunk:
        if tokens % chunk:
            raise ConfigError(
                f"loss_chunk: {chunk} does not divide the sequence length {tokens}; choose a"
                " divisor, or 0 for automatic"
            )
        return chunk
    divisors = (n for n in range(tokens, 0, -1) if tokens % n == 0)
    most = max(WHOLE, width * vocabulary // 2)
    return next((n for n in divisors if batch * n * vocabulary <= most), 1)


def check_targets(targets: Array, shape: Shape, where: str) -> None:
    """Checks the targets of a loss.

    Args:
      targets: classes.
      shape: that they must have.
      where: what takes them.

    Raises:
      ConfigError: they have another shape, are no integers, or are none.
    """
    if targets.shape != shape or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ConfigError(
            f"{where}: targets are {targets.dtype.name} of shape {targets.shape}; give integers of"
            f" shape {shape}"
        )
    if not targets.size:
        raise ConfigError(f"{where}: no targets, shape {shape}; leave an empty batch out")


def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    unembed: Callable[[Array], Array],
    policy: jmp.Policy,
    *,
    chunk: int,
    z_loss: float = 0.0,
    logit_cap: float = 0.0,
    weights_BT: Shaped[Array, "..."] | None = None,
) -> Float[Array, ""]:
    r"""Mean over tokens of $\log \sum_v e^{l_v} - l_y + z (\log \sum_v e^{l_v})^2$.

    Each chunk's logits are recomputed in the backward pass, so that at most one chunk's logits
    are alive; a single chunk is kept instead of recomputed.

    Args:
      x_BTD: features.
      targets_BT: token ids $y$; one outside of 0 .. V - 1 gives NaN unless its weight is 0.
      unembed: features to logits, (B, chunk, D) -> (B, chunk, V).
      policy: logits are cast to its compute dtype; the mean over tokens is in its output dtype.
        Sums of float16 are float32: those over V and over tokens overflow it.
      chunk: tokens a chunk, a divisor of T.
      z_loss: $z$.
      logit_cap: $c > 0$ replaces $l$ by $c \tanh(l / c)$; 0 does not.
      weights_BT: of the tokens in the mean, numbers or bool; None is all alike. All zero give 0.

    Returns:
      The mean, a scalar of the output dtype.

    Raises:
      ConfigError: targets that are no integers or none, weights of another shape than they.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> x = jnp.zeros((1, 2, 4))
      >>> loss = cross_entropy(x, jnp.zeros((1, 2), int), lambda x: x, parse_policy("f32"), chunk=1)
      >>> round(float(jnp.exp(loss)), 4)
      4.0

    References:
      Chowdhery et al. 2022, PaLM, section 5 (z-loss); Gemma Team 2024 (soft-cap).
    """

    summed = sum_dtype(policy.output_dtype)

    def total(x: Array, targets: Array, weights: Array | None) -> Array:
        logits = unembed(x).astype(policy.compute_dtype)
        if logit_cap:
            logits = logit_cap * jnp.tanh(logits / logit_cap)
        log_z = log_sum_exp(logits)
        # A masked sum, not a gather: its gradient is elementwise and works on a sharded V.
        hit = targets[..., None] == jnp.arange(logits.shape[-1])[None, None]
        picked = jnp.sum(jnp.where(hit, logits, 0), axis=-1).astype(log_z.dtype)
        # NaN makes a target outside of 0 .. V - 1 visible; unnoticed, it would train no class.
        known = (targets >= 0) & (targets < logits.shape[-1])
        known = known if weights is None else known | (weights == 0)
        loss = (log_z - picked) * jnp.where(known, jnp.ones_like(log_z), jnp.nan)
        if z_loss:
            loss = loss + z_loss * jnp.square(log_z)
        loss = loss.astype(summed)
        # Not the product alone: a loss of weight 0 may be infinite.
        return jnp.sum(loss if weights is None else jnp.where(weights != 0, loss * weights, 0))

    B, T, _ = x_BTD.shape
    check_targets(targets_BT, (B, T), "cross_entropy")
    count: Array | int = B * T
    if weights_BT is not None:
        if weights_BT.shape != (B, T):
            raise ConfigError(
                f"weights: shape {weights_BT.shape} is not {(B, T)}, that of the targets"
            )
        weights_BT = weights_BT.astype(summed)  # the dtype of the mean over tokens
        weight = jnp.sum(weights_BT)
        count = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    if chunk == T:
        return (total(x_BTD, targets_BT, weights_BT) / count).astype(policy.output_dtype)

    def cut(a: Array) -> Array:  # (B, T, ...) -> (T / chunk, B, chunk, ...)
        return a.reshape(B, T // chunk, chunk, *a.shape[2:]).swapaxes(0, 1)

    parts = jax.tree.map(cut, (x_BTD, targets_BT, weights_BT))
    wide = widest(summed, jnp.float32)  # a bfloat16 sum of equal chunks stops growing at 256

    # A loop is no place where a compiler could merge the two passes; the barrier against that would
    # hold all that the body is given, read or not.
    again = jax.checkpoint(total, prevent_cse=False)

    def body(total_loss: Array, part: tuple[Array, Array, Array | None]) -> tuple[Array, None]:
        return total_loss + again(*part).astype(wide), None

    whole = jax.lax.scan(body, jnp.zeros((), wide), parts)[0].astype(summed)
    return (whole / count).astype(policy.output_dtype)
