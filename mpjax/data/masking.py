"""What BERT is pre-trained on: masked tokens, and pairs of segments that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpjax.data.buckets import IGNORE, Batch
from mpjax.data.tokenizers.wordpiece import Example, WordPiece
from mpjax.errors import ConfigError


def masking(pieces: WordPiece, rate: float = 0.15) -> Callable[[Batch, np.random.Generator], Batch]:
    """Returns a change of batches that hides tokens and adds `labels`, what they were.

    Of the tokens that are not special, `rate` are chosen; 80 % of these become the mask token,
    10 % a random one and 10 % stay. Labels elsewhere are `IGNORE`.

    Args:
        pieces: whose special ids and vocabulary.
        rate: share of tokens, above 0 and below 1.

    Raises:
        ConfigError: a rate out of range.

    References:
        Devlin et al. 2019, BERT, section 3.1 and appendix A.1.
    """
    if not 0 < rate < 1:
        raise ConfigError(f"mask_rate={rate}: expected a share above 0 and below 1, as 0.15")
    special = [pieces.pad, pieces.first, pieces.separator]

    def change(batch: Batch, draw: np.random.Generator) -> Batch:
        masks = [name for name in ("keep", "attention_mask", "segments") if name in batch]
        if "ids" not in batch or len(masks) != 1:
            raise ConfigError(
                f"masking: the batch holds {' '.join(batch)}; give ids, and keep, attention_mask or"
                " segments"
            )
        ids, keep = batch["ids"], np.asarray(batch[masks[0]]).astype(bool)
        chosen = (draw.random(ids.shape) < rate) & keep & ~np.isin(ids, special)
        kind = draw.random(ids.shape)
        other = draw.integers(0, pieces.vocab_size, ids.shape).astype(ids.dtype)
        hidden = np.where(kind < 0.8, ids.dtype.type(pieces.mask), np.where(kind < 0.9, other, ids))
        labels = np.where(chosen, ids, np.int32(IGNORE))
        return batch | {"ids": np.where(chosen, hidden, ids), "labels": labels}

    return change


def segment_pairs(
    documents: Sequence[Sequence[str]], pieces: WordPiece, *, longest: int, seed: int
) -> list[Example]:
    """Pairs of segments of documents; half of the second ones are from another document.

    A segment is as many sentences as fit half of `longest`.

    Args:
        documents: their sentences.
        pieces: tokenizer.
        longest: tokens of a pair at most, special ones included.
        seed: of the choice.

    Returns:
        What `WordPiece.encode` returns, and `next`: 0 where the second segment follows the first,
        1 where it does not.

    Raises:
        ConfigError: fewer than two documents with two segments, or no room for text.

    References:
        Devlin et al. 2019, BERT, section 3.1 (next sentence prediction).
    """
    room = (longest - 3) // 2
    if room < 1:
        raise ConfigError(
            f"longest={longest}: no room for two segments; expected at least 5 tokens"
        )
    segments = [_segments(document, pieces, room) for document in documents]
    segments = [found for found in segments if len(found) > 1]
    if len(segments) < 2:
        raise ConfigError(
            f"documents: {len(segments)} of {len(documents)} have two segments of {room} tokens;"
            " give more or longer ones, or lower seq"
        )
    draw = np.random.default_rng(seed)
    examples = []
    for number, found in enumerate(segments):
        for place in range(0, len(found) - 1, 2):
            first, second, strange = found[place], found[place + 1], int(draw.random() < 0.5)
            if strange:
                other = segments[(number + draw.integers(1, len(segments))) % len(segments)]
                second = other[draw.integers(len(other))]
            ids = [pieces.first, *first, pieces.separator, *second, pieces.separator]
            types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
            examples.append(
                {
                    "ids": np.array(ids, np.int32),
                    "types": np.array(types, np.int32),
                    "keep": np.ones(len(ids), bool),
                    "next": np.int32(strange),
                }
            )
    return examples


def _segments(document: Sequence[str], pieces: WordPiece, room: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    current = np.zeros(0, np.int32)
    for sentence in document:
        ids = pieces.pieces(sentence)[:room]
        if len(current) + len(ids) > room:
            found.append(current)
            current = ids
        else:
            current = np.concatenate([current, ids])
    return [segment for segment in [*found, current] if len(segment)]
