"""Names of the dtypes that a policy may use: jmp's, and those that jmp refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jmp
import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.typing import DType, DTypeLike

# jmp knows full/f32/float32, f16/float16, bf16/bfloat16, f64/float64 and half (per backend).
_EXTRA = {"fp32": "f32", "fp16": "f16", "fp64": "f64", "single": "f32", "double": "f64"}
_KNOWN = ("float32", "bfloat16", "float16", "float64")
_STORED = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}  # weights only, with scales
_NAMES = ("f32", "bf16", "f16", "f64", "full", "half", *_KNOWN, *_EXTRA)


def is_fp8(dtype: DTypeLike) -> bool:
    """Returns whether a dtype is one of those that only weights are stored in.

    Example:
      >>> is_fp8(jnp.float8_e4m3fn), is_fp8(jnp.bfloat16)
      (True, False)
    """
    return dtype in _STORED.values()


def parse_dtype(text: DTypeLike | None, where: str = "dtype", stored: bool = False) -> DTypeLike:
    """Returns the jax scalar type that a dtype name means.

    Args:
      text: a name of jmp's (`f32 bf16 f16 float32 full half ...`), one of `fp32 fp16 fp64 single
        double`, or a dtype.
      where: what to call the setting in an error.
      stored: whether weights are meant, which may also be `e4m3` or `e5m2`.

    Returns:
      `jnp.float32`, `jnp.bfloat16`, `jnp.float16` or `jnp.float64`; for weights also
      `jnp.float8_e4m3fn` or `jnp.float8_e5m2`.

    Raises:
      ConfigError: unknown name, fp8 for what is not stored, or float64 while JAX has 64-bit types
        switched off.

    Example:
      >>> parse_dtype("fp16") is jnp.float16
      True
    """
    try:
        name = text if isinstance(text, str) else np.dtype(text).name
    except TypeError:
        name = brief(text)
    short = next((key for key, d in _STORED.items() if name in (key, np.dtype(d).name)), None)
    if short is not None:
        if stored:
            return _STORED[short]
        raise ConfigError(
            f"{where}: {short} is a format of weights, which have scales; write p={short},c=bf16 to"
            " store them, and give products a recipe, such as r=fp8, to compute in fp8"
        )
    try:
        dtype = jmp.get_policy(_EXTRA.get(name, name)).param_dtype if "=" not in name else None
    except ValueError:
        dtype = None
    if dtype is None:
        hint = did_you_mean(name, _NAMES)
        raise ConfigError(f"{where}: unknown dtype {name!r}; {hint}known: {' '.join(_KNOWN)}")
    if dtype == jnp.float64 and jax.dtypes.canonicalize_dtype(dtype) != jnp.float64:
        raise ConfigError(
            f"{where}: float64 needs 64-bit types, which are off; set JAX_ENABLE_X64=1 or use f32"
        )
    return dtype


def dtype_name(dtype: DTypeLike | None) -> str:
    """Returns the short name of a dtype: `f32`, `bf16`, `f16`, `f64`; of weights `e4m3`, `e5m2`.

    Raises:
      ConfigError: another dtype.

    Example:
      >>> dtype_name(jnp.bfloat16)
      'bf16'
    """
    short = dict(zip(_KNOWN, ("f32", "bf16", "f16", "f64"), strict=True))
    short |= {np.dtype(d).name: key for key, d in _STORED.items()}
    try:
        name = "" if dtype is None else np.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in short:
        what = name or brief(dtype)
        raise ConfigError(f"dtype: a policy cannot hold {what}; known: {' '.join(_KNOWN)}")
    return short[name]


def sum_dtype(dtype: DTypeLike) -> DType:
    """Returns the dtype that sums over many terms are formed in, terms included.

    float32 for float16, whose squares overflow from 256 on and whose sums do from 65504 on; any
    other dtype is its own: bfloat16 has the range of float32.

    Example:
      >>> sum_dtype(jnp.float16).name, sum_dtype(jnp.bfloat16).name
      ('float32', 'bfloat16')
    """
    return np.dtype(np.float32) if dtype == jnp.float16 else np.dtype(dtype)
