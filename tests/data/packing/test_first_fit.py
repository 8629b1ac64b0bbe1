"""First fit: all pieces once, no row too long, few rows."""

from __future__ import annotations

import numpy as np
import pytest

from mpjax.data.packing.first_fit import cut, first_fit
from mpjax.errors import ConfigError


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_few_and_hold_each_piece_once(seed: int) -> None:
    draw = np.random.default_rng(seed)
    length = int(draw.integers(5, 200))
    sizes = draw.integers(1, length + 1, 300)
    rows = first_fit(sizes, length)
    assert sorted(piece for row in rows for piece in row) == list(range(300))
    filled = np.array([sizes[row].sum() for row in rows])
    assert filled.max() <= length
    # Largest first, a piece goes where those before have room: so no two rows fit into one.
    assert np.sort(filled)[:2].sum() > length
    least = -(-int(sizes.sum()) // length)
    large = int((sizes * 2 > length).sum())  # no two of these share a row
    assert max(least, large) <= len(rows) <= 11 / 9 * max(least, large) + 1


def test_the_order_of_sizes_matters() -> None:
    """Control: pieces in turn, the small ones first, need more rows."""
    sizes = np.array([3, 3, 3, 3, 7, 7, 7, 7])
    assert len(first_fit(sizes, 10)) == 4
    in_turn, room = 0, 0
    for size in sizes:
        if size > room:
            in_turn, room = in_turn + 1, 10
        room -= size
    assert in_turn == 5


def test_a_document_is_cut_into_all_its_tokens() -> None:
    sizes = np.random.default_rng(0).integers(1, 50, 40)
    pieces = cut(sizes, 7, "split")
    for document, size in enumerate(sizes):
        own = pieces[pieces[:, 0] == document]
        assert [t for _, start, stop in own for t in range(start, stop)] == list(range(size))
        assert (own[:-1, 2] - own[:-1, 1] == 7).all()
    assert cut(sizes, 49, "error").tolist() == [[i, 0, size] for i, size in enumerate(sizes)]
    with pytest.raises(ConfigError, match=r"examples\[\d+\] has \d+ tokens, and \d+ of 40 are lon"):
        cut(sizes, 20, "error")
