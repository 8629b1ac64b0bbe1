"""Which operations autocast runs low, which in float32: lists after PyTorch's, for JAX's names.

An operation is known by the name of its primitive, or of the function that JAX keeps as one call
(`jit[name=log_softmax]`, a custom rule). Functions that are no call in a jaxpr (softmax, logsumexp,
norms) are covered by their primitives and by `float32_consumers`.

References:
  PyTorch documentation, Automatic Mixed Precision package, Autocast Op Reference.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Iterable, Iterator

import jax
import jax.numpy
import jax.scipy.special
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, primitives

from mpjax.errors import ConfigError, brief
from mpjax.interpret.core.retrace import aval_of, is_float
from mpjax.interpret.core.walk import CUSTOM_RULES, equations

LOW = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
SCALED = frozenset({"scaled_matmul", "scaled_matmul_wrapper"})  # of blocks, which stay as they are
PRODUCTS = LOW | SCALED
# `reciprocal` is what autocast calls a division of a number and a power below zero.
_TAILS = frozenset(
    {
        *("acos", "asin", "cosh", "sinh", "tan", "erf_inv", "exp", "expm1", "log", "log1p"),
        *("pow", "rsqrt", "reciprocal"),
    }
)
_SUMS = frozenset({"reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp"})
FULL_CUDA = (
    _TAILS
    | _SUMS
    | {
        *("softplus", "softmax", "log_softmax", "logsumexp", "logmeanexp", "standardize"),
        *("norm", "_var", "_std", "weighted_logsoftmax"),
    }
)
FULL_CPU = frozenset(
    {
        *("reduce_prod", "fft", "quantile", "nanquantile", "percentile", "nanpercentile", "trace"),
        *("cholesky", "lu", "householder_product", "qr", "svd", "eigh", "triangular_solve"),
        "weighted_logsoftmax",
    }
)
# Computed in float32; the result has the dtype of the input, as a kernel's would.
WIDE = frozenset(
    {
        *("logaddexp", "logaddexp2", "xlogy", "xlog1py", "_xlogx", "logit"),
        *("i0", "_i0", "log_ndtr", "diagonal"),
    }
)
# One operation to a reader: its parts run in the dtype of the input, whatever list they are on.
WHOLE = frozenset(
    {
        *("elu", "celu", "selu", "silu", "swish", "log_sigmoid", "leaky_relu", "glu"),
        *("hard_tanh", "hard_sigmoid", "hard_silu", "squareplus", "mish", "sparse_plus"),
        *("sparse_sigmoid", "relu", "relu6", "gelu", "sigmoid"),
    }
)

# Run in the widest dtype of their inputs, value by value.
ELEMENTWISE = frozenset(
    {
        *("abs", "acosh", "add", "add_any", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil"),
        *("clamp", "copy", "copy_p", "cos", "digamma", "div", "erf", "erfc", "exp2", "floor"),
        *("integer_pow", "is_finite", "lgamma", "logistic", "max", "min", "mul", "name", "neg"),
        *("bessel_i0e", "bessel_i1e", "nextafter", "polynomial", "rem", "round", "select_n"),
        *("sign", "sin"),
        *("sqrt", "square", "stop_gradient", "sub", "tanh", "pvary", "mul_add", "reduce_precision"),
    }
)
SHAPE = frozenset(
    {
        *("broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice"),
        *("expand_dims", "gather", "pad", "reshape", "rev", "slice", "split", "squeeze"),
        *("transpose", "tile", "unstack", "stack", "sharding_constraint", "reshard"),
    }
)
COMPARE = frozenset({"eq", "ne", "ge", "gt", "le", "lt"})
SCATTER = frozenset({"scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max"})
FOLLOW = (
    ELEMENTWISE
    | SHAPE
    | COMPARE
    | SCATTER
    | _TAILS
    | _SUMS
    | {
        *("reduce_max", "reduce_min", "argmax", "argmin", "cummax", "cummin"),
        *("reduce_window_max", "reduce_window_min", "reduce_window_sum"),
        *("select_and_scatter_add", "select_and_gather_add"),
        *("psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"),
        *("reduce_scatter", "all_to_all", "ppermute", "pbroadcast", "psum_scatter"),
    }
)
# Each value keeps its own dtype.
APART = frozenset({"sort", "top_k", "optimization_barrier", "device_put"})


_SPECS = map(importlib.util.find_spec, ("jax", "optax"))
_LIBRARIES = tuple(os.path.dirname(s.origin) + os.sep for s in _SPECS if s and s.origin)


def _is_listed(jaxpr: Jaxpr) -> bool:
    """Whether a function is one of JAX or Optax, which the lists name, and no user's."""
    written = jaxpr.debug_info.func_src_info or ""  # `log_softmax at FILE:LINE`
    return written.partition(" at ")[2].startswith(_LIBRARIES)


