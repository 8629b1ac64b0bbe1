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
    return _TARGET.value or jax.default_backend()


@contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is for a platform.

    Args:
      platform: `cpu`, `gpu` or `tpu`.
    """
    with _TARGET(platform):
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
        with tracing_for(platform):
            return function(*args, **options)

    return traced
