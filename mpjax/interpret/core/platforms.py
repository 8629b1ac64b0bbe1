"""The branch of a `jax.lax.platform_dependent` call that one platform takes."""

from __future__ import annotations

import jax
from jax import lax
from jax.extend.core import JaxprEqn

from mpjax.errors import ConfigError, brief

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def check_platform(what: str, platform: str | None) -> str:
    """Returns the platform asked for, by default the one where JAX runs.

    Args:
      what: the function that was given it, for the error.
      platform: one of `PLATFORMS`; None for the default device's.

    Raises:
      ConfigError: none of them.

    Example:
      >>> check_platform("audit", "tpu")
      'tpu'
    """
    if platform is None:
        return _default_platform()
    if not isinstance(platform, str) or platform not in PLATFORMS:
        raise ConfigError(f"{what}: platform={brief(platform)}; known: {' '.join(PLATFORMS)}")
    return platform


def _default_platform() -> str:
    """The platform of the default device, in the names that JAX lowers for (cuda, not gpu)."""
    device = getattr(jax.config, "jax_default_device", None)
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    if name in PLATFORMS:
        return str(name)
    numbers = {name: lambda i=i: i for i, name in enumerate(PLATFORMS)}
    with jax.ensure_compile_time_eval():
        number = int(lax.platform_dependent(default=lambda: -1, **numbers))
    return PLATFORMS[number] if number >= 0 else str(name)


def branch_taken(eqn: JaxprEqn, platform: str) -> int | None:
    """Returns the number of the branch that a platform takes.

    Args:
      eqn: an equation.
      platform: as `check_platform` gives it.

    Returns:
      None for an equation that takes a branch by its operands, or has none.
    """
    names = eqn.params.get("branches_platforms")
    if names is None:
        return None
    default = next((i for i, each in enumerate(names) if each is None), None)
    return next((i for i, each in enumerate(names) if each and platform in each), default)
