"""Policies, jmp's param / compute / output dtypes, and the dtype names that they may use."""

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

# The name scope of a model that applies its policies by path; autocast refuses to cast it again.
CARRIED = "mpjax.policies"
_FIELDS = {"p": "p", "params": "p", "c": "c", "compute": "c", "o": "o", "output": "o"}


def is_dtype_name(text: str) -> bool:
    """Returns whether a text names a dtype, of computing or of stored weights.

    Example:
      >>> is_dtype_name("bf16"), is_dtype_name("fp9")
      (True, False)
    """
    return text in (*_NAMES, *_STORED, *(np.dtype(d).name for d in _STORED.values()))


def is_fp8(dtype: DTypeLike) -> bool:
    """Returns whether a dtype is one of those in which only weights are stored.

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
    """Returns the dtype in which a sum over many terms, and its terms, are computed.

    float32 for float16, whose squares overflow from 256 on and whose sums from 65504 on; any other
    dtype for itself: bfloat16 has the range of float32.

    Example:
      >>> sum_dtype(jnp.float16).name, sum_dtype(jnp.bfloat16).name
      ('float32', 'bfloat16')
    """
    return np.dtype(np.float32) if dtype == jnp.float16 else np.dtype(dtype)


def parse_policy(text: str | jmp.Policy, where: str = "policy") -> jmp.Policy:
    """Returns the policy that a string of jmp's grammar means.

    Fields that are left out follow jmp: param is float32, compute follows param, output follows
    compute. A dtype alone means all three. Weights may be stored in fp8 (`p=e4m3`), which is not
    computed in: compute is then float32 unless given.

    Args:
      text: `p=f32,c=bf16,o=f32`, `params=float32,compute=half`, `bfloat16`; jmp's names and
        those of `parse_dtype`.
      where: what to call the setting in an error.

    Returns:
      The policy; its dtypes are JAX scalar types, so that equal policies compare equal.

    Raises:
      ConfigError: unknown field or dtype, a field given twice, or empty text.

    Example:
      >>> policy_text(parse_policy("c=fp16"))
      'p=f32,c=f16,o=f16'
    """
    if isinstance(text, jmp.Policy):
        text = policy_text(text)
    if not isinstance(text, str) or "=" not in text:
        dtype = parse_dtype(text, where)
        return jmp.Policy(dtype, dtype, dtype)
    found = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in _FIELDS:
            raise ConfigError(
                f"{where}: unknown field {key!r} in {text!r}; write p= (param), c= (compute),"
                " o= (output), such as p=f32,c=bf16,o=f32"
            )
        if _FIELDS[key] in found:
            raise ConfigError(f"{where}: field {key!r} stands twice in {text!r}; keep one")
        found[_FIELDS[key]] = parse_dtype(value, f"{where}: {key}", stored=_FIELDS[key] == "p")
    param = found.get("p", parse_dtype("f32"))
    compute = found.get("c", parse_dtype("f32") if is_fp8(param) else param)
    return jmp.Policy(param, compute, found.get("o", compute))


def policy_text(policy: jmp.Policy) -> str:
    """Returns jmp's string for a policy, `p=f32,c=bf16,o=f32`."""
    return ",".join(
        f"{key}={dtype_name(dtype)}"
        for key, dtype in zip(
            "pco", (policy.param_dtype, policy.compute_dtype, policy.output_dtype), strict=True
        )
    )
