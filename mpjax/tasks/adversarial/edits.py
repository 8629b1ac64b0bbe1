"""Small changes of texts that leave a reader their meaning: of characters and of words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Edit: TypeAlias = Callable[[str, int, np.random.Generator], str]  # text, how many, draws -> text


def edit_characters(text: str, count: int, draw: np.random.Generator) -> str:
    """Returns a text with typing errors: two letters swapped, one left out, or one typed twice.

    Each is inside a word of four letters or more, drawn anew; a text without one stays as it is.

    Args:
      text: words with spaces between.
      count: errors.
      draw: what is drawn from.

    Example:
      >>> edit_characters("a lovely taste", 1, np.random.default_rng(0))
      'a lovely tate'
    """
    words = text.split(" ")
    long = [place for place, word in enumerate(words) if len(word) >= 4]
    for _ in range(count if long else 0):
        place = long[draw.integers(len(long))]
        word, kind = words[place], draw.integers(3)
        if len(word) < 4:  # letters were left out before
            continue
        at = int(draw.integers(1, len(word) - 2))
        middle = (word[at + 1] + word[at], word[at + 1], word[at] + word[at : at + 2])[kind]
        words[place] = word[:at] + middle + word[at + 2 :]
    return " ".join(words)


def edit_words(text: str, count: int, draw: np.random.Generator) -> str:
    """Returns a text with two neighbouring words swapped, one left out, or one written twice.

    The last word is never left out.

    Args:
      text: words with spaces between.
      count: changes.
      draw: what is drawn from.

    Example:
      >>> edit_words("not bad at all", 1, np.random.default_rng(0))
      'not bad all'
    """
    words = text.split(" ")
    for _ in range(count):
        if len(words) < 2:
            break
        at, kind = int(draw.integers(len(words) - 1)), draw.integers(3)
        words[at : at + 2] = (
            [words[at + 1], words[at]], [words[at + 1]], [words[at], *words[at : at + 2]],
        )[kind]  # fmt: skip
    return " ".join(words)


EDITS: dict[str, Edit] = {"character": edit_characters, "word": edit_words}
