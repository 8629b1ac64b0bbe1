"""Metrics that well-kept libraries compute are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any

from mpjax.errors import ConfigError


def need(module: str, package: str) -> Any:
    """Returns a module of the extra `tasks`.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"metrics: {package} is not installed; pip install 'mpjax[tasks]'"
        ) from None
