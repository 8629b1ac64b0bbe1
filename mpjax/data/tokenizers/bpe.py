"""Training of a byte-level BPE."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

logger = logging.getLogger("mpjax.data")

# The settings of training, as part of the cache key.
TRAINING = "byte-level BPE, min_frequency 2, separator 0, words of at most 128"
SEPARATOR = "<|endoftext|>"
_LONG = re.compile(r"\S{128}(?=\S)|\s{128}(?=\s)")  # each merge scans whole words
_SAID = 2_000_000  # characters above which training is logged


def train_bpe(size: int, texts: Sequence[str]) -> tokenizers.Tokenizer:
    """Returns a byte-level BPE of at most `size` ids, trained on texts; the separator has id 0.

    Words beyond 128 characters are cut there for training, so that its time is linear in theirs.
    Training on more than 2 MB is logged, and shows the package's bars on a terminal.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=bool(sys.stderr and sys.stderr.isatty()),
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # no byte is ever unknown
    )
    characters, begun = sum(map(len, texts)), time.monotonic()
    if characters > _SAID:
        logger.info("tokenizer bpe:%d: training on %.1f MB of text", size, characters / 1e6)
    pieces = [piece for text in texts for piece in in_short_words(text)]
    backend.train_from_iterator(pieces, trainer, length=len(pieces))
    if characters > _SAID:
        logger.info("tokenizer bpe:%d: trained in %.0f s", size, time.monotonic() - begun)
    return backend


def in_short_words(text: str) -> Iterator[str]:
    """The text, cut where a word is too long to train on.

    Example:
        >>> [len(piece) for piece in in_short_words("a word " + 200 * "x")]
        [135, 72]
    """
    start = 0
    for found in _LONG.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]
