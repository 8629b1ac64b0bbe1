"""Tokenizers: text to ids and back."""

from __future__ import annotations

import abc
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from mpjax.data.cache import Cache
from mpjax.data.tokenizers.bpe import SEPARATOR, TRAINING, train_bpe
from mpjax.data.tokenizers.special_ids import ids_around
from mpjax.data.tokenizers.tokenizer_file import build_tokenizer, tokenizer_errors
from mpjax.errors import ConfigError, printable
from mpjax.files import write_text
from mpjax.json_text import parse_json
from mpjax.typing import DType

logger = logging.getLogger("mpjax.data")

_MIN_BPE = 257  # every byte and the separator
# What published tokenizers call the token between documents.
_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_BATCH = 64  # documents encoded at once: bounds the memory of the intermediate objects


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
        name: what it is, as ``bytes`` or ``bpe:4096``.
        vocab_size: ids are 0 ... vocab_size - 1.
        separator: the id between documents; nothing in a text is ever encoded to it.
        prefix: ids that stand before every text, such as a Llama's BOS or BERT's [CLS], as the
            post-processor of a ``tokenizer.json`` says; empty for tokenizers that were made here.
        suffix: ids that stand behind every text, such as BERT's [SEP].

    Example:
        >>> tokenizer = make_tokenizer("bytes", [])
        >>> tokenizer.encode("hé")
        array([104, 195, 169], dtype=uint8)
        >>> tokenizer.decode([104, 195, 169])
        'hé'
        >>> Tokenizer.from_text(tokenizer.to_text()).name
        'bytes'
    """

    name: str
    vocab_size: int
    separator: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @property
    def dtype(self) -> DType:
        """The smallest unsigned dtype that holds every id."""
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """The ids of a text, shape (tokens,), without separator.

        Args:
            text: the text.
            special: whether `prefix` and `suffix` are around it, as a model expects of a whole
                text; False for a part that continues another.
        """
        ids = self.encode_batch([text])[0]
        return ids if special else ids[len(self.prefix) : len(ids) - len(self.suffix)]

    def prompt(self, text: str) -> np.ndarray:
        """The ids of a text that a model is to continue: behind `prefix`, without `suffix`."""
        ids = self.encode_batch([text])[0]
        return ids[: len(ids) - len(self.suffix)]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several whole texts, each as by `encode`."""

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids (a list or an array, shape (tokens,)); the separator shows as stored.

        Bytes that are not UTF-8, as a model may emit, become U+FFFD.

        Raises:
            ConfigError: an id outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ConfigError(
                f"tokenizer {self.name}: cannot decode id "
                f"{array.max() if array.min() >= 0 else array.min()}; expected 0 to "
                f"{self.vocab_size - 1}; use the tokenizer that the ids were made with"
            )
        return self._decode(array)

    def continuation(self, before: ArrayLike, ids: ArrayLike) -> str:
        """The text of ids that stand behind others, its first space included.

        A decoder of SentencePiece's kind drops the first space of what it is given.

        Args:
            before: ids, as of a prompt.
            ids: what follows them.

        Raises:
            ConfigError: an id outside the vocabulary.
        """
        both = np.concatenate([np.asarray(before, np.int64), np.asarray(ids, np.int64)])
        start, whole = self.decode(before), self.decode(both)
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    @abc.abstractmethod
    def _decode(self, ids: np.ndarray) -> str: ...

    @abc.abstractmethod
    def to_text(self) -> str:
        """JSON that recreates the tokenizer by `from_text`."""

    def save(self, path: str | Path) -> None:
        """Writes `to_text` to a file, which ``make_tokenizer(path, ...)`` reads."""
        write_text(path, self.to_text())

    @staticmethod
    def from_text(text: str) -> Tokenizer:
        """Recreates a tokenizer from `to_text`, or from Hugging Face's ``tokenizer.json``.

        Raises:
            ConfigError: text that is neither.
        """
        return _from_text(text, "tokenizer")


