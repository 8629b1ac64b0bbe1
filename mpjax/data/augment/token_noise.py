"""Noise on encoded texts: tokens are dropped or masked, special ones and padding never."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mpjax.data.augment.transform import check_rate
from mpjax.data.buckets import Example
from mpjax.data.tokenizers.wordpiece import WordPiece
from mpjax.errors import ConfigError


def text_places(example: Example, pieces: WordPiece, where: str) -> np.ndarray:
    """Returns the places of an example's tokens that are text, not special and not padding.

    Raises:
        ConfigError: no `ids`, or no token of text.
    """
    if "ids" not in example:
        raise ConfigError(f"{where}: the example holds {' '.join(example)}; give one with ids")
    ids = np.asarray(example["ids"])
    text = ~np.isin(ids, [pieces.pad, pieces.first, pieces.separator])
    if "keep" in example:
        text &= np.asarray(example["keep"]).astype(bool)
    if not text.any():
        raise ConfigError(f"{where}: an example without a token of text; leave it out")
    return np.flatnonzero(text)


def _chosen(places: np.ndarray, rate: float, draw: np.random.Generator) -> np.ndarray:
    """Each place with a probability; one is never chosen."""
    chosen = draw.random(len(places)) < rate
    if chosen.all():
        chosen[draw.integers(len(places))] = False
    return places[chosen]


@dataclass(frozen=True)
class TokenDropout:
    """Each token of text leaves an encoded text with a probability; one stays at least.

    All fields that have an entry a token lose it, such as the label of a dropped token.

    Args:
        rate: the probability.
        pieces: tokenizer, whose special ids stay.

    Raises:
        ConfigError: a rate out of range; when called, an example without text.

    Example:
        >>> from mpjax.data import train_wordpiece
        >>> pieces = train_wordpiece(["the food was good"], 60)
        >>> example = pieces.encode(["the food was good"], longest=8)[0]
        >>> dropped = TokenDropout(0.4, pieces)(example, np.random.default_rng(1))
        >>> pieces.tokens(dropped["ids"])
        ['[CLS]', 'the', 'food', 'good', '[SEP]']

    References:
        Iyyer et al. 2015, Deep Unordered Composition Rivals Syntactic Methods for Text
        Classification, section 3.1 (word dropout).
    """

    rate: float
    pieces: WordPiece = field(repr=False)

    def __post_init__(self) -> None:
        check_rate("TokenDropout", "rate", self.rate)

    def __call__(self, example: Example, draw: np.random.Generator) -> Example:
        places = text_places(example, self.pieces, "TokenDropout")
        stays = np.ones(len(example["ids"]), bool)
        stays[_chosen(places, self.rate, draw)] = False
        return {
            name: np.asarray(value)[stays] if np.ndim(value) else value
            for name, value in example.items()
        }


@dataclass(frozen=True)
class TokenMasking:
    """Each token of text becomes the mask token with a probability; one stays at least.

    Args:
        rate: the probability.
        pieces: tokenizer, whose special ids stay.

    Raises:
        ConfigError: a rate out of range; when called, an example without text.

    Example:
        >>> from mpjax.data import train_wordpiece
        >>> pieces = train_wordpiece(["the food was good"], 60)
        >>> example = pieces.encode(["the food was good"], longest=8)[0]
        >>> masked = TokenMasking(0.4, pieces)(example, np.random.default_rng(1))
        >>> pieces.tokens(masked["ids"])
        ['[CLS]', 'the', 'food', '[MASK]', 'good', '[SEP]']

    References:
        Xie et al. 2017, Data Noising as Smoothing in Neural Network Language Models, section 3.2
        (blank noising).
    """

    rate: float
    pieces: WordPiece = field(repr=False)

    def __post_init__(self) -> None:
        check_rate("TokenMasking", "rate", self.rate)

    def __call__(self, example: Example, draw: np.random.Generator) -> Example:
        places = text_places(example, self.pieces, "TokenMasking")
        ids = np.array(example["ids"])
        ids[_chosen(places, self.rate, draw)] = self.pieces.mask
        return {**example, "ids": ids}
