"""Edits of words: swap, deletion, insertion and replacement by synonyms, of texts and sentences.

A record is a text, whose words are separated by spaces, or a tagged sentence, (word, tag) pairs.
Tags follow their words, and those of entities stay valid BIO (B-X begins an entity, I-X continues
it, O is outside).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import numpy as np

from mpjax.data.augment.synonyms import Synonyms, check_synonyms
from mpjax.data.augment.transform import OneOf, check_rate
from mpjax.data.tagged import Sentence
from mpjax.errors import ConfigError, brief

Record = TypeVar("Record", str, Sentence)
Pairs = list[tuple[str, str]]  # words and their tags; those of a text are ""

OUTSIDE = "O"  # tag of words that are of no entity


def words_of(record: str | Sentence) -> Pairs:
    """Returns the words of a record with their tags.

    Raises:
        ConfigError: a text or sentence without words, or something else.
    """
    if isinstance(record, str):
        pairs = [(word, "") for word in record.split()]
    elif isinstance(record, list | tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in record
    ):
        pairs = list(record)
    else:
        raise ConfigError(
            f"augment: {brief(record)} is no record of words; give a text, or (word, tag) pairs"
        )
    if not pairs:
        raise ConfigError(f"augment: the text {brief(record)} has no words; leave it out")
    return pairs


def _edited(
    record: Record,
    rate: float,
    draw: np.random.Generator,
    edit: Callable[[Pairs, int, np.random.Generator], Pairs],
) -> Record:
    """A record whose words are edited `rate` times their number, at least once."""
    pairs = words_of(record)
    if not rate or (new := edit(list(pairs), max(1, int(rate * len(pairs))), draw)) == pairs:
        return record
    return " ".join(word for word, _ in new) if isinstance(record, str) else tuple(new)


def _in_entity(tag: str) -> bool:
    return tag.startswith(("B-", "I-"))


@dataclass(frozen=True)
class RandomSwap:
    r"""Two words change places, $n = \max(1, \lfloor \alpha l \rfloor)$ times in $l$ words.

    Words of entities stay where they are; others take their tags along.

    Args:
        rate: $\alpha$.

    Raises:
        ConfigError: a rate out of range; when called, a record without words.

    Example:
        >>> RandomSwap(0.1)("the food was good", np.random.default_rng(0))
        'the food good was'

    References:
        Wei and Zou 2019, EDA, section 2 (RS).
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        check_rate("RandomSwap", "rate", self.rate)

    def __call__(self, record: Record, draw: np.random.Generator) -> Record:
        return _edited(record, self.rate, draw, self._edit)

    def _edit(self, pairs: Pairs, count: int, draw: np.random.Generator) -> Pairs:
        places = [i for i, (_, tag) in enumerate(pairs) if not _in_entity(tag)]
        if len(places) > 1:
            for _ in range(count):
                i, j = (places[k] for k in draw.choice(len(places), 2, replace=False))
                pairs[i], pairs[j] = pairs[j], pairs[i]
        return pairs


