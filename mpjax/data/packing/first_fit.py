"""Which pieces of documents share a row."""

from __future__ import annotations

import numpy as np

from mpjax.errors import ConfigError

LONGER = ("error", "split")


def cut(sizes: np.ndarray, length: int, longer: str) -> np.ndarray:
    """Returns the pieces that fit a row of each document, in order.

    Args:
        sizes: tokens of each document, at least 1.
        length: tokens of a row.
        longer: what becomes of a longer document: `split` takes `length` tokens at a time, `error`
            refuses it.

    Returns:
        (pieces, 3): number of the document, first token, one behind the last token.

    Raises:
        ConfigError: a longer document with `error`.

    Example:
        >>> cut(np.array([5, 2]), 4, "split").tolist()
        [[0, 0, 4], [0, 4, 5], [1, 0, 2]]
    """
    if longer == "error" and (sizes > length).any():
        number = int(np.argmax(sizes > length))
        raise ConfigError(
            f"packing: examples[{number}] has {sizes[number]} tokens, and {(sizes > length).sum()}"
            f" of {len(sizes)} are longer than length={length}; raise it, leave them out, or set"
            " longer='split'"
        )
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    stop = np.minimum((place + 1) * length, sizes[document])
    return np.stack([document, place * length, stop], axis=1)


def first_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Packs pieces into rows: the largest first, each into the first row that has room.

    It takes at most 11/9 of the rows that are needed, and one more.

    Args:
        sizes: tokens of each piece, 1 ... length; of equal pieces the first is first.
        length: tokens of a row.

    Returns:
        The pieces of each row.

    Example:
        >>> first_fit(np.array([2, 5, 3, 4]), 6)
        [[1], [3, 0], [2]]

    References:
        Johnson et al., Worst-case performance bounds for simple one-dimensional packing algorithms
        (1974); Krell et al., Efficient sequence packing without cross-contamination (2021).
    """
    rows: list[list[int]] = []
    room = np.full(len(sizes), length)  # of rows that are not begun too, so one always fits
    for piece in np.argsort(-sizes, kind="stable").tolist():
        row = int(np.argmax(room[: len(rows) + 1] >= sizes[piece]))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        room[row] -= sizes[piece]
    return rows
