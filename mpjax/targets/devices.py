"""Devices to compile for, not all of them here: `v5e:16x16`, `2 x v5e:4x4`, `h100:8`, `cpu:8`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

import jax

from mpjax.errors import ConfigError, brief
from mpjax.targets.chips import Chip, chips, read_chip

_TEXT = re.compile(r"(?:(\d+)\s*x\s*)?([a-z]\w*):(\d+(?:x\d+)*)")
_FORMS = "write v5e:16x16, '2 x v5e:16x16' for two slices, h100:8 or cpu:8"
# What libtpu asks its host for, which is none; the chips of the topology are others.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it compiles only: another process may have the chips
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_OURS = ("JAX_", "XLA_", "TPU_", "LIBTPU", "ALLOW_MULTIPLE_LIBTPU", "MEGASCALE_", "CUDA_VISIBLE")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices by their text.

    Args:
      text: as it was given.
      kind: name of a chip, or `cpu`.
      shape: devices along each axis of a slice.
      slices: how many there are.
    """

    text: str
    kind: str
    shape: tuple[int, ...]
    slices: int

    @property
    def count(self) -> int:
        """All devices."""
        return self.slices * math.prod(self.shape)

    @property
    def chip(self) -> Chip | None:
        """The chip; None for CPU devices."""
        return None if self.kind == "cpu" else read_chip(self.kind)

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.chip.platform if self.chip else "cpu"


def parse_target(text: str) -> Target:
    """Reads a target.

    Args:
      text: CHIP:TOPOLOGY, such as `v5e:16x16` or `h100:8`, with `2 x` in front for two slices of
        TPUs; or `cpu:8`, devices of this host.

    Raises:
      ConfigError: what cannot be read, an unknown chip, a topology of another number of axes.

    Example:
      >>> parse_target("2 x v5e:4x4").count, parse_target("h100:8").platform
      (32, 'gpu')
    """
    found = _TEXT.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(f"target: {brief(text)} cannot be read; {_FORMS}")
    slices, kind, dims = int(found[1] or 1), found[2], found[3]
    if kind != "cpu" and kind not in chips():
        near = difflib.get_close_matches(kind, ["cpu", *chips()], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = " ".join(chips())
        raise ConfigError(f"target {text!r}: unknown chip {kind!r}; {hint}known: cpu {known}")
    shape = tuple(int(n) for n in dims.split("x"))
    axes = 1 if kind == "cpu" else read_chip(kind).shape
    if len(shape) != axes or min(shape) < 1 or slices < 1:
        example = {1: "8", 2: "4x4", 3: "4x4x4"}[axes]
        raise ConfigError(
            f"target {text!r}: a topology of {kind} has {axes} {'axes' if axes > 1 else 'number'},"
            f" each of 1 or more; write {kind}:{example}"
        )
    target = Target(text.strip(), kind, shape, slices)
    if slices > 1 and target.platform != "tpu":
        raise ConfigError(f"target {text!r}: only TPUs have slices; write {kind}:{target.count}")
    return target


def require_compiler(target: Target) -> None:
    """Checks that the compiler for a target is installed.

    Raises:
      ConfigError: it is not, with the package.
    """
    if target.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"target {target.text!r}: compiling for a TPU needs its compiler, libtpu (0.5 GB);"
            " pip install 'jax[tpu]', or libtpu alone"
        )
    names = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if target.platform == "gpu" and not any(map(importlib.util.find_spec, names)):
        raise ConfigError(
            f"target {target.text!r}: compiling for a GPU needs JAX's CUDA plugin (5.5 GB); pip"
            " install 'mpjax[cuda12]'"
        )


def clean_environment(target: Target) -> dict[str, str]:
    """Returns the environment of a process that compiles for a target and has no accelerator."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
    env = others | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        env["JAX_COMPILATION_CACHE_DIR"] = cache
    if target.platform == "tpu":
        env |= _TPU
    if target.kind == "cpu":
        env["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={target.count}"
            " --xla_cpu_enable_concurrency_optimized_scheduler=false"
        )
    return env


def target_devices_of(target: Target) -> list[Any]:
    """Returns the devices; slice by slice. The process has the environment above.

    Raises:
      ConfigError: the compiler does not know the topology, or another process has libtpu.
    """
    if target.kind == "cpu":
        if len(jax.devices()) < target.count:
            raise ConfigError(
                f"target {target.text!r}: there are {len(jax.devices())} CPU devices; start with"
                f" XLA_FLAGS=--xla_force_host_platform_device_count={target.count}"
            )
        return jax.devices()[: target.count]
    from jax.experimental import topologies

    chip, dims = target.chip, "x".join(map(str, target.shape))
    more: dict[str, Any] = {}
    if target.platform == "gpu":
        dims = f"1x1x{target.count}"
        more = {"target_config": chip.description if chip else "", "topology": dims}
        name = dims
    else:
        name = f"{target.kind}:{dims}"
        more = {"num_slices": target.slices} if target.slices > 1 else {}
    platform = "cuda" if target.platform == "gpu" else "tpu"
    try:
        described = topologies.get_topology_desc(name, platform=platform, **more)
    except Exception as error:
        said = " ".join(str(error).split())
        if "lockfile" in said or "already in use" in said:
            raise ConfigError(
                f"target {target.text!r}: another process compiles for a TPU, and libtpu serves"
                " one; wait for it"
            ) from None
        raise ConfigError(
            f"target {target.text!r}: its compiler knows no such topology ({said[:200]}); {_FORMS}"
        ) from None
    return list(described.devices)
