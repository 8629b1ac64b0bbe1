"""WordPiece: texts, pairs and words as the ids that BERT reads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from mpjax.data.tokenizers.bpe import in_short_words
from mpjax.data.tokenizers.tokenizer_file import open_tokenizer, tokenizer_errors
from mpjax.errors import ConfigError

logger = logging.getLogger("mpjax.data")

Example = dict[str, Any]  # name -> one number, or an array with an entry a token

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPiece:
    """A BERT tokenizer: special tokens around texts, pieces of words, token types of pairs.

    Args:
        backend: a tokenizer of the package ``tokenizers`` with BERT's special tokens.
        where: what it is, for errors.

    Attributes:
        vocab_size: ids are 0 ... vocab_size - 1.
        pad, unknown, first, separator, mask: ids of the special tokens.

    Raises:
        ConfigError: a special token is missing.

    Example:
        >>> pieces = train_wordpiece(["the quick fox", "the lazy dog"], 60)
        >>> one = pieces.encode(["the dog"], longest=8)[0]
        >>> pieces.tokens(one["ids"]), one["types"].tolist()
        (['[CLS]', 'the', 'dog', '[SEP]'], [0, 0, 0, 0])
    """

    def __init__(self, backend: tokenizers.Tokenizer, where: str = "tokenizer"):
        known = backend.get_vocab()
        if missing := [token for token in _SPECIAL if token not in known]:
            raise ConfigError(f"{where}: no token {missing[0]}; name a BERT tokenizer.json")
        self.pad, self.unknown, self.first, self.separator, self.mask = (
            known[token] for token in _SPECIAL
        )
        self.vocab_size = max(known.values()) + 1  # ids may have holes
        if backend.post_processor is None:  # BERT expects [CLS] and [SEP]
            backend.post_processor = processors.BertProcessing(
                ("[SEP]", self.separator), ("[CLS]", self.first)
            )
        self._backend, self._where = backend, where

    @property
    def special(self) -> tuple[int, ...]:
        """The ids of the special tokens but the unknown one, which stands for a word."""
        return self.pad, self.first, self.separator, self.mask

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The token of each id.

        Raises:
            ConfigError: an id that is none of the tokenizer's.
        """
        found = []
        for i in ids:
            token = self._backend.id_to_token(int(i)) if i >= 0 else None
            if token is None:
                raise ConfigError(
                    f"tokenizer: id {int(i)} is no token; expected 0 to {self.vocab_size - 1}"
                )
            found.append(str(token))
        return found

    def to_text(self) -> str:
        """JSON as in a tokenizer.json."""
        return self._backend.to_str()

    def pieces(self, text: str) -> np.ndarray:
        """The ids of a text alone, int32, without special tokens."""
        with tokenizer_errors(self._where):
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode(
        self,
        texts: Sequence[str],
        seconds: Sequence[str] = (),
        *,
        longest: int,
        quiet: bool = False,
    ) -> list[Example]:
        """Encodes texts or pairs; the longer part of one that is too long is cut, which is logged.

        Args:
            texts: the texts.
            seconds: the second text of each pair, or empty.
            longest: tokens at most, special ones included.
            quiet: whether cutting is not logged, of texts that are encoded again and again.

        Returns:
            ``{"ids", "types", "keep"}`` of each: int32, int32 (0 in the first text) and bool.

        Raises:
            ConfigError: a limit that leaves no room, or numbers of texts that differ.
        """
        if longest < 4:
            raise ConfigError(f"longest={longest}: no room for text; expected at least 4 tokens")
        if seconds and len(seconds) != len(texts):
            raise ConfigError(
                f"pairs: {len(texts)} first and {len(seconds)} second texts; give one for each"
            )
        rows: list[str] | list[tuple[str, str]]
        rows = list(zip(texts, seconds, strict=True)) if seconds else list(texts)
        with tokenizer_errors(self._where):
            encoded = self._backend.encode_batch(rows)
        if too_long := sum(len(one.ids) > longest for one in encoded):
            level = logging.DEBUG if quiet else logging.WARNING
            said = "%d of %d texts are cut to %d tokens"
            logger.log(level, said, too_long, len(encoded), longest)
            with tokenizer_errors(self._where):
                self._backend.enable_truncation(longest, strategy="longest_first")
                encoded = self._backend.encode_batch(rows)
                self._backend.no_truncation()
        return [_example(one.ids, one.type_ids) for one in encoded]

    def encode_words(
        self, sentences: Sequence[Sequence[str]], *, longest: int, capitals: bool = False
    ) -> tuple[list[Example], list[np.ndarray]]:
        """Encodes sentences that are words already.

        A word without any piece, such as a control character, becomes the unknown token.

        Args:
            sentences: their words.
            longest: tokens at most, special ones included; nothing is cut.
            capitals: token type 1 for the pieces of words that begin with a capital letter, which
                an uncased tokenizer hides.

        Returns:
            What `encode` returns, and of each sentence the place of every word's first piece.

        Raises:
            ConfigError: a sentence without words or longer than that.
        """
        examples, starts = [], []
        for number, words in enumerate(sentences):
            with tokenizer_errors(self._where):
                encoded = self._backend.encode_batch(list(words), add_special_tokens=False)
            parts = [one.ids or [self.unknown] for one in encoded]
            ids = [self.first, *(i for part in parts for i in part), self.separator]
            if not words or len(ids) > longest:
                raise ConfigError(
                    f"sentence {number}: {len(ids)} tokens of {len(words)} words, expected at most"
                    f" {longest} and one word; split it or raise longest"
                )
            large = [capitals and word[:1].isupper() for word in words]
            inner = [
                int(is_large) for is_large, part in zip(large, parts, strict=True) for _ in part
            ]
            examples.append(_example(ids, [0, *inner, 0]))
            starts.append(1 + np.cumsum([0, *map(len, parts[:-1])]))
        return examples, starts


