"""Grouped-query attention with the softmax in its own policy.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H/G, K head width,
N = R times the queries of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import jmp
from jaxtyping import Array, Bool, Float, Int

from mpjax.errors import ConfigError
from mpjax.formats import widest
from mpjax.ops.products.dot import dot
from mpjax.ops.softmax import softmax as softmaxed
from mpjax.ops.splash import block_length, splash_attention
from mpjax.ops.target import on_one_cpu, target_devices, target_platform
from mpjax.precision import dtype_name, sum_dtype
from mpjax.typing import DType

KERNELS = ("auto", "xla", "cudnn", "splash")
# Runs a function of queries, keys, values (B, heads, T, K) and ids (B, T) on each device's part of
# the batch and of the heads, `split(function, q, k, v, *ids) -> (B, H, T, K)`.
Split: TypeAlias = Callable[..., Array]
_PADDING = -(2**31)  # the document of keys that are padding
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


def kernel_for(
    kernel: str,
    operands: DType,
    softmax: DType,
    *,
    queries: int,
    keys: int,
    width: int,
    from_start: bool,
    masked: bool,
    divided: bool,
) -> str:
    """Returns what `attention` runs on for the platform that is traced for.

    Args:
      kernel: one of `KERNELS`.
      operands: dtype of both products' operands.
      softmax: dtype in which the softmax runs.
      queries: of a sequence.
      keys: of a sequence.
      width: of a head.
      from_start: whether the first query is at position 0.
      masked: whether there is a window, padding or segments.
      divided: whether each device can run a kernel on its part.

    Raises:
      ConfigError: an unknown kernel, or one that does not serve here.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"attention: unknown kernel {kernel!r}; known: {' '.join(KERNELS)}")
    on = target_platform()
    serve = {
        "cudnn": on == "gpu" and operands != jnp.float32 and not masked
        and width % 8 == 0 and width <= 128,
        "splash": on == "tpu" and operands == jnp.bfloat16 and queries == keys
        and block_length(keys) > 0 and divided,
    }  # fmt: skip
    fits = [name for name, good in serve.items() if good and from_start and softmax == jnp.float32]
    if kernel == "auto":
        return fits[0] if fits else "xla"
    if kernel == "xla" or kernel in fits:
        return kernel
    said = (
        f"{on}, {dtype_name(operands)} operands, {dtype_name(softmax)} softmax, heads of {width},"
        f" {queries} queries, {keys} keys, {'no ' * from_start}cache,"
        f" {'no ' * (not masked)}padding, window or segments, "
        f"{'' if divided else 'not '}divided by the mesh"
    )
    needs = {
        "cudnn": "a GPU, bfloat16 or float16 operands, a float32 softmax, heads of 8, 16 .. 128,"
        " no cache, padding, window or segments",
        "splash": "a TPU, bfloat16 operands, a float32 softmax, as many queries as keys, a"
        " multiple of 128, no cache, and heads of both that the mesh cuts alike",
    }
    raise ConfigError(
        f"attention: kernel {kernel!r} needs {needs[kernel]}; here: {said}; use kernel 'xla' or"
        " 'auto'"
    )


def _by_splash(
    q: Array, k: Array, v: Array, keep: Array | None, segments: Array | None, split: Split,
    causal: bool, window: int,
) -> Array:  # fmt: skip
    """The splash kernel, on queries (B, T, H, K) and so on; padding is an id of its own."""
    ids: tuple[Array, ...] = ()
    if segments is not None or keep is not None:
        ids_of = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments
        ids = (ids_of, ids_of if keep is None else jnp.where(keep, ids_of, _PADDING))

    def run(q: Array, k: Array, v: Array, *ids: Array) -> Array:
        return splash_attention(q, k, v, ids, causal=causal, window=window)

    heads_first = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    return split(run, *heads_first, *ids).transpose(0, 2, 1, 3)


def whole(function: Callable[..., Array], *arrays: Array) -> Array:
    """Runs a function on all of its arrays: the `Split` of one device."""
    return function(*arrays)


def can_split(split: Split | None) -> bool:
    """Returns whether each device of the program can run a kernel on its part."""
    return split is not None and (split is not whole or target_devices() == 1)


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
    split: Split | None = whole,
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
        = 0, no window, padding or segments, K a multiple of 8 up to 128); `splash`, that of TPUs
        (bfloat16 operands, float32 softmax and probabilities, first = 0, keys of the same tokens,
        a multiple of 128 of them); or `auto`, the one of them that serves, else xla.
      split: runs a kernel on each device's part of the batch and of the heads; `whole` on one
        device; None where devices cannot.

    Raises:
      ConfigError: a kernel where it does not serve, or segments that are not of the keys.

    Example:
      >>> from mpjax.precision import parse_policy
      >>> f32 = parse_policy("f32")
      >>> x = jnp.ones((1, 2, 2, 4))
      >>> attention(x, x[:, :, :1], x[:, :, :1], f32, f32).shape
      (1, 2, 2, 4)

    References:
      Vaswani et al. 2017; Ainslie et al. 2023, GQA; Beltagy et al. 2020, Longformer (window).
    """
    compute = policy.compute_dtype
    q, k, v = (x.astype(compute) for x in (q_BTHK, k_BSGK, v_BSGK))
    from_start = isinstance(first, int) and first == 0
    kernel = kernel_for(
        kernel, jnp.dtype(compute), jnp.dtype(softmax.compute_dtype),
        queries=q.shape[1], keys=k.shape[1], width=q.shape[-1], from_start=from_start,
        masked=keep_BS is not None or segments_BT is not None or window > 0,
        divided=can_split(split),
    )  # fmt: skip
    B, T, H, _ = q.shape
    S, G = k.shape[1], k.shape[2]
    if segments_BT is not None and (segments_BT.shape != (B, T) or T != S or not from_start):
        raise ConfigError(
            f"attention: segments have shape {segments_BT.shape}, queries {(B, T)}, keys {(B, S)};"
            " give one for each token, and no cache"
        )
    if kernel == "cudnn":
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        return out.astype(policy.output_dtype)
    if kernel == "splash":
        assert split is not None
        out = _by_splash(q, k, v, keep_BS, segments_BT, split, causal, window)
        return out.astype(policy.output_dtype)
    K, R = q.shape[-1], H // G
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
