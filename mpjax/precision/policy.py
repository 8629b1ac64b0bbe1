"""Policies: jmp's param / compute / output dtypes, from jmp's own strings."""

from __future__ import annotations

import jmp

from mpjax.errors import ConfigError
from mpjax.precision.dtypes import dtype_name, is_fp8, parse_dtype

# The name scope of what takes its policies by path already: autocast refuses to cast it again.
CARRIED = "mpjax.policies"
_FIELDS = {"p": "p", "params": "p", "c": "c", "compute": "c", "o": "o", "output": "o"}


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