def operation(eqn: JaxprEqn) -> str:
    """The name that the lists have for an equation: that of its function, or its primitive's."""
    name = eqn.primitive.name
    if name in ("jit", "pjit"):
        return str(eqn.params["name"]) if _is_listed(eqn.params["jaxpr"].jaxpr) else name
    if name in CUSTOM_RULES:
        jaxpr = eqn.params["call_jaxpr"].jaxpr
        return str(jaxpr.debug_info.func_name) if _is_listed(jaxpr) else name
    inverse = name == "integer_pow" and eqn.params["y"] < 0
    inverse |= name == "div" and isinstance(eqn.invars[0], Literal)
    return "reciprocal" if inverse else name


@dataclasses.dataclass(frozen=True)
class Lists:
    """Names of operations by the dtype that autocast gives them.

    Args:
      low: run in the low dtype.
      full: run in float32.
      wide: run in float32, with the result in the widest dtype of their inputs.
      widest: run in the widest dtype of their inputs; a name on a list before this one is not.
    """

    low: frozenset[str] = LOW
    full: frozenset[str] = FULL_CUDA
    wide: frozenset[str] = WIDE
    widest: frozenset[str] = FOLLOW

    def kind(self, name: str) -> str | None:
        """`low`, `full`, `wide` or `widest`; None for a name on no list."""
        kinds = ("low", "full", "wide", "widest")
        return next((kind for kind in kinds if name in getattr(self, kind)), None)


LISTS = {
    "cuda": Lists(),
    "cpu": Lists(full=FULL_CPU, wide=WIDE | {"_var", "_std"} | (_SUMS - FULL_CPU)),
}
# Inside a function that is one operation.
PLAIN = Lists(low=frozenset(), full=frozenset(), wide=frozenset())
_KNOWN = LOW | FULL_CUDA | FULL_CPU | FOLLOW | WIDE | WHOLE


def make_lists(base: str, low: Iterable[str], full: Iterable[str], widest: Iterable[str]) -> Lists:
    """Returns a base list with some operations moved.

    Args:
      base: `cuda` or `cpu`.
      low: names to run low, beside the base's.
      full: names to run in float32.
      widest: names to run in the widest dtype of their inputs.

    Raises:
      ConfigError: an unknown base, a name that no operation has, or one named in two lists.
    """
    if not isinstance(base, str) or base not in LISTS:
        raise ConfigError(f"autocast: unknown lists {brief(base)}; known: {' '.join(LISTS)}")
    named: dict[str, str] = {}
    for kind, names in (("low", low), ("full", full), ("widest", widest)):
        if isinstance(names, str):
            raise ConfigError(f"autocast: {kind}={names!r} is one text; write {kind}=[{names!r}]")
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"autocast: {kind}={brief(names)}; write names of operations, such as"
                f" {kind}=['exp']"
            )
        for name in names:
            if named.setdefault(name, kind) != kind:
                raise ConfigError(
                    f"autocast: {name!r} stands in {named[name]} and in {kind}; keep one"
                )
            if name not in _KNOWN and not _is_operation(name):
                near = difflib.get_close_matches(name, sorted(_KNOWN), n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise ConfigError(f"autocast: {kind} names no operation {name!r}{hint}")
    moved = {
        kind: (old - frozenset(named)) | {n for n, k in named.items() if k == kind}
        for kind, old in dataclasses.asdict(LISTS[base]).items()
    }
    return Lists(**moved)


def _is_operation(name: str) -> bool:
    """Whether a primitive or a public function of JAX has this name."""
    locations = (jax.numpy, jax.nn, jax.lax, jax.numpy.linalg, jax.scipy.special)
    primitive = f"{name.replace('-', '_')}_p"
    return any(hasattr(location, name) for location in locations) or hasattr(primitives, primitive)


def is_product(eqn: JaxprEqn) -> bool:
    """Returns whether an equation is a matrix product or convolution of floating-point arrays."""
    return eqn.primitive.name in PRODUCTS and all(is_float(atom.aval) for atom in eqn.invars[:2])


def held_products(eqn: JaxprEqn) -> int:
    """Returns how many float32 or float64 products stand in the jaxprs that an equation runs."""
    params = eqn.params
    if eqn.primitive.name == "custom_linear_solve":
        params = {"solve": params["jaxprs"].solve}  # the others are for its derivatives
    return sum(
        is_product(eqn) and any(aval_of(atom).dtype.itemsize >= 4 for atom in eqn.invars[:2])
        for held in _jaxprs(tuple(params.values()))
        for eqn, _ in equations(held)
    )


def _jaxprs(value: object) -> Iterator[ClosedJaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value
    elif isinstance(value, Jaxpr):
        inputs = [*value.constvars, *value.invars]
        yield ClosedJaxpr(value.replace(constvars=[], invars=inputs), ())
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _jaxprs(each)