class _Bytes(Tokenizer):
    """UTF-8 bytes; byte 0, which no document holds, is the separator."""

    name, vocab_size, separator = "bytes", 256, 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def _decode(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode(errors="replace")

    def to_text(self) -> str:
        return '{"mpjax_tokenizer": "bytes"}'


class _HuggingFace(Tokenizer):
    """A tokenizer of the package ``tokenizers``, special tokens in texts taken as plain text."""

    def __init__(self, backend: tokenizers.Tokenizer, where: str):
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text, not a separator
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        known = [special[content] for content in _SEPARATORS if content in special]
        if not known:
            raise ConfigError(
                f"{where}: no token to put between documents (special tokens: "
                f"{', '.join(special) or 'none'}); add one of {', '.join(_SEPARATORS)}"
            )
        self._backend, self._where = backend, where
        self.separator = known[0]
        self.vocab_size = max(backend.get_vocab().values()) + 1  # ids may have holes
        self.name = f"{type(backend.model).__name__.lower()}:{self.vocab_size}"
        with tokenizer_errors(where):
            self.prefix, self.suffix = ids_around(backend)
        self._ends = [np.array(ids, self.dtype) for ids in (self.prefix, self.suffix)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            with tokenizer_errors(self._where):
                made = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            encoded += [np.array(one.ids, self.dtype) for one in made]
        if self.prefix or self.suffix:
            before, behind = self._ends
            encoded = [np.concatenate([before, ids, behind]) for ids in encoded]
        return encoded

    def _decode(self, ids: np.ndarray) -> str:
        with tokenizer_errors(self._where, "the tokenizer fails on these ids"):
            return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def to_text(self) -> str:
        return self._backend.to_str()


def make_tokenizer(
    spec: str, train_texts: Sequence[str], *, cache: Cache | None = None
) -> Tokenizer:
    """Makes the tokenizer that a spec asks for.

    Args:
        spec: ``bytes``; ``bpe:SIZE``, a byte-level BPE of at most SIZE ids (fewer when the text
            has no more pairs, then logged) trained on `train_texts`; or the path of a file that
            `Tokenizer.save` or Hugging Face's ``tokenizers`` wrote (a ``tokenizer.json``).
        train_texts: the training texts, and only these: held-out text must not shape the
            vocabulary. Read by ``bpe:SIZE`` only.
        cache: where a trained tokenizer is kept, by a hash of spec and texts; default folder when
            None.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: a malformed spec, a vocabulary below 257, a file that is absent or something
            else.

    Example:
        >>> make_tokenizer("bytes", []).vocab_size
        256

    References:
        Sennrich et al., Neural Machine Translation of Rare Words with Subword Units (2016), §3.2;
        Radford et al., Language Models are Unsupervised Multitask Learners (2019), §2.2 (on bytes).
    """
    if spec == "bytes":
        return _Bytes()
    if spec == "bpe" or spec.startswith(("bpe:", "bytes:")):
        match = re.fullmatch(r"bpe:([0-9]{1,6})", spec)
        if match is None:
            raise ConfigError(
                f"tokenizer {spec!r}: malformed; expected bytes, bpe:SIZE (bpe:4096) or a file"
            )
        if int(match[1]) < _MIN_BPE:
            raise ConfigError(
                f"tokenizer {spec!r}: vocabulary too small; expected at least {_MIN_BPE} "
                "(256 bytes and the separator), or bytes"
            )
        return _trained_bpe(int(match[1]), train_texts, cache or Cache())
    path = Path(spec).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"tokenizer {spec!r}: no such file; expected bytes, bpe:SIZE (bpe:4096) or a file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"tokenizer {printable(repr(spec), 500)}: cannot be read"
            f" ({printable(str(error), 200)}); name a tokenizer.json"
        ) from None
    return _from_text(text, f"tokenizer {spec!r}")


def _trained_bpe(size: int, texts: Sequence[str], cache: Cache) -> Tokenizer:
    key = hashlib.sha256(f"{TRAINING}, {size}".encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    name = f"{key.hexdigest()[:32]}.tokenizer.json"
    if found := cache.find(name):
        return Tokenizer.from_text(found.read_text(encoding="utf-8"))
    backend = train_bpe(size, texts)
    tokenizer = _HuggingFace(backend, f"tokenizer bpe:{size}")
    if tokenizer.vocab_size < size:
        logger.warning(
            "tokenizer bpe:%d: the text has pairs for %d ids only", size, tokenizer.vocab_size
        )
    cache.store(name, lambda file: file.write(tokenizer.to_text().encode()))
    return tokenizer


def _from_text(text: str, where: str) -> Tokenizer:
    fields = parse_json(text, where, "expected a tokenizer.json")
    if fields == {"mpjax_tokenizer": "bytes"}:
        return _Bytes()
    return _HuggingFace(build_tokenizer(fields, text, where, "save it again"), where)
