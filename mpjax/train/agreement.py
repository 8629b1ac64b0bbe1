"""What several processes tell each other before they train together."""

from __future__ import annotations

import numpy as np
from jax.experimental import multihost_utils


def exchange(text: str) -> list[str]:
    """Returns the texts of all processes, in their order; every process must call it."""
    content = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(content.size)))
    padded = np.pad(content, (0, int(sizes.max()) + 1 - content.size))  # arrays are never empty
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def of_first(text: str) -> str:
    """Returns the text of the first process; every process must call it."""
    return exchange(text)[0]
