"""What PyTorch's documentation says each of JAX's functions runs in under autocast.

Transcribed from the Autocast Op Reference (CUDA lists) by PyTorch's name for the function, without
looking at `mpjax.interpret.core.op_lists`: that is what makes it an oracle for them. A function
that the reference does not list follows its inputs. `DEVIATES` holds the rows where JAX's jaxpr, in
which PyTorch's operation is several equations, forces something else, with the reason.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax, nn
from jax.scipy import special

LOW = "low"  # operands and result in bfloat16 or float16
FULL = "float32"  # operands and result in float32
WIDEST = "widest"  # operands and result in the widest dtype of the operands
FIRST = "first"  # operands and result in the dtype of the first operand
FOLLOWS = "follows"  # not listed: its inputs', which promote to the widest by themselves


class Row(NamedTuple):
    """A function of JAX and what the reference says of it.

    Args:
      name: how a user spells it.
      fn: it.
      torch: PyTorch's name for it.
      kind: where the reference lists that name.
      takes: its arguments, one letter each: see `OPERANDS`.
    """

    name: str
    fn: Callable[..., Any]
    torch: str
    kind: str
    takes: str


# u: (0, 1); s: signed; b: above 1; v: a signed vector; c: three columns; t: a batch of matrices;
# p: a positive matrix; i: indices; m: a mask; w n d: 1-, 2- and 3-d images; k l o: their kernels;
# h: heads
OPERANDS = {
    **{"u": (4, 4), "s": (4, 4), "b": (4, 4), "v": (4,), "c": (4, 3), "t": (2, 4, 4)},
    **{
        "p": (4, 4),
        "i": (4, 4),
        "m": (4, 4),
        "w": (1, 2, 6),
        "n": (1, 2, 6, 6),
        "d": (1, 2, 4, 4, 4),
    },
    **{"k": (3, 2, 3), "l": (3, 2, 3, 3), "o": (3, 2, 2, 2, 2), "h": (1, 4, 2, 4)},
}


def _same(module: Any, prefix: str, kind: str, takes: str, names: str) -> Iterator[Row]:
    """Rows of functions of one signature: `name`, or `name:torch` where the two differ."""
    for spelled in names.split():
        name, _, torch = spelled.partition(":")
        yield Row(f"{prefix}.{name}", getattr(module, name), torch or name, kind, takes)


def _row(kind: str, takes: str, torch: str, name: str, fn: Callable[..., Any]) -> Row:
    return Row(name, fn, torch, kind, takes)


def _layer_norm(x: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)


def _cosine(x: Any, y: Any) -> Any:
    product = jnp.sum(x * y, -1)
    return product / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))


def _nll(x: Any, i: Any) -> Any:
    return -jnp.mean(jnp.take_along_axis(x, i, -1))


_conv = functools.partial(lax.conv_general_dilated, padding="SAME")
_TRANSPOSED = {"strides": (2, 2), "padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")}

_LOW = [
    *_same(jnp, "jnp", LOW, "ss", "matmul"),
    *_same(jnp, "jnp", LOW, "sv", "matvec:mv"),
    *_same(lax, "lax", LOW, "ss", "dot:mm"),
    *_same(lax, "lax", LOW, "tt", "batch_matmul:bmm"),
    *_same(jnp, "jnp", LOW, "vv", "convolve:conv1d correlate:conv1d"),
    *_same(nn, "nn", LOW, "hhh", "dot_product_attention:scaled_dot_product_attention"),
    _row(LOW, "ss", "__matmul__", "x @ y", operator.matmul),
    _row(LOW, "ts", "matmul", "jnp.matmul, broadcast", jnp.matmul),
    _row(LOW, "ss", "mm", "jnp.einsum('ij,jk->ik')", lambda x, y: jnp.einsum("ij,jk->ik", x, y)),
    _row(LOW, "tt", "bmm", "jnp.einsum('bij,bkj->bik')",
         lambda x, y: jnp.einsum("bij,bkj->bik", x, y)),
    _row(LOW, "sss", "multi_dot", "jnp.linalg.multi_dot", lambda *x: jnp.linalg.multi_dot(x)),
    _row(LOW, "ss", "matmul", "jnp.linalg.matmul", jnp.linalg.matmul),
    _row(LOW, "wk", "conv1d", "lax.conv_general_dilated, 1-d",
         lambda x, w: _conv(x, w, (1,), dimension_numbers=("NCH", "OIH", "NCH"))),
    _row(LOW, "nl", "conv2d", "lax.conv", lambda x, w: lax.conv(x, w, (1, 1), "SAME")),
    _row(LOW, "do", "conv3d", "lax.conv_general_dilated, 3-d", lambda x, w: _conv(x, w, (1, 1, 1))),
    _row(LOW, "nl", "conv_transpose2d", "lax.conv_transpose",
         lambda x, w: lax.conv_transpose(x, w, **_TRANSPOSED)),
    _row(LOW, "ssv", "linear", "x @ w + b", lambda x, w, b: x @ w + b[None]),
    _row(LOW, "sss", "addmm", "x @ y + c", lambda x, y, c: x @ y + c),
    _row(LOW, "su", "prelu", "jnp.where(x > 0, x, a * x)", lambda x, a: jnp.where(x > 0, x, a * x)),
]  # fmt: skip

_FULL = [
    *_same(jnp, "jnp", FULL, "u", "exp expm1 log log10 log1p log2 sinh cosh tan reciprocal"),
    *_same(jnp, "jnp", FULL, "u", "arccos:acos arcsin:asin sum prod cumsum cumprod"),
    *_same(lax, "lax", FULL, "u", "exp log log1p tan rsqrt reciprocal erf_inv:erfinv"),
    *_same(special, "special", FULL, "u", "erfinv"),
    *_same(jnp, "jnp", FULL, "uu", "power:pow float_power:pow"),
    *_same(lax, "lax", FULL, "uu", "pow"),
    *_same(jnp.linalg, "jnp.linalg", FULL, "s", "norm"),
    *_same(nn, "nn", FULL, "s", "softmax log_softmax softplus standardize:layer_norm"),
    _row(FULL, "t", "sum", "jnp.sum, one axis", lambda x: jnp.sum(x, 1)),
    _row(FULL, "v", "norm", "jnp.linalg.norm, ord=1", lambda x: jnp.linalg.norm(x, 1)),
    _row(FULL, "u", "cumsum", "lax.cumsum, reverse", lambda x: lax.cumsum(x, reverse=True)),
    _row(FULL, "u", "__rdiv__", "1 / x", lambda x: 1 / x),
    _row(FULL, "uu", "__pow__", "x ** y", operator.pow),
    _row(FULL, "u", "__pow__", "x ** 0.5", lambda x: x**0.5),
    _row(FULL, "u", "__pow__", "x ** -1", lambda x: x**-1),
    _row(FULL, "u", "__pow__", "x ** 2", lambda x: x**2),
    _row(FULL, "u", "__pow__", "x ** 3", lambda x: x**3),
    _row(FULL, "u", "__rpow__", "2 ** x", lambda x: 2**x),
    _row(FULL, "s", "softmin", "nn.softmax(-x)", lambda x: nn.softmax(-x)),
    _row(FULL, "s", "layer_norm", "layer norm by hand", _layer_norm),
    _row(FULL, "s", "group_norm", "group norm by hand",
         lambda x: _layer_norm(x.reshape(4, 2, 2)).reshape(4, 4)),
    _row(FULL, "s", "normalize", "x / norm(x)",
         lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)),
    _row(FULL, "ss", "cosine_similarity", "cosine similarity by hand", _cosine),
    _row(FULL, "ss", "dist", "norm(x - y)", lambda x, y: jnp.linalg.norm(x - y)),
    _row(FULL, "ss", "cdist", "norm(x[:, None] - y[None])",
         lambda x, y: jnp.linalg.norm(x[:, None] - y[None], axis=-1)),
    _row(FULL, "ss", "mse_loss", "mean((x - y) ** 2)", lambda x, y: jnp.mean((x - y) ** 2)),
    _row(FULL, "ss", "l1_loss", "mean(abs(x - y))", lambda x, y: jnp.mean(jnp.abs(x - y))),
    _row(FULL, "us", "kl_div", "sum(p * (log(p) - q))", lambda p, q: jnp.sum(p * (jnp.log(p) - q))),
    _row(FULL, "si", "nll_loss", "-mean(take_along_axis)", _nll),
    _row(FULL, "si", "cross_entropy", "-mean(take_along_axis(log_softmax))",
         lambda x, i: _nll(nn.log_softmax(x), i)),
    _row(FULL, "su", "binary_cross_entropy_with_logits", "mean(softplus(x) - x * y)",
         lambda x, y: jnp.mean(nn.softplus(x) - x * y)),
    _row(FULL, "s", "poisson_nll_loss", "mean(exp(x) - x)", lambda x: jnp.mean(jnp.exp(x) - x)),
]  # fmt: skip

_WIDEST = [
    *_same(jnp, "jnp", WIDEST, "ss", "arctan2:atan2 tensordot"),
    *_same(lax, "lax", WIDEST, "ss", "atan2"),
    *_same(jnp, "jnp", WIDEST, "cc", "cross"),
    *_same(jnp, "jnp", WIDEST, "vv", "dot vdot:dot inner:dot"),
    _row(WIDEST, "sss", "addcmul", "x + y * z", lambda x, y, z: x + y * z),
    _row(WIDEST, "ssb", "addcdiv", "x + y / z", lambda x, y, z: x + y / z),
    _row(WIDEST, "ss", "index_put", "x.at[i].set(y)",
         lambda x, y: x.at[jnp.array([2, 0])].set(y[:2])),
    _row(WIDEST, "ss", "scatter_add", "x.at[i].add(y)",
         lambda x, y: x.at[jnp.array([2, 2])].add(y[:2])),
    _row(WIDEST, "ss", "index_put", "x.at[1:3].set(y)", lambda x, y: x.at[1:3].set(y[:2])),
]  # fmt: skip

_UNARY = [
    *_same(jnp, "jnp", FOLLOWS, "u", "sin cos tanh sqrt abs negative sign floor ceil trunc square"),
    *_same(jnp, "jnp", FOLLOWS, "u", "arctan:atan arcsinh:asinh arctanh:atanh rint:round exp2"),
    *_same(jnp, "jnp", FOLLOWS, "s", "deg2rad rad2deg sinc nan_to_num positive fabs:abs i0"),
    *_same(jnp, "jnp", FOLLOWS, "b", "arccosh:acosh"),
    *_same(lax, "lax", FOLLOWS, "u", "sqrt tanh sin cos erf erfc logistic:sigmoid lgamma digamma"),
    *_same(special, "special", FOLLOWS, "u", "erf erfc gammaln:lgamma digamma expit:sigmoid logit"),
    *_same(special, "special", FOLLOWS, "u", "i0 i0e i1 i1e ndtr log_ndtr ndtri entr"),
    *_same(nn, "nn", FOLLOWS, "s", "relu relu6 gelu silu swish:silu mish elu celu selu leaky_relu"),
    *_same(nn, "nn", FOLLOWS, "s", "hard_sigmoid:hardsigmoid hard_silu:hardswish glu sigmoid"),
    *_same(nn, "nn", FOLLOWS, "s", "hard_tanh:hardtanh log_sigmoid:logsigmoid soft_sign:softsign"),
    _row(FOLLOWS, "s", "gelu", "nn.gelu, exact", functools.partial(nn.gelu, approximate=False)),
]
_BINARY = [
    *_same(jnp, "jnp", FOLLOWS, "ss", "add subtract:sub multiply:mul maximum minimum fmax fmin"),
    *_same(jnp, "jnp", FOLLOWS, "ub", "divide:div true_divide:div hypot remainder fmod"),
    *_same(jnp, "jnp", FOLLOWS, "ss", "copysign heaviside logaddexp logaddexp2"),
    *_same(jnp, "jnp", FOLLOWS, "ub", "floor_divide"),
    *_same(jnp, "jnp", FOLLOWS, "mss", "where"),
    *_same(lax, "lax", FOLLOWS, "ss", "add sub mul max:maximum min:minimum"),
    *_same(special, "special", FOLLOWS, "uu", "xlogy xlog1py"),
    _row(FOLLOWS, "uss", "lerp", "x + u * (y - x)", lambda u, x, y: x + u * (y - x)),
    _row(FOLLOWS, "vv", "outer", "jnp.outer", jnp.outer),
    _row(FOLLOWS, "ss", "kron", "jnp.kron", jnp.kron),
]
_MOVES = [
    *_same(jnp, "jnp", FOLLOWS, "s", "transpose:t ravel flip fliplr flipud squeeze tril triu"),
    *_same(jnp, "jnp", FOLLOWS, "s", "diagonal rot90 real atleast_3d"),
    *_same(jnp, "jnp", FOLLOWS, "v", "diag"),
    _row(FOLLOWS, "ss", "cat", "jnp.concatenate", lambda *x: jnp.concatenate(x)),
    _row(FOLLOWS, "ss", "stack", "jnp.stack", lambda *x: jnp.stack(x)),
    _row(FOLLOWS, "ss", "vstack", "jnp.vstack", lambda *x: jnp.vstack(x)),
    _row(FOLLOWS, "s", "reshape", "jnp.reshape", lambda x: jnp.reshape(x, (2, 8))),
    _row(FOLLOWS, "t", "swapaxes", "jnp.swapaxes", lambda x: jnp.swapaxes(x, 0, 2)),
    _row(FOLLOWS, "s", "unsqueeze", "jnp.expand_dims", lambda x: jnp.expand_dims(x, 1)),
    _row(FOLLOWS, "v", "broadcast_to", "jnp.broadcast_to", lambda x: jnp.broadcast_to(x, (2, 4))),
    _row(FOLLOWS, "s", "roll", "jnp.roll", lambda x: jnp.roll(x, 1, 0)),
    _row(FOLLOWS, "s", "tile", "jnp.tile", lambda x: jnp.tile(x, (1, 2))),
    _row(FOLLOWS, "s", "repeat_interleave", "jnp.repeat", lambda x: jnp.repeat(x, 2, 0)),
    _row(FOLLOWS, "s", "pad", "jnp.pad", lambda x: jnp.pad(x, 1)),
    _row(FOLLOWS, "s", "tensor_split", "jnp.split", lambda x: jnp.split(x, 2)[1]),
    _row(FOLLOWS, "s", "index_select", "jnp.take", lambda x: jnp.take(x, jnp.array([1, 1]), 0)),
    _row(FOLLOWS, "si", "gather", "jnp.take_along_axis",
         lambda x, i: jnp.take_along_axis(x, i, -1)),
    _row(FOLLOWS, "s", "narrow", "lax.dynamic_slice",
         lambda x: lax.dynamic_slice(x, (1, 0), (2, 2))),
    _row(FOLLOWS, "s", "clamp", "jnp.clip", lambda x: jnp.clip(x, -0.5, 0.5)),
    _row(FOLLOWS, "s", "embedding", "x[i]", lambda x: x[jnp.array([3, 1])]),
]  # fmt: skip
_REDUCES = [
    *_same(jnp, "jnp", FOLLOWS, "s", "max:amax min:amin sort median nanmax:amax mean var std"),
    *_same(jnp, "jnp", FOLLOWS, "s", "trace nansum nanmean ptp:aminmax diff average:mean"),
    *_same(lax, "lax", FOLLOWS, "s", "cummax cummin cumlogsumexp:logcumsumexp"),
    *_same(nn, "nn", FOLLOWS, "s", "logsumexp"),
    *_same(special, "special", FOLLOWS, "s", "logsumexp"),
    _row(FOLLOWS, "s", "quantile", "jnp.quantile", lambda x: jnp.quantile(x, 0.3)),
    _row(FOLLOWS, "s", "topk", "lax.top_k", lambda x: lax.top_k(x, 2)[0]),
    _row(FOLLOWS, "n", "max_pool2d", "lax.reduce_window, max",
         lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")),
    _row(FOLLOWS, "n", "avg_pool2d", "lax.reduce_window, add",
         lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4),
    *_same(jnp.linalg, "jnp.linalg", FOLLOWS, "p", "cholesky:linalg_cholesky inv:linalg_inv"),
]  # fmt: skip

ROWS = [*_LOW, *_FULL, *_WIDEST, *_UNARY, *_BINARY, *_MOVES, *_REDUCES]


def _attention(q: Any, k: Any, v: Any, low: Any) -> Any:
    q, k, v = q.astype(low), k.astype(low), v.astype(low)
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    weights = nn.softmax(logits.astype(jnp.float32)).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def _linear(x: Any, w: Any, b: Any, low: Any) -> Any:
    return x.astype(low) @ w.astype(low) + b


class Deviation(NamedTuple):
    """What autocast does instead.

    Args:
      kind: as in a row.
      why: the reason.
      by_hand: the function with hand-written casts, of operands as they come and the low dtype;
        None where casting the operands is all.
      same_bits: whether there is a hand-written function to compare with.
    """

    kind: str
    why: str
    by_hand: Callable[..., Any] | None = None
    same_bits: bool = True


def _deviate(kind: str, why: str, *names: str, same_bits: bool = True) -> dict[str, Deviation]:
    return {name: Deviation(kind, why, None, same_bits) for name in names}


FLOAT32_ONLY = (
    *("jnp.linalg.cholesky", "jnp.linalg.inv"),
    *("special.ndtr", "special.log_ndtr", "special.ndtri"),
)
_NO_LOW = "JAX has it in float32 only"
DEVIATES: dict[str, Deviation] = {
    **_deviate(LOW, "every inner product is one primitive, dot_general",
               "jnp.tensordot", "jnp.dot", "jnp.vdot", "jnp.inner"),
    **_deviate(FOLLOWS, "a whole power is a product; where only float32 reads it, it is in float32",
               "x ** 2", "x ** 3"),
    **_deviate(FULL, "sums are listed, and most of it is one",
               "jnp.mean", "jnp.average", "jnp.nanmean", "jnp.nansum", "jnp.trace", "jnp.var",
               "jnp.std"),
    **_deviate(FULL, "JAX keeps only its parts, and exp and log are listed",
               "nn.logsumexp", "special.logsumexp", "lax.cumlogsumexp"),
    **_deviate(FULL, "JAX keeps only its parts, and exp is listed",
               "special.i0", "special.i1", same_bits=False),
    **_deviate(FULL, _NO_LOW, "jnp.linalg.cholesky", "jnp.linalg.inv"),
    **_deviate(FULL, f"{_NO_LOW}, and keeps only its parts", "special.ndtri", same_bits=False),
    **_deviate(FOLLOWS, f"{_NO_LOW}, and keeps only its parts", "special.ndtr", same_bits=False),
    **_deviate(FIRST, "the second operand only gives signs", "jnp.copysign"),
    **_deviate(WIDEST, "JAX keeps only its parts", "jnp.where(x > 0, x, a * x)"),
    "nn.dot_product_attention": Deviation(
        LOW, "its logits are a product of their own, which leaves low", _attention),
    "x @ y + c": Deviation(WIDEST, "the addition, not of a bias, is one of its own", _linear),
}  # fmt: skip

# In the dtype of the reference, with the digits of float32 inside.
FLOAT32_INSIDE = (
    *("jnp.i0", "jnp.diagonal", "jnp.logaddexp", "jnp.logaddexp2"),
    *("special.logit", "special.log_ndtr", "special.entr", "special.xlogy", "special.xlog1py"),
)

# Of the CPU lists: what the reference says of some rows with bfloat16 operands.
CPU = {
    **dict.fromkeys(("x @ y", "jnp.matmul", "lax.conv", "nn.dot_product_attention"), LOW),
    **dict.fromkeys(("jnp.prod", "jnp.quantile", "jnp.trace"), FULL),
    **dict.fromkeys(("jnp.linalg.cholesky", "jnp.linalg.inv"), FULL),
    **dict.fromkeys(("jnp.exp", "jnp.log", "jnp.log1p", "jnp.power", "jnp.tan", "1 / x"), FOLLOWS),
    **dict.fromkeys(("jnp.sum", "jnp.cumsum", "jnp.cumprod", "jnp.mean", "jnp.var"), FOLLOWS),
    **dict.fromkeys(("nn.softmax", "nn.log_softmax", "nn.softplus", "nn.logsumexp"), FOLLOWS),
    **dict.fromkeys(("nn.gelu", "jnp.add", "jnp.concatenate"), FOLLOWS),
    # Not listed, and in float32 all the same: the squares under a sum are, by demand.
    **dict.fromkeys(("jnp.linalg.norm", "layer norm by hand"), FULL),
}