@dataclass(frozen=True)
class RandomDeletion:
    """Each word is deleted with a probability; one stays at least.

    A word takes its tag along; where the first word of an entity goes, the next one begins it.

    Args:
        rate: the probability.

    Raises:
        ConfigError: a rate out of range; when called, a record without words.

    Example:
        >>> delete = RandomDeletion(0.4)
        >>> delete("the food was good", np.random.default_rng(1))
        'the food good'
        >>> delete((("New", "B-city"), ("York", "I-city")), np.random.default_rng(8))
        (('York', 'B-city'),)

    References:
        Wei and Zou 2019, EDA, section 2 (RD).
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        check_rate("RandomDeletion", "rate", self.rate)

    def __call__(self, record: Record, draw: np.random.Generator) -> Record:
        return _edited(record, self.rate, draw, self._edit)

    def _edit(self, pairs: Pairs, count: int, draw: np.random.Generator) -> Pairs:
        stays = draw.random(len(pairs)) >= self.rate
        if not stays.any():
            stays[draw.integers(len(pairs))] = True
        found: Pairs = []
        headless = ""  # the kind of an entity whose words so far are all deleted
        for (word, tag), stay in zip(pairs, stays, strict=True):
            if tag != f"I-{headless}":
                headless = ""
            if not stay:
                headless = tag[2:] if tag.startswith("B-") else headless
                continue
            found.append((word, f"B-{headless}" if headless else tag))
            headless = ""
        return found


@dataclass(frozen=True)
class SynonymReplacement:
    r"""$n = \max(1, \lfloor \alpha l \rfloor)$ of $l$ words are replaced by synonyms of theirs.

    Words are looked up in lower case without the punctuation around them, which stays, as do a
    capital and the tag. A text without a word of the list stays as it is.

    Args:
        rate: $\alpha$.
        synonyms: word -> its synonyms, such as `read_synonyms` returns.

    Raises:
        ConfigError: a rate out of range, a list without words or a word without synonyms; when
            called, a record without words.

    Example:
        >>> replace = SynonymReplacement(0.1, {"good": ["tasty"]})
        >>> replace("Good, but cold.", np.random.default_rng(0))
        'Tasty, but cold.'

    References:
        Wei and Zou 2019, EDA, section 2 (SR); Zhang et al. 2015, Character-level Convolutional
        Networks for Text Classification, section 2.4.
    """

    rate: float
    synonyms: Synonyms = field(repr=False)

    def __post_init__(self) -> None:
        check_rate("SynonymReplacement", "rate", self.rate)
        known = check_synonyms("SynonymReplacement", self.synonyms)
        object.__setattr__(self, "synonyms", known)

    def __call__(self, record: Record, draw: np.random.Generator) -> Record:
        return _edited(record, self.rate, draw, self._edit)

    def _edit(self, pairs: Pairs, count: int, draw: np.random.Generator) -> Pairs:
        places = [i for i, (word, _) in enumerate(pairs) if _parts(word)[1] in self.synonyms]
        count = min(count, len(places))
        for k in draw.choice(len(places), count, replace=False) if count else ():
            word, tag = pairs[places[k]]
            pairs[places[k]] = (_synonym(word, self.synonyms, draw), tag)
        return pairs


@dataclass(frozen=True)
class RandomInsertion:
    r"""A synonym of a word comes to a random place, $n = \max(1, \lfloor \alpha l \rfloor)$ times.

    In a tagged sentence it gets the tag O, and never stands inside an entity. A text without a word
    of the list stays as it is.

    Args:
        rate: $\alpha$.
        synonyms: as of `SynonymReplacement`.

    Raises:
        ConfigError: as `SynonymReplacement`.

    Example:
        >>> insert = RandomInsertion(0.1, {"good": ["tasty"]})
        >>> insert("the food was good", np.random.default_rng(5))
        'the food was tasty good'

    References:
        Wei and Zou 2019, EDA, section 2 (RI).
    """

    rate: float
    synonyms: Synonyms = field(repr=False)
    inserts: ClassVar[bool] = True  # words whose tag is O

    def __post_init__(self) -> None:
        check_rate("RandomInsertion", "rate", self.rate)
        known = check_synonyms("RandomInsertion", self.synonyms)
        object.__setattr__(self, "synonyms", known)

    def __call__(self, record: Record, draw: np.random.Generator) -> Record:
        return _edited(record, self.rate, draw, self._edit)

    def _edit(self, pairs: Pairs, count: int, draw: np.random.Generator) -> Pairs:
        cores = [_parts(word)[1] for word, _ in pairs]
        known = [core for core in cores if core in self.synonyms]
        outside = OUTSIDE if pairs[0][1] else ""
        for _ in range(count if known else 0):
            core = _drawn(known, draw)
            new = _drawn(self.synonyms[core], draw)
            after = [tag for _, tag in pairs[1:]] + [outside]
            places = [0, *(i for i, tag in enumerate(after, 1) if not tag.startswith("I-"))]
            pairs.insert(places[draw.integers(len(places))], (new, outside))
        return pairs


def eda(synonyms: Synonyms, rate: float = 0.1, share: float = 1.0) -> OneOf:
    """Returns easy data augmentation: synonyms, insertion, swap or deletion for each record.

    Args:
        synonyms: as of `SynonymReplacement`.
        rate: of each.
        share: of the records that are changed.

    Raises:
        ConfigError: as `SynonymReplacement` and `OneOf`.

    Example:
        >>> change = eda({"good": ["tasty"]})
        >>> [change("the food was good", np.random.default_rng(i)) for i in (8, 10)]
        ['the food was tasty', 'the tasty food was good']

    References:
        Wei and Zou 2019, EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
        Classification Tasks, section 2.
    """
    edits: Sequence[Callable[..., object]] = (
        SynonymReplacement(rate, synonyms), RandomInsertion(rate, synonyms),
        RandomSwap(rate), RandomDeletion(rate),
    )  # fmt: skip
    return OneOf(edits, share)


def _drawn(words: Sequence[str], draw: np.random.Generator) -> str:
    return words[int(draw.integers(len(words)))]


def _parts(word: str) -> tuple[str, str, str]:
    """Punctuation before a word, the word in lower case, and punctuation after it."""
    inner = [i for i, letter in enumerate(word) if letter.isalnum()]
    if not inner:
        return word, "", ""
    first, end = inner[0], inner[-1] + 1
    return word[:first], word[first:end].casefold(), word[end:]


def _synonym(word: str, synonyms: Synonyms, draw: np.random.Generator) -> str:
    before, core, after = _parts(word)
    new = _drawn(synonyms[core], draw)
    own = word[len(before) : len(word) - len(after)]
    if own[:1].isupper():
        new = new.upper() if own.isupper() and len(own) > 1 else new[:1].upper() + new[1:]
    return before + new + after
