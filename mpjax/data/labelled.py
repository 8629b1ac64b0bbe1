"""Texts with a class each, from a file or a source of the caller's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpjax.data.class_names import places_in, sorted_names
from mpjax.data.split import held_out
from mpjax.data.tables.rows import one_of_sources, read_rows, say_counts
from mpjax.errors import ConfigError
from mpjax.typing import Sources

logger = logging.getLogger("mpjax.data")

_HELD_OUT = 0.2
_OTHER = "equal but for the label"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and the class of each.

    Args:
        texts: the texts, none empty, none twice.
        labels: int32, shape (texts,), indices into `classes`.
        classes: names of the classes; sorted, where `load_labelled` made it.
        seconds: the second text of each pair; empty where texts stand alone.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    seconds: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, chosen: np.ndarray) -> LabelledTexts:
        """The examples at some indices, or where a mask is True."""
        places = np.arange(len(self))[chosen]
        seconds = tuple(self.seconds[i] for i in places) if self.seconds else ()
        texts = tuple(self.texts[i] for i in places)
        return LabelledTexts(texts, self.labels[places], self.classes, seconds)

    def ordered(self, classes: Sequence[str]) -> LabelledTexts:
        """The same texts with their classes in another order, as a checkpoint has them.

        Args:
            classes: names, such as `model.config.labels`; there may be more than the data has.

        Raises:
            ConfigError: a class of the data is not among them.

        Example:
            >>> texts = LabelledTexts(("fine", "poor"), np.array([1, 0], np.int32), ("bad", "good"))
            >>> texts.ordered(("good", "bad")).labels.tolist()
            [0, 1]
        """
        if tuple(classes) == self.classes:
            return self
        labels = places_in(self.classes, classes, "classes")[self.labels]
        return LabelledTexts(self.texts, labels, tuple(classes), self.seconds)


Rows = list[list[str]]  # label, text and, of pairs, a second text


def load_labelled(
    source: str, *, seed: int = 0, sources: Sources[tuple[Rows, Rows]] | None = None
) -> tuple[LabelledTexts, LabelledTexts]:
    """Loads labelled texts as a training and a held-out side that share no text.

    Of equal texts the first is kept; a training text that is held out too is dropped from
    training; what is left out is counted in one logged line. A source without a split of its own
    holds 20 % out, by a hash of seed and text.

    Args:
        source: one of `sources`, or a file of ``label<TAB>text`` or
            ``label<TAB>text<TAB>second text`` lines, perhaps with a header that names the columns
            ``label``, ``text``, ``second``; the same in ``.csv``; or ``.jsonl``, ``.json`` or
            ``.parquet`` with these keys. Labels are text, whole numbers, or true and false.
        seed: of the split, where the source has none.
        sources: name -> a function that returns training and held-out rows of label and text; no
            held-out rows where the source has no split of its own.

    Returns:
        (training, held out), with the same classes.

    Raises:
        ConfigError: a file that cannot be read, one class only.
    """
    sources = sources or {}
    if source in sources:
        read, tests = sources[source]()
        blank = 0
    else:
        if not Path(source).is_file():
            what = one_of_sources(sources, "a file of label<TAB>text lines")
            raise ConfigError(f"data {source!r}: no such source or file; {what}")
        read, blank = read_rows(Path(source), ("label", "text"), ("second",), classes="label")
        tests = []
    train, test = _distinct(read), _distinct(tests)
    dropped = {"blank": blank} | _repeats([read, tests], [train, test])
    if (other := dropped[_OTHER]) > len(read + tests) / 2:
        raise ConfigError(
            f"data {source!r}: {other} of {len(read + tests)} rows repeat a text under another"
            " label; are the columns of labels and texts swapped? name them in a header"
        )
    if test:
        known = {tuple(row[1:]) for row in test}
        before = len(train)
        train = [row for row in train if tuple(row[1:]) not in known]
        dropped["held out too"] = before - len(train)
    else:
        out = held_out(["\0".join(row[1:]) for row in train], _HELD_OUT, seed=seed)
        test = [row for row, one in zip(train, out, strict=True) if one]
        train = [row for row, one in zip(train, out, strict=True) if not one]
    classes = sorted_names(row[0] for row in train)
    if len(classes) < 2:
        raise ConfigError(f"data {source!r}: one class, {classes[0]!r}; expected at least two")
    if strange := {row[0] for row in test} - set(classes):
        raise ConfigError(
            f"data {source!r}: class {min(strange)!r} is only held out; give it more examples"
        )
    folded = {name.casefold(): name for name in classes}
    if twins := [
        (name, folded[name.casefold()]) for name in classes if name not in folded.values()
    ]:
        logger.warning("data %r: the classes %r and %r differ in case only", source, *twins[0])
    say_counts(source, "rows", {"for training": len(train), "held out": len(test)}, dropped)
    return _texts(train, classes), _texts(test, classes)


def _distinct(rows: Rows) -> Rows:
    first = {tuple(row[1:]): row for row in reversed(rows)}
    return [row for row in rows if first[tuple(row[1:])] is row]


def _repeats(sides: Sequence[Rows], distinct: Sequence[Rows]) -> dict[str, int]:
    """How many rows repeat an earlier text of their side, by whether the label is the same."""
    same = other = 0
    for rows, unique in zip(sides, distinct, strict=True):
        labels = {tuple(row[1:]): row[0] for row in unique}
        other += sum(labels[tuple(row[1:])] != row[0] for row in rows)
        same += len(rows) - len(unique)
    return {"equal to an earlier one": same - other, _OTHER: other}


def _texts(rows: Rows, classes: Sequence[str]) -> LabelledTexts:
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[row[0]] for row in rows], np.int32)
    seconds = tuple(row[2] for row in rows) if len(rows[0]) > 2 else ()
    return LabelledTexts(tuple(row[1] for row in rows), labels, tuple(classes), seconds)
