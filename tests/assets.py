"""Assets in tests: what has been fetched into the checkout's cache, else a skip.

Tests never download: whether a test runs is decided before it, not by the network during it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.datasets.assets import find

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def asset(name: str) -> Path:
    """The folder of an asset in the checkout's cache; skips the test when it is not there."""
    folder = find(name, cache_dir=CACHE)
    if folder is None:
        command = f"MPJAX_CACHE=.cache python experiments/fetch.py {name}"
        pytest.skip(f"asset {name} is not in {CACHE.name}/assets; {command} fetches it")
    return folder
