"""Documents as BERT is pre-trained on them: lines, and pairs of segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpjax.data import Document, Example, WordPiece, segment_pairs
from mpjax.errors import ConfigError


def pieces_of(documents: Sequence[Document], config: Any) -> list[list[str]]:
    """Documents as lines, long ones cut, in an order that depends on nothing but their number."""
    cut = []
    for document in documents:
        lines = [line.strip() for line in document.text.splitlines() if line.strip()]
        cut += [lines[i : i + config.lines] for i in range(0, len(lines), config.lines)]
    order = np.random.default_rng(0).permutation(len(cut))
    return [cut[i] for i in order[: config.documents]]


def pairs(
    side: str, documents: Sequence[Sequence[str]], pieces: WordPiece, config: Any
) -> list[Example]:
    """Pairs of segments of one side of the split."""
    try:
        return segment_pairs(documents, pieces, longest=max(config.lengths), seed=0)
    except ConfigError as error:
        raise ConfigError(f"data {config.data!r}: {side}: {error}, or lines") from None