def _example(ids: Sequence[int], types: Sequence[int]) -> Example:
    return {
        "ids": np.array(ids, np.int32),
        "types": np.array(types, np.int32),
        "keep": np.ones(len(ids), bool),
    }


def load_wordpiece(path: str | Path) -> WordPiece:
    """Reads a BERT tokenizer.json, or the one in a checkpoint's folder.

    Raises:
        ConfigError: absent, or something else.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; name a tokenizer.json or a folder with one")
    return parse_wordpiece(file.read_bytes(), str(file))


def parse_wordpiece(text: str | bytes, where: str) -> WordPiece:
    """Returns the tokenizer that the text of a BERT tokenizer.json describes.

    Args:
        text: JSON.
        where: what it is of, for errors.

    Raises:
        ConfigError: it is something else.
    """
    return WordPiece(open_tokenizer(text, where), where)


def train_wordpiece(texts: Sequence[str], size: int) -> WordPiece:
    """Trains an uncased WordPiece tokenizer of at most `size` ids.

    Raises:
        ConfigError: a size below 32.

    References:
        Wu et al. 2016, Google's Neural Machine Translation System, section 4.1.
    """
    if size < 32:
        raise ConfigError(f"tokenizer: {size} ids are too few; expected at least 32")
    normalizer, cut = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, cut
    # The trainer would number the pieces inside words in an order that differs between processes,
    # and break ties by these numbers; they are special tokens so that their ids are fixed.
    texts = [piece for text in texts for piece in in_short_words(text)]
    words = {
        word for text in texts for word, _ in cut.pre_tokenize_str(normalizer.normalize_str(text))
    }
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    backend.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=[*_SPECIAL, *inner], show_progress=False
        ),
        length=len(texts),
    )
    vocabulary = backend.get_vocab()
    # A new tokenizer, in which these pieces are not special tokens.
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.add_special_tokens(list(_SPECIAL))
    backend.normalizer, backend.pre_tokenizer = normalizer, cut
    separator, first = (("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    backend.post_processor = processors.BertProcessing(separator, first)
    return WordPiece(backend)
