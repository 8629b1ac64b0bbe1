"""Corpus: a source of text as two streams of token ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mpjax.data.cache import Cache
from mpjax.data.split import split_documents
from mpjax.data.text import Document, read_documents
from mpjax.data.tokenizers.tokenizer import Tokenizer, make_tokenizer
from mpjax.errors import explains_calls
from mpjax.typing import Settings, Sources


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as token ids.

    Args:
        train: ids, shape (tokens,), in the tokenizer's dtype; read only.
        validation: the same for the held-out documents.
        tokenizer: what made the ids.
        info: source, tokenizer, held_out, sha256 (of the content of all documents), and
            documents and tokens on each side. JSON-able, equal when the data is equal.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    info: Settings


@explains_calls
def load_corpus(
    source: str,
    tokenizer: str | Tokenizer = "bytes",
    *,
    held_out: float = 0.05,
    column: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    sources: Sources[Iterable[tuple[str, str]]] | None = None,
) -> Corpus:
    """Reads a source, holds documents out, and encodes both sides.

    Documents are ordered by a hash of their content, so a stream depends on the texts alone, not
    on their names; each is followed by the tokenizer's separator, and where its `tokenizer.json`
    asks for tokens before a text, such as BOS, these stand before each document, not before the
    windows that a stream is cut into. Ids are cached by content, tokenizer and split, and mapped
    from the cache into memory from then on.

    Args:
        source: as `read_documents` takes it.
        tokenizer: as `make_tokenizer` takes it, or a tokenizer, as restored from a checkpoint.
        held_out: share of documents for validation, as `split_documents` takes it.
        column: the text column of tables.
        cache_dir: the cache folder; default ``$MPJAX_CACHE``, else ``mpjax`` in the XDG cache home.
        sources: further names of sources, as `read_documents` takes them.

    Returns:
        The corpus.

    Raises:
        ConfigError: as the functions above.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.txt")
        ...     _ = path.write_text("one\\ntwo\\n")
        ...     corpus = load_corpus(str(path), held_out=0.5, cache_dir=folder)
        ...     corpus.tokenizer.decode(corpus.train), corpus.tokenizer.decode(corpus.validation)
        ('one\\n\\x00', 'two\\n\\x00')
    """
    cache = Cache(cache_dir)
    documents = read_documents(source, column=column, sources=sources)
    train, validation = split_documents(documents, held_out)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, [document.text for document in train], cache=cache)
    content = hashlib.sha256(b"".join(sorted(document.digest for document in documents)))
    settings = f"{held_out!r} {tokenizer.to_text()}"
    if tokenizer.prefix or tokenizer.suffix:
        settings += f" {tokenizer.prefix} {tokenizer.suffix}"
    key = hashlib.sha256(content.digest() + settings.encode())
    ids = [
        _cached(f"{key.hexdigest()[:32]}.{side}.npy", part, tokenizer, cache)
        for side, part in (("train", train), ("validation", validation))
    ]
    info = {
        "source": source,
        "tokenizer": tokenizer.name,
        "held_out": held_out,
        "sha256": content.hexdigest(),
        "train_documents": len(train),
        "validation_documents": len(validation),
        "train_tokens": len(ids[0]),
        "validation_tokens": len(ids[1]),
    }
    return Corpus(ids[0], ids[1], tokenizer, info)


def _cached(name: str, documents: list[Document], tokenizer: Tokenizer, cache: Cache) -> np.ndarray:
    """The ids of documents, from the cache if it has them."""
    if path := cache.find(name):
        return np.asarray(np.load(path, mmap_mode="r"))  # a plain view indexes faster than a memmap
    # The split uses the first half of the digest, the order the second.
    ordered = sorted(documents, key=lambda document: document.digest[16:])
    ended = tokenizer.suffix[-1:] == (tokenizer.separator,)  # the suffix ends with the separator
    separator = np.array([] if ended else [tokenizer.separator], tokenizer.dtype)
    pieces = tokenizer.encode_batch([document.text for document in ordered])
    ids = np.concatenate([part for piece in pieces for part in (piece, separator)])
    cache.store(name, lambda file: np.save(file, ids))
    ids.flags.writeable = False  # like a mapped array
    return ids
