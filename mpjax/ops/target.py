"""The platform that a function is traced for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import jax
from jax.sharding import Mesh

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_TARGET = jax.make_user_context(default_value=None)  # part of the key of JAX's caches


def target_platform() -> str:
    """Returns `cpu`, `gpu` or `tpu`: what the devices of the mesh are, or else the default backend.

    Example:
      >>> with tracing_for("tpu"):
      ...     target_platform()
      'tpu'
    """
    return _TARGET.value[0] if _TARGET.value else jax.default_backend()


def target_devices() -> int:
    """Returns how many devices the program is for: those of the mesh, or else all there are.

    Example:
      >>> with tracing_for("tpu"):
      ...     target_devices()
      1
    """
    return _TARGET.value[1] if _TARGET.value else jax.device_count()


def on_one_cpu() -> bool:
    """Returns whether the program is for a CPU, and sums nothing over several devices.

    Example:
      >>> with tracing_for("cpu", devices=8):
      ...     on_one_cpu()
      False
    """
    return target_platform() == "cpu" and (not _TARGET.value or _TARGET.value[1] == 1)


@contextmanager
def tracing_for(platform: str, *, devices: int = 1) -> Iterator[None]:
    """What is traced inside is for a platform.

    Args:
      platform: `cpu`, `gpu` or `tpu`.
      devices: how many.
    """
    with _TARGET((platform, devices)):
        yield


def traced_for(mesh: Mesh, function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Returns a function in which `target_platform` is that of a mesh.

    Devices of a topology that is only compiled for have another platform than this process.

    Args:
      mesh: its devices are alike.
      function: what `jax.jit` traces.
    """
    platform = mesh.devices.flat[0].platform

    @functools.wraps(function)
    def traced(*args: _Args.args, **options: _Args.kwargs) -> _Result:
        with tracing_for(platform, devices=mesh.size):
            return function(*args, **options)

    return traced
