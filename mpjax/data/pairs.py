"""Pairs of sequences, from a file or a source of the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpjax.data.split import held_out
from mpjax.data.tables.rows import one_of_sources, read_rows, say_counts
from mpjax.errors import ConfigError
from mpjax.typing import Sources

Pair = tuple[str, str]

_HELD_OUT = 0.05


def load_pairs(
    source: str, *, seed: int = 0, sources: Sources[Sequence[Pair]] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Loads pairs of sequences as a training and a held-out side that share no source sequence.

    Equal pairs are kept once; 5 % of the source sequences are held out, by a hash of seed and
    sequence, with all their targets. What is left out is counted in one logged line.

    Args:
        source: one of `sources`, or a file of ``source<TAB>target`` lines, perhaps with a header
            that names these columns; the same in ``.csv``; or ``.jsonl``, ``.json`` or
            ``.parquet`` with these keys.
        seed: of the split.
        sources: name -> a function that returns (source, target) pairs.

    Returns:
        (training, held out) lists of (source, target).

    Raises:
        ConfigError: an unknown source, or a file that cannot be read.
    """
    blank, sources = 0, sources or {}
    pairs: Sequence[Pair]
    if source in sources:
        pairs = sources[source]()
    elif Path(source).is_file():
        rows, blank = read_rows(Path(source), ("source", "target"))
        pairs = [(a, b) for a, b in rows]
    else:
        what = one_of_sources(sources, "a file of source<TAB>target lines")
        raise ConfigError(f"data {source!r}: no such source or file; {what}")
    distinct = list(dict.fromkeys(pairs))
    out = held_out([first for first, _ in distinct], _HELD_OUT, seed=seed)
    train = [pair for pair, one in zip(distinct, out, strict=True) if not one]
    test = [pair for pair, one in zip(distinct, out, strict=True) if one]
    dropped = {"blank": blank, "equal to an earlier one": len(pairs) - len(distinct)}
    say_counts(source, "pairs", {"for training": len(train), "held out": len(test)}, dropped)
    return train, test
