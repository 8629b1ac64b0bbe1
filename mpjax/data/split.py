"""Held-out split: which documents are never trained on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from mpjax.data.text import Document
from mpjax.errors import ConfigError

logger = logging.getLogger("mpjax.data")
_Name = TypeVar("_Name", bound=Hashable)


def split_documents(
    documents: list[Document], fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    r"""Splits documents into training and held-out ones by a hash of their content.

    A document is held out when $h(\text{content}) < \text{fraction}$, $h$ uniform in [0, 1). So
    identical documents land on the same side (no leakage), and a document keeps its side when
    others come or go. Each side gets at least one document: when the hash leaves one side empty,
    the content nearest the border moves there. When all documents are one content, that text is
    cut in two: the tail, its last `fraction` of characters from a line start, is held out.

    Args:
        documents: at least one document.
        fraction: expected share of documents held out, between 0 and 1.

    Returns:
        (training documents, held-out documents), each in the given order.

    Raises:
        ConfigError: a fraction outside (0, 1), or a text too short to be cut.

    Example:
        >>> train, held = split_documents([Document(str(i), f"text {i}") for i in range(100)], 0.1)
        >>> len(train), len(held)
        (88, 12)
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"held_out={fraction}: expected a fraction above 0 and below 1, as 0.05")
    positions = {document.digest: _uniform(document.digest) for document in documents}
    if len(positions) == 1:
        if len(documents) > 1:
            logger.warning("%d identical documents: one is kept and cut", len(documents))
        return _cut(documents[0], fraction)
    held = _held(positions, fraction)
    train = [document for document in documents if document.digest not in held]
    return train, [document for document in documents if document.digest in held]


def _cut(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    if len(text) < 2:
        raise ConfigError(
            f"{document.name}: {len(text)} character(s) cannot be split into training and held-out "
            "text; name a longer text"
        )
    aim = min(max(round(len(text) * (1.0 - fraction)), 1), len(text) - 1)
    # Cut at the last line end before the aim, else at the first after it, else at the aim.
    border = text.rfind("\n", 0, aim) + 1 or text.find("\n", aim, len(text) - 1) + 1 or aim
    head = Document(f"{document.name} (head)", text[:border])
    tail = Document(f"{document.name} (tail)", text[border:])
    return [head], [tail]


def held_out(contents: Sequence[str], fraction: float = 0.1, *, seed: int = 0) -> np.ndarray:
    r"""Chooses which of several texts are held out, by a hash of seed and content.

    A text is held out when $h(\text{seed}, \text{content}) < \text{fraction}$, $h$ uniform in
    [0, 1): equal texts land on the same side, and a text keeps its side when others come or go.
    When that leaves one side empty, the text nearest the border moves there.

    Args:
        contents: what identifies each example.
        fraction: expected share held out, between 0 and 1.
        seed: another one gives another split.

    Returns:
        bool, shape (examples,).

    Raises:
        ConfigError: a fraction outside (0, 1), or all contents are one.

    Example:
        >>> held_out(["a", "b", "a", "c"], 0.5).tolist()
        [True, False, True, True]
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"held_out={fraction}: expected a fraction above 0 and below 1, as 0.05")
    positions = {
        content: _uniform(hashlib.sha256(f"{seed}\0{content}".encode()).digest())
        for content in dict.fromkeys(contents)
    }
    if len(positions) < 2:
        raise ConfigError(
            f"held_out={fraction}: all {len(contents)} examples are one text, on one side; name"
            " more examples"
        )
    held = _held(positions, fraction)
    return np.array([content in held for content in contents], bool)


def _held(positions: Mapping[_Name, float], fraction: float) -> set[_Name]:
    """What lies below a border; where that leaves one side empty, the nearest one moves there."""
    held = {name for name, position in positions.items() if position < fraction}
    if not held:
        return {min(positions, key=positions.__getitem__)}
    if len(held) == len(positions):
        held.remove(max(positions, key=positions.__getitem__))
    return held


def _uniform(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2.0**64


def stratified(
    contents: Sequence[str], classes: Sequence[str], fraction: float = 0.1, *, seed: int = 0
) -> np.ndarray:
    r"""Chooses which of several texts are held out, the same share of each class.

    In each class the texts are ordered by a hash of seed and content, and the first
    $\mathrm{round}(\text{fraction} \cdot n)$ of its $n$ examples are held out, at least one of two.
    Equal texts stay together, in the class of the first.

    Args:
        contents: what identifies each example.
        classes: of each example.
        fraction: share held out, between 0 and 1.
        seed: another one gives another split.

    Returns:
        bool, shape (examples,).

    Raises:
        ConfigError: a fraction outside (0, 1), or one side stays empty.

    Example:
        >>> stratified(list("abcdefgh"), list("xxxxyyyy"), 0.25).tolist().count(True)
        2
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"held_out={fraction}: expected a fraction above 0 and below 1, as 0.1")
    groups: dict[str, list[int]] = {}
    for place, content in enumerate(contents):
        groups.setdefault(content, []).append(place)
    by_class: dict[str, list[tuple[bytes, list[int]]]] = {}
    for content, places in groups.items():
        order = hashlib.sha256(f"{seed}\0{content}".encode()).digest()
        by_class.setdefault(classes[places[0]], []).append((order, places))
    chosen = np.zeros(len(contents), bool)
    for found in by_class.values():
        count = sum(len(places) for _, places in found)
        left = max(round(fraction * count), 1)
        for _, places in sorted(found)[: len(found) - 1]:  # one text of each class is trained on
            if left <= 0:
                break
            chosen[places] = True
            left -= len(places)
    if not 0 < chosen.sum() < len(chosen):
        raise ConfigError(
            f"held_out={fraction}: all {len(chosen)} examples are on one side; name more examples"
        )
    return chosen
