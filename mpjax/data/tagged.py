"""Sentences with a tag a word, from a file or a source of the caller's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpjax.data.class_names import places_in, sorted_names
from mpjax.data.split import held_out
from mpjax.data.tables.cells import check_first, header_of, layout, read_cells
from mpjax.data.tables.rows import one_of_sources, say_counts
from mpjax.errors import ConfigError
from mpjax.typing import Sources

_HELD_OUT = 0.1
MARK = "-DOCSTART-"  # CoNLL's between documents
_FIELDS = ("word", "tag")

Sentence = tuple[tuple[str, str], ...]  # (word, tag) pairs


@dataclass(frozen=True)
class TaggedSentences:
    """Sentences as words, and a tag for each word.

    Args:
        words: of each sentence, at least one.
        tags: of each sentence, int32, one a word, indices into `names`.
        names: of the tags; sorted, where `load_tagged` made it.
    """

    words: tuple[tuple[str, ...], ...]
    tags: tuple[np.ndarray, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @property
    def word_count(self) -> int:
        """Words of all sentences."""
        return sum(map(len, self.words))

    def ordered(self, names: Sequence[str]) -> TaggedSentences:
        """The same sentences with their tags in another order, as a checkpoint has them.

        Args:
            names: of tags, such as `model.config.labels`; there may be more than the data has.

        Raises:
            ConfigError: a tag of the data is not among them.
        """
        if tuple(names) == self.names:
            return self
        places = places_in(self.names, names, "tags")
        return TaggedSentences(self.words, tuple(places[t] for t in self.tags), tuple(names))


def load_tagged(
    source: str, *, seed: int = 0, sources: Sources[Sequence[Sentence]] | None = None
) -> tuple[TaggedSentences, TaggedSentences]:
    """Loads tagged sentences as a training and a held-out side that share no sentence.

    Of sentences with equal words the first is kept; 10 % are held out, by a hash of seed and words.
    What is left out, as are the marks ``-DOCSTART-``, is counted in one logged line.

    Args:
        source: one of `sources`, or a file of ``word<TAB>tag`` lines, or ``.csv``, with a blank
            line after each sentence and perhaps the header ``word<TAB>tag``.
        seed: of the split.
        sources: name -> a function that returns the sentences, each of (word, tag) pairs.

    Returns:
        (training, held out), with the same names of tags.

    Raises:
        ConfigError: a file or line that cannot be read, one tag only,
            or a tag that is only held out.
    """
    sources = sources or {}
    if source in sources:
        found = sources[source]()
    elif Path(source).is_file():
        found = read_sentences(Path(source))
    else:
        what = one_of_sources(sources, "a file of word<TAB>tag lines")
        raise ConfigError(f"data {source!r}: no such source or file; {what}")
    sentences = [s for s in found if _words(s) != (MARK,)]
    first: dict[tuple[str, ...], Sentence] = {}
    for sentence in sentences:
        first.setdefault(_words(sentence), sentence)
    distinct = list(first.values())
    out = held_out([" ".join(_words(s)) for s in distinct], _HELD_OUT, seed=seed)
    train = [s for s, one in zip(distinct, out, strict=True) if not one]
    test = [s for s, one in zip(distinct, out, strict=True) if one]
    in_training = {tag for s in train for _, tag in s}
    names = sorted_names(in_training | {tag for s in test for _, tag in s})
    if len(names) < 2:
        raise ConfigError(f"data {source!r}: one tag, {names[0]!r}; expected at least two")
    dropped = {MARK: len(found) - len(sentences)}
    dropped["equal to an earlier one"] = len(sentences) - len(distinct)
    say_counts(source, "sentences", {"for training": len(train), "held out": len(test)}, dropped)
    return as_tagged(train, names), as_tagged(test, names)


def most_frequent_tags(train: TaggedSentences, test: TaggedSentences) -> list[np.ndarray]:
    """The baseline: each word's most frequent tag in training, and for others the commonest tag."""
    counts: dict[str, Counter[int]] = {}
    overall: Counter[int] = Counter()
    for words, tags in zip(train.words, train.tags, strict=True):
        for word, tag in zip(words, tags.tolist(), strict=True):
            counts.setdefault(word, Counter())[tag] += 1
            overall[tag] += 1
    common = overall.most_common(1)[0][0]
    best = {word: count.most_common(1)[0][0] for word, count in counts.items()}
    return [np.array([best.get(w, common) for w in words], np.int32) for words in test.words]


def _words(sentence: Sentence) -> tuple[str, ...]:
    return tuple(word for word, _ in sentence)


def read_sentences(path: Path, *, header: bool = True) -> list[Sentence]:
    """Reads the sentences of a file as `load_tagged` takes it.

    Args:
        path: the file.
        header: whether its first line may be a header.

    Raises:
        ConfigError: a file or line that cannot be read.
    """
    where = f"data {str(path)!r}"
    rows = read_cells(path, _FIELDS)
    first = next(row for row in rows if not row.blank)
    named = header_of(first, _FIELDS, (), where) if header else {}
    width = len(first.cells) if named else len(_FIELDS)
    places = [named.get(name, place) for place, name in enumerate(_FIELDS)]
    sentences: list[Sentence] = []
    current: list[tuple[str, str]] = []
    for row in rows:
        if named and row is first:
            continue
        if row.blank:
            sentences += [tuple(current)] if current else []
            current = []
            continue
        word, tag = (row.cells[i] if i < len(row.cells) else "" for i in places)
        if len(row.cells) != width or not (word.strip() and tag.strip()):
            raise ConfigError(
                f"{where}, line {row.line}: {' '.join(row.cells)[:40]!r}; expected"
                f" {layout(path, _FIELDS)}, or a blank line after a sentence"
            )
        current.append((word, tag.strip()))
    sentences += [tuple(current)] if current else []
    if not sentences:
        raise ConfigError(f"{where}: no sentence; expected {layout(path, _FIELDS)} lines")
    if header and not named:
        tags = [tag for sentence in sentences for _, tag in sentence]
        check_first(tags, "tag", _FIELDS, f"{where}, line {first.line}")
    return sentences


def as_tagged(sentences: Sequence[Sentence], names: tuple[str, ...]) -> TaggedSentences:
    """Returns sentences with their tags as places among names."""
    number = {name: i for i, name in enumerate(names)}
    tags = tuple(np.array([number[tag] for _, tag in s], np.int32) for s in sentences)
    return TaggedSentences(tuple(_words(s) for s in sentences), tags, names)
