"""What processes compare before they train together."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpjax.errors import ConfigError
from mpjax.train.checkpoint.restore import flat_settings
from mpjax.typing import Json

_SHOWN = 8  # differences that an error names


def exchange(text: str) -> list[str]:
    """Returns the texts of all processes, in their order; every process must call it.

    Raises:
      ConfigError: the processes have different numbers of devices, so that none of JAX's
        collectives works.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        several = ", ".join(f"{n} in process {i}" for i, n in sorted(counts.items()))
        raise ConfigError(f"distributed: devices: {several}; give each process as many")
    content = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(content.size)))
    padded = np.pad(content, (0, int(sizes.max()) + 1 - content.size))  # arrays are never empty
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def of_first(text: str) -> str:
    """Returns the text of the first process; every process must call it."""
    return exchange(text)[0]


def require_agreement(page: Mapping[str, Json]) -> None:
    """Refuses to train where the processes were started differently; every process must call it.

    A hash is compared; only where it differs do the processes send each other the whole.

    Args:
      page: what must be the same everywhere, as JSON-able values, nested by name.

    Raises:
      ConfigError: something differs; names it, the processes and both values, in each of them.
    """
    text = json.dumps(page, sort_keys=True)
    if len(set(exchange(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first, *others = (flat_settings(json.loads(other)) for other in exchange(text))
    found = [
        f"{name} is {first.get(name, 'not set')} in process 0, {other.get(name, 'not set')} in"
        f" process {number}"
        for number, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise ConfigError(
        f"distributed: {'; '.join(found[:_SHOWN])}{more}; start all processes with the same"
        " command, code and environment"
    )


def code_hash(*folders: Path) -> str:
    """Returns a hash of all Python files below folders, names and contents.

    Example:
      >>> code_hash(Path("no/such/folder")) == code_hash()
      True
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]
