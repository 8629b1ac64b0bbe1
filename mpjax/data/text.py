"""Documents: where the text comes from."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from mpjax.data.tables import readers
from mpjax.errors import ConfigError
from mpjax.typing import Sources

logger = logging.getLogger("mpjax.data")

# Installed packages and test suites, below the folder of the standard library.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
# Written when Python is built, so they differ between machines.
_BUILD_RECORDS = ("config-", "_sysconfigdata")
_HEAD_BYTES = 8192  # searched for NUL before a whole file is read


@dataclass(frozen=True)
class Document:
    """One text: a file, or a row of a table.

    Args:
        name: where it came from, relative to the source.
        text: the text, never empty, without NUL characters.

    Example:
        >>> Document("a.txt", "hello").digest.hex()[:8]
        '2cf24dba'
    """

    name: str
    text: str

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the text as UTF-8, the identity of the content whatever its name."""
        return hashlib.sha256(self.text.encode()).digest()


def read_documents(
    source: str,
    *,
    column: str | None = None,
    sources: Sources[Iterable[tuple[str, str]]] | None = None,
) -> list[Document]:
    """Reads every document of a source, in a fixed order.

    Empty documents are dropped, and counted in one logged line (logger ``mpjax.data``), as are
    the binary files of a directory.

    Args:
        source: one of

            * ``stdlib``: the source of Python's own standard library, without tests;
            * one of `sources`;
            * a text file (UTF-8), one document;
            * a ``.jsonl`` or ``.parquet`` file, one document a row; ``FILE:column`` names the
              column;
            * a directory, read recursively in sorted order: text files, and ``.jsonl`` and
              ``.parquet`` by row; binary files, hidden files and hidden folders are left out;
            * ``hf:NAME[:config][:column]``: the ``train`` split of a Hugging Face data set
              (needs the ``hub`` extra).
        column: the text column of tables; ``text`` unless named here or in the source.
        sources: name -> a function that returns (name, text) of each document.

    Returns:
        The documents, at least one.

    Raises:
        ConfigError: data that is missing, empty, binary or unreadable, or has no such column.

    Example:
        >>> names = [d.name for d in read_documents("stdlib")]
        >>> "json/decoder.py" in names, any("site-packages" in n for n in names)
        (True, False)
    """
    if source == "stdlib":
        documents, tables = _read_stdlib(), False
    elif sources and source in sources:
        documents, tables = [Document(name, text) for name, text in sources[source]()], False
    elif source.startswith("hf:"):
        rows, tables = readers.read_hub(source, column), True
        documents = [_row_document(source, name, value) for name, value in rows]
    else:
        path, column = _locate(source, column, sources or ())
        if path.is_dir():
            documents, tables = _read_directory(path, column)
        elif path.is_file():
            tables = path.suffix.lower() in readers.SUFFIXES
            documents = _read_file(path, path.name, column)
        else:
            raise ConfigError(
                f"{path}: neither a regular file nor a directory; copy the text to a file first"
            )
    if column is not None and not tables:
        raise ConfigError(
            f"{source}: column {column!r} was asked for, but there is no .jsonl or .parquet file "
            "here; drop the column"
        )
    full = [document for document in documents if document.text]
    if not full:
        raise ConfigError(f"{source}: no text in it; name a source that holds some UTF-8 text")
    if len(full) < len(documents):
        logger.warning("%s: %d empty document(s) dropped", source, len(documents) - len(full))
    return full


def _locate(source: str, column: str | None, known: Iterable[str]) -> tuple[Path, str | None]:
    """Splits ``FILE:column``; a path that exists as written is taken whole."""
    path = Path(source).expanduser()
    head, colon, tail = source.rpartition(":")
    try:
        if source and path.exists():
            return path, column
        if colon and tail and head and Path(head).expanduser().exists():
            if column not in (None, tail):
                raise ConfigError(
                    f"{source}: names column {tail!r}, but the column setting is {column!r}; "
                    "drop one of the two"
                )
            return Path(head).expanduser(), tail
    except OSError as error:  # a name too long, or a folder without permission
        _unreadable(path, error)
    raise ConfigError(
        f"data {source!r}: no such file or directory; expected {', '.join(['stdlib', *known])}, a "
        "file, a directory, FILE:column or hf:NAME"
    )


def _read_stdlib() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = (name for name in _walk(root, _NOT_STDLIB)
             if name.endswith(".py") and not name.startswith(_BUILD_RECORDS))  # fmt: skip
    documents, _ = _read_files(root, names, "stdlib", None)
    return [document for document in documents if document.text]  # empty __init__.py: expected


def _read_directory(root: Path, column: str | None) -> tuple[list[Document], bool]:
    def regular(name: str) -> bool:  # no pipe, socket or dangling link
        try:
            return (root / name).is_file()
        except OSError as error:
            _unreadable(root / name, error)

    return _read_files(root, filter(regular, _walk(root)), str(root), column)


def _read_files(
    root: Path, names: Iterable[str], source: str, column: str | None
) -> tuple[list[Document], bool]:
    """The documents of some files of a folder, and whether there was a table among them."""
    documents: list[Document] = []
    skipped, tables = 0, False
    for name in names:
        if (root / name).suffix.lower() in readers.SUFFIXES:
            tables = True
            documents += _read_file(root / name, name, column)
        elif (text := _read_text(root / name)) is None:
            skipped += 1
        else:
            documents.append(Document(name, text))
    if skipped:
        logger.warning("%s: %d binary file(s) skipped (NUL bytes or not UTF-8)", source, skipped)
    return documents, tables


def _read_file(path: Path, name: str, column: str | None) -> list[Document]:
    if path.suffix.lower() in readers.SUFFIXES:
        rows = readers.read_table(path, name, column)
        return [_row_document(str(path), row, value) for row, value in rows]
    text = _read_text(path)
    if text is None:
        raise ConfigError(
            f"{path}: expected UTF-8 text, found binary data (NUL bytes or invalid UTF-8); "
            "name a text file or convert it to UTF-8"
        )
    return [Document(name, text)]


def _row_document(source: str, name: str, value: object) -> Document:
    """Checks one cell of a table; null counts as empty."""
    if value is None:
        return Document(name, "")
    if not isinstance(value, str):
        raise ConfigError(
            f"{source}: row {name} holds {type(value).__name__} where text was expected; "
            "name a text column (FILE:column)"
        )
    if re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(
            f"{source}: row {name} holds a NUL character or half a surrogate pair; clean the row"
        )
    return Document(name, value)


def _read_text(path: Path) -> str | None:
    """The text of a file as stored, without a byte order mark; None when it is binary."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEAD_BYTES)
            if b"\0" in data:
                return None
            data += file.read()
    except OSError as error:
        _unreadable(path, error)
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError:
        return None


def _walk(root: Path, leave_out: Set[str] = frozenset()) -> Iterator[str]:
    """Names of all files under `root` relative to it, sorted; not the hidden, not `leave_out`."""
    names = []
    for folder, subfolders, files in os.walk(root, onerror=lambda e: _unreadable(root, e)):
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and n not in leave_out]
        here = Path(folder).relative_to(root)
        names += [(here / name).as_posix() for name in files if not name.startswith(".")]
    return iter(sorted(names))


def _unreadable(path: Path, error: OSError) -> NoReturn:
    raise ConfigError(
        f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions"
    ) from None
