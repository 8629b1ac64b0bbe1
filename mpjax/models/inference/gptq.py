"""GPTQ: rounding of weights that minimises the error of their products on a calibration text.

Rounding to nearest minimises the error of each weight. GPTQ minimises that of the product $x W$:
where inputs are correlated, later rows of W compensate for the error of an earlier one.

Shapes: B batch, T tokens, L layers, D inputs, F outputs, N rows of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats import Quantized, round_to
from mpjax.formats.tiles import per_tile, sum_of
from mpjax.models.core.checks import check_listed, keep_of
from mpjax.models.core.storage import Storage
from mpjax.models.transformer.decoder import Decoder
from mpjax.models.transformer.encoder import Encoder
from mpjax.typing import Array, Batch, Params

DAMPING = 0.01  # of the mean of the diagonal, added to it: a moment of few tokens is singular
Moments: TypeAlias = dict[str, Array]  # path of a kernel -> moments of its inputs
_ROWS = 64  # rounded before the rows after them are updated
_SHARES = tuple(1 - 0.04 * i for i in range(12))  # scales / (largest number / largest value)


def _read(batch: Batch, vocabulary: int, decodes: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The token ids (B, T) of a batch, and which of them are no padding."""
    if not isinstance(batch, Mapping) or "inputs" not in batch:
        raise ConfigError(
            f"input_moments: a batch is a dict with inputs (B, T), not {type(batch).__name__}"
            f"{' of ' + ' '.join(map(str, batch)) if isinstance(batch, Mapping) else ''}; write"
            " [{'inputs': ids}]"
        )
    if batch.get("segments") is not None:
        raise ConfigError(
            "input_moments: a batch has segments; give windows of running text without them, or"
            " padded texts with keep"
        )
    try:
        ids_BT = np.asarray(batch["inputs"])
    except ValueError:
        ids_BT = np.empty(0, object)  # rows of several lengths
    if ids_BT.ndim != 2 or not ids_BT.size or ids_BT.dtype.kind not in "iu":
        raise ConfigError(
            f"input_moments: inputs are {ids_BT.dtype} {ids_BT.shape}; give token ids (B, T),"
            " integers, at least one"
        )
    if ids_BT.min() < 0 or ids_BT.max() >= vocabulary:
        raise ConfigError(
            f"input_moments: token ids from {ids_BT.min()} to {ids_BT.max()}, the model's"
            f" vocabulary is 0 to {vocabulary - 1}; encode with its own tokenizer"
        )
    return ids_BT.astype(np.int32), _kept(batch, ids_BT, decodes)


def _kept(batch: Batch, ids_BT: np.ndarray, decodes: bool) -> np.ndarray | None:
    """Which tokens of a batch are no padding, (B, T) bool; None if it does not say."""
    if (found := keep_of(batch, "input_moments")) is None:
        return None
    keep_BT = np.asarray(found) != 0
    if keep_BT.shape != ids_BT.shape or not keep_BT.any():
        raise ConfigError(
            f"input_moments: keep has shape {keep_BT.shape} and {int(keep_BT.sum())} tokens, inputs"
            f" {ids_BT.shape}; give one for each token, and some text"
        )
    if decodes and (keep_BT[:, 1:] > keep_BT[:, :-1]).any():
        raise ConfigError(
            "input_moments: padding stands before text, which would read it; pad a decoder's rows"
            " behind"
        )
    return keep_BT


