"""Checks of a product's arguments: dimension numbers and dtypes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import ROUNDED
from mpjax.typing import DType, DTypeLike, Shape

Axes = tuple[int, ...]
Dims = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]
# as `lax.dot_general` takes them: sequences of sequences, and axes that may be negative
DotDimensionNumbers = Sequence[Sequence[Sequence[int]]]


def read_dims(numbers: DotDimensionNumbers, a: Shape, b: Shape, where: str) -> Dims:
    """Reads the dimension numbers of a product; negative axes count from the end.

    Args:
      numbers: `((a contracting, b contracting), (a batch, b batch))`.
      a: shape of the left operand.
      b: shape of the right operand.
      where: what to call the product in an error.

    Raises:
      ConfigError: another form, an axis that is not there or stands twice, or axes of two sizes.

    Example:
      >>> read_dims((((-1,), (0,)), ((), ())), (2, 3), (3, 4), "dot")
      (((1,), (0,)), ((), ()))
    """
    try:
        pairs = [[tuple(map(operator.index, axes)) for axes in pair] for pair in numbers]
        ((ca, cb), (ba, bb)) = pairs
    except (TypeError, ValueError):
        raise ConfigError(
            f"{where}: dimension_numbers={brief(numbers)}; write ((a contracting, b contracting),"
            " (a batch, b batch)), such as (((1,), (0,)), ((), ())) of a matrix product"
        ) from None
    out = []
    for name, shape, axes in (("left", a, (ca, ba)), ("right", b, (cb, bb))):
        whole = [axis + len(shape) if axis < 0 else axis for part in axes for axis in part]
        if len(set(whole)) < len(whole) or not set(whole) <= set(range(len(shape))):
            raise ConfigError(
                f"{where}: axes {' '.join(map(str, whole)) or '()'} of the {name} operand, which"
                f" has shape {shape}; name axes of 0 .. {len(shape) - 1}, each once"
            )
        out.append((tuple(whole[: len(axes[0])]), tuple(whole[len(axes[0]) :])))
    (ca, ba), (cb, bb) = out
    for kind, left, right in (("contracting", ca, cb), ("batch", ba, bb)):
        sizes = [a[i] for i in left], [b[i] for i in right]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"{where}: the {kind} axes have sizes {tuple(sizes[0])} in the left operand of"
                f" shape {a} and {tuple(sizes[1])} in the right one of shape {b}; make them equal"
            )
    return (ca, cb), (ba, bb)


def float_dtype(dtype: DTypeLike | None, default: DTypeLike, where: str) -> DType:
    """Returns a dtype that a product computes or is returned in.

    Args:
      dtype: what was given, or None.
      default: what None means.
      where: what to call it in an error.

    Raises:
      ConfigError: it is not float32, bfloat16 or float16.
    """
    try:
        found = jnp.dtype(default if dtype is None else dtype)
    except TypeError:
        raise ConfigError(f"{where} is {brief(dtype)}; give float32, bfloat16 or float16") from None
    if found not in ROUNDED and dtype is not None:
        raise ConfigError(f"{where} is {found}; give float32, bfloat16 or float16")
    return found
