"""Grouped-query attention with the softmax in its own policy.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H/G, K head width,
N = R times the queries of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jmp
from jaxtyping import Array, Bool, Float, Int

from mpjax.errors import ConfigError
from mpjax.formats import widest
from mpjax.ops.products.dot import dot
from mpjax.ops.softmax import softmax as softmaxed
from mpjax.ops.target import on_one_cpu, target_platform
from mpjax.precision import dtype_name, sum_dtype
from mpjax.typing import DType

KERNELS = ("auto", "xla", "cudnn")
BLOCKS = 4  # blocks of queries, each with the keys up to its end: 5/8 of the work of one block
# Products of two arrays with batch axes B and G: of the last axes, N(ot) or T(ransposed).
_NN, _NT, _TN = ((((a,), (b,)), ((0, 1), (0, 1))) for a, b in ((3, 2), (3, 3), (2, 2)))
SHORTEST = 32  # queries in a block: for shorter blocks the calls cost more than they save


def _scores(q_BGNK: Array, k_BGSK: Array, wide: DType) -> Array:
    """Products of queries and keys, emitted in a dtype that may be wider than theirs."""
    return dot(q_BGNK, k_BGSK, _NT, wide)


def _scores_fwd(q: Array, k: Array, wide: DType) -> tuple[Array, tuple[Array, Array]]:
    return _scores(q, k, wide), (q, k)


def _scores_bwd(wide: DType, residuals: tuple[Array, Array], d_BGNS: Array) -> tuple[Array, Array]:
    del wide  # the cotangent has this dtype; without a cast both products would run in it
    q_BGNK, k_BGSK = residuals
    d_BGNS = d_BGNS.astype(q_BGNK.dtype)
    dq = dot(d_BGNS, k_BGSK, _NN, q_BGNK.dtype)
    return dq, dot(d_BGNS, q_BGNK, _TN, k_BGSK.dtype)


_score = jax.custom_vjp(_scores, nondiff_argnums=(2,))
_score.defvjp(_scores_fwd, _scores_bwd)


def _means(probs_BGNS: Array, v_BGSK: Array) -> Array:
    """Means of values; on a CPU their gradients are products of the same kind, not of float32."""
    return dot(probs_BGNS, v_BGSK, _NN, v_BGSK.dtype)


def _means_bwd(residuals: tuple[Array, Array], d_BGNK: Array) -> tuple[Array, Array]:
    probs_BGNS, v_BGSK = residuals
    d_probs = dot(d_BGNK, v_BGSK, _NT, probs_BGNS.dtype)
    return d_probs, dot(probs_BGNS, d_BGNK, _TN, v_BGSK.dtype)


_mean_on_cpu = jax.custom_vjp(_means)
_mean_on_cpu.defvjp(lambda probs, v: (_means(probs, v), (probs, v)), _means_bwd)


def _mask(
    start: int, stop: int, end: int, first: Array | int, causal: bool, window: int
) -> Array | None:
    """Which keys (0 .. end - 1) the queries start .. stop - 1 see, (T, S); None if all."""
    if not causal and not window:
        return None
    query_T1, key_1S = jnp.arange(start, stop)[:, None] + first, jnp.arange(end)[None, :]
    mask_TS = query_T1 >= key_1S if causal else jnp.ones((stop - start, end), bool)
    if window:
        mask_TS = mask_TS & (query_T1 - key_1S < window)
        if not causal:
            mask_TS = mask_TS & (key_1S - query_T1 < window)
    return mask_TS


def attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G K"],
    policy: jmp.Policy,
    softmax: jmp.Policy,
    *,
    first: Int[Array, ""] | int = 0,
    causal: bool = True,
    window: int = 0,
    keep_BS: Bool[Array, "B S"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    kernel: str = "xla",
) -> Float[Array, "B T H K"]:
    r"""Attends, $\mathrm{softmax}(q k^\top / \sqrt K)\,v$, each query to the keys that it sees.

    Args:
      q_BTHK: queries at positions first .. first + T - 1.
      k_BSGK: keys at positions 0 .. S - 1.
      v_BSGK: values.
      policy: both products take their operands in its compute dtype; the result has its output
        dtype.
      softmax: scores leave their product in its compute dtype (or the products' if that is
        wider), in which the softmax runs; probabilities have its output dtype. With float16
        the scores and the sum over keys are float32, which no number of terms overflows.
      first: position of the first query.
      causal: whether a query sees no key behind its own position.
      window: a query sees keys less than `window` positions away; 0 is all.
      keep_BS: which keys are there at all (no padding); None is all. A query that sees none gives
        some finite average.
      segments_BT: number of the document that a token is of, where keys and queries are the same
        tokens; a query sees only the keys of its own. None is one document a row.
      kernel: `xla`; `cudnn`, the fused kernel of GPUs (16-bit operands, float32 softmax, first
        = 0, no window, padding or segments, K a multiple of 8 up to 128); or `auto`, cudnn on a
        GPU where it serves, else xla.

    Raises:
      ConfigError: `cudnn` where it does not serve, or segments that are not of the keys.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> f32 = parse_policy("f32")
      >>> x = jnp.ones((1, 2, 2, 4))
      >>> attention(x, x[:, :, :1], x[:, :, :1], f32, f32).shape
      (1, 2, 2, 4)

    References:
      Vaswani et al. 2017; Ainslie et al. 2023, GQA; Beltagy et al. 2020, Longformer (window).
    """
    if kernel not in KERNELS:
        raise ConfigError(f"attention: unknown kernel {kernel!r}; known: {' '.join(KERNELS)}")
    compute = policy.compute_dtype
    q, k, v = (x.astype(compute) for x in (q_BTHK, k_BSGK, v_BSGK))
    from_start = isinstance(first, int) and first == 0
    fits = compute != jnp.float32 and softmax.compute_dtype == jnp.float32 and from_start
    K = q.shape[-1]
    masked = keep_BS is not None or segments_BT is not None or window > 0
    fits = fits and K % 8 == 0 and K <= 128 and not masked and target_platform() == "gpu"
    if kernel == "cudnn" and not fits:
        raise ConfigError(
            "attention: kernel 'cudnn' needs a GPU, bfloat16 or float16 operands, a float32"
            " softmax, heads of 8, 16 .. 128, no cache, padding or window; here:"
            f" {target_platform()},"
            f" {dtype_name(compute)} operands, {dtype_name(softmax.compute_dtype)} softmax, heads"
            f" of {K}, {'no ' * from_start}cache, {'no ' * (not masked)}padding or window; use"
            " kernel 'xla' or 'auto'"
        )
    if kernel in ("cudnn", "auto") and fits:
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        return out.astype(policy.output_dtype)
    B, T, H, _ = q.shape
    S, G = k.shape[1], k.shape[2]
    if segments_BT is not None and (segments_BT.shape != (B, T) or T != S or not from_start):
        raise ConfigError(
            f"attention: segments have shape {segments_BT.shape}, queries {(B, T)}, keys {(B, S)};"
            " give one for each token, and no cache"
        )
    R = H // G
    # Query heads that share keys are rows of one product, whose batch axes are B and G.
    q_BGRTK = (q * K**-0.5).reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4)
    k_BGSK, v_BGSK = (x.transpose(0, 2, 1, 3) for x in (k, v))
    softmax_dtype = sum_dtype(softmax.compute_dtype)
    wide = widest(compute, softmax_dtype)
    cut = causal and from_start and T == S and T % BLOCKS == 0 and T // BLOCKS >= SHORTEST
    blocks = BLOCKS if cut else 1
    mean = _mean_on_cpu if on_one_cpu() else _means
    outs = []
    for start in range(0, T, T // blocks):
        stop = start + T // blocks
        end = stop if blocks > 1 else S
        q_BGNK = q_BGRTK[:, :, :, start:stop].reshape(B, G, R * (stop - start), K)
        scores = _score(q_BGNK, k_BGSK[:, :, :end], wide).astype(softmax_dtype)
        mask_TS = _mask(start, stop, end, first, causal, window)
        lowest = jnp.finfo(scores.dtype).min  # finite: a row of -inf would be NaN
        if mask_TS is not None:
            mask_NS = jnp.broadcast_to(mask_TS[None], (R, *mask_TS.shape)).reshape(-1, end)
            scores = jnp.where(mask_NS[None, None], scores, lowest)
        if keep_BS is not None:
            scores = jnp.where(keep_BS[:, None, None, :end], scores, lowest)
        if segments_BT is not None:
            same_BTS = segments_BT[:, start:stop, None] == segments_BT[:, None, :end]
            same_BRTS = jnp.broadcast_to(same_BTS[:, None], (B, R, stop - start, end))
            scores = jnp.where(same_BRTS.reshape(B, 1, -1, end), scores, lowest)
        probs = softmaxed(scores, softmax.compute_dtype)
        probs = probs.astype(softmax.output_dtype).astype(compute)
        out_BGNK = mean(probs, v_BGSK[:, :, :end])
        outs.append(out_BGNK.reshape(B, G, R, stop - start, K))
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, H, K).astype(policy.output_dtype)