def input_moments(model: Decoder | Encoder, params: Params, batches: Iterable[Batch]) -> Moments:
    r"""Returns the second moments of the inputs of each kernel, $E[x x^\top]$.

    Args:
      model: a decoder or an encoder.
      params: its weights as they were trained.
      batches: `{"inputs": (B, T)}` token ids of some text, but not of the text that judges; several
        times as many tokens as the widest kernel has inputs. Where texts are padded, `keep` or
        `attention_mask` (B, T) says so, and padding is neither read nor counted.

    Returns:
      Path of a kernel, such as `decoder/layers/mlp/up/kernel` -> (L, D, D), (D, D) outside the
      stack; float32.

    Raises:
      ConfigError: another kind of model, no batch or one that is not made of token ids, a mask that
        does not fit them, or inputs of a kernel that are not finite.

    Example:
      >>> from mpjax.models import decoder
      >>> model = decoder("tiny", layers=2, width=16, heads=2)
      >>> ids = jnp.arange(8, dtype=jnp.int32).reshape(1, 8)
      >>> moments = input_moments(model, model.init(jax.random.key(0)), [{"inputs": ids}])
      >>> moments["decoder/layers/mlp/up/kernel"].shape
      (2, 16, 16)
    """
    if getattr(model, "root", "") not in ("decoder", "encoder"):
        raise ConfigError(
            f"input_moments: {type(model).__name__} is no decoder and no encoder; quantise it"
            " without moments"
        )
    # Intermediate values cannot leave the trace of a scan or of a checkpoint.
    config: Any = dataclasses.replace(model.config, loop="unroll", remat="none")
    unrolled = dataclasses.replace(model, config=config)

    @functools.partial(jax.jit, donate_argnums=2)
    def add(params: Params, ids_BT: Array, total: Moments | None, keep_BT: Array | None) -> Moments:
        found: dict[str, list[Array]] = {}

        def listen(
            run: Callable[..., object], args: tuple[Array, ...], kwargs: dict[str, Array],
            context: nn.module.InterceptorContext,
        ) -> object:  # fmt: skip
            if context.method_name == "multiply":
                x = args[0].x if isinstance(args[0], ops.Saved) else args[0]
                if keep_BT is not None and x.shape[:2] == keep_BT.shape:  # not of whole texts
                    x = jnp.where(keep_BT[..., None], x, jnp.zeros((), x.dtype))
                x_D = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # sums of tokens
                second_DD = jnp.matmul(x_D.T, x_D, precision=lax.Precision.HIGHEST)
                path = context.module.context.full((*context.module.path, "kernel")).split("/")
                name = "/".join(part for part in path if not part.isdigit())
                found.setdefault(name, []).append(second_DD)
            return run(*args, **kwargs)

        with nn.intercept_methods(listen):
            padded = keep_BT is not None and not decodes  # nothing reads a decoder's padding
            inputs: Any = {"ids": ids_BT, "keep": keep_BT} if padded else ids_BT
            unrolled.apply(params, inputs, state=unrolled.init_state())
        one = {
            name: jnp.stack(layers) if "layers" in name.split("/") else layers[0]
            for name, layers in found.items()
        }
        return one if total is None else jax.tree.map(jnp.add, total, one)

    total: Moments | None = None
    tokens, decodes = 0, model.root == "decoder"
    check_listed(batches, "input_moments", "[{'inputs': ids}]")
    for batch in batches:
        ids_BT, keep_BT = _read(batch, config.vocabulary, decodes)
        total = add(params, ids_BT, total, keep_BT)
        tokens += ids_BT.size if keep_BT is None else int(keep_BT.sum())
    if total is None:
        raise ConfigError("input_moments: no batch; give some text")
    for name, moment in total.items():
        if not jnp.isfinite(moment).all():
            raise ConfigError(
                f"input_moments: what {name} is multiplied by is not finite; compute in a wider"
                " Precision, such as fp32, and check the weights"
            )
    return jax.tree.map(lambda moment: moment / tokens, total)


def _spread(q: Quantized) -> tuple[Array, Array]:
    """Scale and offset of each number."""
    zero = jnp.zeros(q.shape)
    offsets = zero if q.offsets is None else per_tile(zero, q.offsets, q.tile, jnp.add)
    return per_tile(zero, q.full_scales, q.tile, jnp.add), offsets


def _clipped(w_DF: Array, q: Quantized, weight_D: Array) -> Quantized:
    """The Quantized whose scales have the least weighted error; they may clip large numbers."""
    if q.scale_bits != 32:
        return q  # the scales are rounded, too
    shares = jnp.asarray(_SHARES, jnp.float32)
    centre = (q.format.max + q.format.min) / 2 if q.offsets is not None else 0.0

    def narrowed(share: Array) -> tuple[Array, Array | None]:
        offsets = None if q.offsets is None else q.offsets + (1 - share) * centre * q.scales
        return q.scales * share, offsets

    def error(share: Array) -> Array:
        scales, offsets = narrowed(share)
        scale_DF, start_DF = _spread(dataclasses.replace(q, scales=scales, offsets=offsets))
        back_DF = round_to((w_DF - start_DF) / scale_DF, q.format) * scale_DF + start_DF
        return sum_of(jnp.square(w_DF - back_DF) * weight_D[:, None], q.tile)

    best = jnp.argmin(lax.map(error, shares), axis=0)  # a loop: each needs a whole array
    scales, offsets = narrowed(shares[best])
    return dataclasses.replace(q, scales=scales, offsets=offsets)


def _inverse_factor(moment_DD: Array) -> Array:
    r"""U, upper triangular, with $U^\top U = H^{-1}$ for a damped moment H."""
    one_DD = jnp.eye(len(moment_DD))
    mean = jnp.trace(moment_DD) / len(moment_DD)
    damping = jnp.where(mean > 0, DAMPING * mean, 1.0)
    lower_DD = jnp.linalg.cholesky(moment_DD + damping * one_DD)
    inverse_DD = jax.scipy.linalg.cho_solve((lower_DD, True), one_DD)
    return jnp.linalg.cholesky((inverse_DD + inverse_DD.T) / 2).T


