"""What outside of a run's settings changes its numbers: JAX's configuration and XLA's flags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

from mpjax.errors import ConfigError
from mpjax.train.checkpoint.restore import differences
from mpjax.typing import Json

# Of jax.config; what only shows, checks, caches or places is left out.
_JAX = (
    "jax_enable_x64", "jax_explicit_x64_dtypes", "jax_numpy_dtype_promotion",
    "jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel", "jax_default_matmul_precision", "jax_allow_f16_reductions",
    "jax_softmax_custom_jvp", "jax_use_direct_linearize", "jax_disable_jit",
    "jax_disable_most_optimizations", "jax_optimization_level",
    "jax_exec_time_optimization_effort", "jax_memory_fitting_effort", "jax_memory_fitting_level",
    "jax_compiler_enable_remat_pass", "jax_use_shardy_partitioner",
    "jax_ragged_dot_use_ragged_dot_instruction",
)  # fmt: skip
_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# How many devices there are is the mesh's business, and a resumed run may have others.
_NO_NUMBERS = re.compile(
    r"--xla_(force_host_platform_device_count|dump_\w+|hlo_profile|gpu_cuda_data_dir)"
)


def environment() -> dict[str, Json]:
    """Returns by name what a run's numbers depend on beside its settings, as JSON-able values.

    Example:
      >>> environment()["jax_enable_x64"]
      False
    """
    found: dict[str, Json] = {}
    for name in _JAX:
        if name in jax.config.values:  # versions of JAX differ in what they have
            # an attribute knows of a surrounding `with`, but not every setting is one
            value = getattr(jax.config, name, jax.config.values[name])
            plain = isinstance(value, bool | int | float | str | None)
            found[name] = value if plain else str(value)
    found |= {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    return found | xla_flags()


def xla_flags() -> dict[str, str]:
    """Returns the flags in `XLA_FLAGS`, or in the file that it names, which change numbers."""
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-") and Path(text).is_file():  # XLA reads it so
        text = Path(text).read_text(errors="replace")
    pairs = (word.partition("=") for word in text.split())
    flags = {name: value if equals else "true" for name, equals, value in pairs}  # the last holds
    return {n: value for n, value in sorted(flags.items()) if not _NO_NUMBERS.fullmatch(n)}


def environment_differences(saved: Mapping[str, Json]) -> list[str]:
    """Returns what outside of the settings changes the numbers and differs: a text for each.

    Args:
      saved: what `environment` returned at the save.
    """
    now = environment()
    # A setting that the other version of JAX has not is no difference.
    known = [n for n in saved.keys() | now if not n.startswith("jax_") or (n in saved and n in now)]
    before, after = ({n: side[n] for n in known if n in side} for side in (saved, now))
    return differences(before, after, ())


def require_same_environment(saved: Mapping[str, Json]) -> None:
    """Refuses to resume where something outside of the settings changes the numbers.

    Args:
      saved: what `environment` returned at the save.

    Raises:
      ConfigError: something differs; names each with both values.

    Example:
      >>> require_same_environment(environment() | {"jax_enable_x64": True})
      Traceback (most recent call last):
      mpjax.errors.ConfigError: resume: jax_enable_x64 was true at the save, is false now; set ...
    """
    if found := environment_differences(saved):
        raise ConfigError(
            f"resume: {'; '.join(found)}; set the environment as it was, or start a new run of"
            " these weights with --init-from and another --out"
        )