def store_weighed(w: Array, moment_DD: Array, storage: Storage) -> Quantized:
    r"""Returns a matrix as it is stored, rounded so that its products change least.

    $$w_j \leftarrow w_j - (w_i - q_i)\,U_{ij} / U_{ii},\quad j > i,\qquad
      U^\top U = (E[x x^\top] + \lambda)^{-1}$$

    Rows are rounded in decreasing order of $E[x_i^2]$; rows j after i compensate for its error. The
    scales are chosen before, to minimise $\sum_i E[x_i^2] (w_i - q_i)^2$ among those whose largest
    value is 0.56 to 1 of the largest number of a group; the rounded scales of mx and nv stay.
    $\lambda$ is 0.01 of the mean of $E[x_i^2]$. Zeros stay zeros, unless there are offsets. With
    one scale for a row, the largest number keeps the largest value, so that quantising again
    changes nothing.

    Args:
      w: (D, F), float32, bfloat16 or float16.
      moment_DD: of its inputs.
      storage: with scales.

    References:
      Frantar et al. 2023, GPTQ, algorithm 1; `act_order` and `static_groups` of their code.
    """
    w_DF = w.astype(jnp.float32)  # errors are added to it
    q = storage.store(w_DF, 0)
    assert isinstance(q, Quantized)
    q = _clipped(w_DF, q, jnp.diag(moment_DD))
    D, fixed_DF = len(w_DF), _fixed(w_DF, storage)
    order_D, rows = jnp.argsort(-jnp.diag(moment_DD)), jnp.arange(D + -D % _ROWS)
    U = _inverse_factor(moment_DD[order_D][:, order_D])
    # Padding of the last block: its rows have no error and are not updated.
    U = jnp.pad(U, ((0, -D % _ROWS),) * 2) + jnp.diag((rows >= D).astype(jnp.float32))
    w_DF, scale_DF, start_DF, fixed_DF = (
        jnp.pad(a[order_D], ((0, -D % _ROWS), (0, 0)), constant_values=pad)
        for a, pad in zip((w_DF, *_spread(q), fixed_DF), (0, 1, 0, jnp.nan), strict=True)
    )

    def block(w_DF: Array, first: Array) -> tuple[Array, Array]:
        part = lambda a: lax.dynamic_slice_in_dim(a, first, _ROWS)  # noqa: E731
        U_ND = part(U)
        U_NN = lax.dynamic_slice_in_dim(U_ND, first, _ROWS, axis=1)
        grid = (part(scale_DF), part(start_DF), part(fixed_DF))
        v_NF, lost_NF = _round_rows(part(w_DF), grid, U_NN, storage)
        U_ND = jnp.where(rows >= first + _ROWS, U_ND, 0)
        return w_DF - jnp.matmul(U_ND.T, lost_NF, precision=lax.Precision.HIGHEST), v_NF

    _, v = lax.scan(block, w_DF, jnp.arange(0, len(rows), _ROWS))
    # Where a moment has no such factor, the result is NaN.
    q = dataclasses.replace(q, scales=jnp.where(jnp.isfinite(U).all(), q.scales, jnp.nan))
    v_DF = jnp.zeros(w.shape).at[order_D].set(v.reshape(-1, w.shape[1])[:D])
    return dataclasses.replace(q, values=v_DF.astype(q.values.dtype), dtype=w.dtype)


def _has_ends(storage: Storage) -> bool:
    """Whether each output has one scale, which makes its largest number the largest value."""
    return storage.scaling is not None and storage.scaling.kind == "row" and not storage.offset


def _fixed(w_DF: Array, storage: Storage) -> Array:
    """Values that do not depend on the products; NaN elsewhere."""
    fixed_DF = jnp.full(w_DF.shape, jnp.nan)
    if not storage.offset:
        fixed_DF = jnp.where(w_DF == 0, 0, fixed_DF)
    if _has_ends(storage):
        place = jnp.argmax(jnp.abs(w_DF), axis=0), jnp.arange(w_DF.shape[1])
        fixed_DF = fixed_DF.at[place].set(jnp.sign(w_DF[place]) * storage.format.max)
    return fixed_DF


def _round_rows(
    w_NF: Array, grid: tuple[Array, Array, Array], U_NN: Array, storage: Storage
) -> tuple[Array, Array]:
    """Rounds row after row; returns the values, and the errors over the diagonal of U."""
    scale_NF, start_NF, fixed_NF = grid
    low = -storage.format.max if _has_ends(storage) else storage.format.min

    def row(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w_NF, v_NF, lost_NF = carry
        v_F = round_to((w_NF[i] - start_NF[i]) / scale_NF[i], storage.format)
        v_F = jnp.where(jnp.isnan(fixed_NF[i]), jnp.maximum(v_F, low), fixed_NF[i])
        lost_F = (w_NF[i] - (v_F * scale_NF[i] + start_NF[i])) / U_NN[i, i]
        u_N = jnp.where(jnp.arange(_ROWS) > i, U_NN[i], 0)
        return w_NF - u_N[:, None] * lost_F[None, :], v_NF.at[i].set(v_F), lost_NF.at[i].set(lost_F)

    zero = jnp.zeros_like(w_NF)
    _, v_NF, lost_NF = lax.fori_loop(0, _ROWS, row, (w_NF, zero, zero))
    return v_NF, lost_NF
