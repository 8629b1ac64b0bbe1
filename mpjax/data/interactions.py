"""Who liked what and when: splits by time, histories, and candidates for a ranking loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mpjax.data.buckets import Batch, Example, pad
from mpjax.data.tables.rows import one_of_sources, read_rows, say_counts
from mpjax.errors import ConfigError, brief, is_whole
from mpjax.typing import ArrayLike, Sources

Interaction = tuple[str, str, float]  # user, text of the item, time


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Interactions of users with items, each pair once, ordered by user and time.

    Args:
        users: int32, shape (interactions,).
        items: int32, shape (interactions,), indices into `texts`.
        times: float64, shape (interactions,), in any unit.
        texts: of all items.

    Raises:
        ConfigError: arrays of different shapes, another order, or an item without a text.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        shapes = {np.shape(x) for x in (self.users, self.items, self.times)}
        if len(shapes) > 1 or len(np.shape(self.users)) != 1:
            raise ConfigError(
                f"interactions: arrays of shapes {sorted(shapes)}; give one axis each"
            )
        later = np.diff(self.times) >= 0
        step = np.diff(self.users)
        if not ((step > 0) | ((step == 0) & later)).all():
            raise ConfigError("interactions: not in order; sort them by user, then by time")
        if len(self) and not 0 <= self.items.min() <= self.items.max() < len(self.texts):
            raise ConfigError(
                f"interactions: items {self.items.min()} to {self.items.max()} of"
                f" {len(self.texts)} texts; give a text for each"
            )

    def __len__(self) -> int:
        return len(self.users)

    def take(self, chosen: np.ndarray) -> Interactions:
        """The interactions where a mask is True; all items stay."""
        return Interactions(self.users[chosen], self.items[chosen], self.times[chosen], self.texts)

    def counts(self) -> np.ndarray:
        """How often each item occurs, int64, shape (items,)."""
        return np.bincount(self.items, minlength=len(self.texts))

    def matrix(self, users: int) -> np.ndarray:
        """Whether a user has an item, bool, shape (users, items)."""
        found = np.zeros((users, len(self.texts)), bool)
        found[self.users, self.items] = True
        return found


def load_interactions(
    source: str, *, sources: Sources[Sequence[Interaction]] | None = None
) -> Interactions:
    """Loads interactions; of equal pairs of user and item the earliest is kept.

    Args:
        source: one of `sources`, or a file of ``user<TAB>text<TAB>time`` lines, perhaps with a
            header that names these columns; the same in ``.csv``; or ``.jsonl``, ``.json`` or
            ``.parquet`` with these keys, all texts.
        sources: name -> a function that returns (user, text, time).

    Raises:
        ConfigError: an unknown source, a file that cannot be read, a time that is no finite
            number, or fewer than two items.
    """
    sources = sources or {}
    if source in sources:
        found, blank = list(sources[source]()), 0
    elif Path(source).is_file():
        rows, blank = read_rows(Path(source), ("user", "text", "time"))
        found = [(user, text, _time(time, source)) for user, text, time in rows]
    else:
        what = one_of_sources(sources, "a file of user<TAB>text<TAB>time lines")
        raise ConfigError(f"data {source!r}: no such source or file; {what}")
    first: dict[tuple[str, str], float] = {}
    for user, text, time in found:
        pair = user, text
        first[pair] = min(time, first.get(pair, math.inf))
    users = {name: i for i, name in enumerate(sorted({user for user, _ in first}))}
    texts = tuple(sorted({text for _, text in first}))
    if len(texts) < 2:
        raise ConfigError(f"data {source!r}: {len(texts)} item(s); expected at least two")
    items = {text: i for i, text in enumerate(texts)}
    u, i = (
        np.array(of, np.int32)
        for of in zip(*((users[user], items[text]) for user, text in first), strict=True)
    )
    times = np.array(list(first.values()), np.float64)
    order = np.lexsort((i, times, u))
    say_counts(
        source, "interactions", {"of users with items": len(order)},
        {"blank": blank, "equal to an earlier one": len(found) - len(order)},
    )  # fmt: skip
    return Interactions(u[order], i[order], times[order], texts)


def _time(text: str, source: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not math.isfinite(time):
        raise ConfigError(f"data {source!r}: time {text[:40]!r} is no number; give one, as seconds")
    return time


def leave_one_out(data: Interactions) -> tuple[Interactions, Interactions, Interactions]:
    """Splits interactions by the time of each user: the last is for testing, the one before it for
    validation.

    What is validated is strictly earlier than what is tested, and what is trained on strictly
    earlier than what is validated; other interactions of these moments are left out, because
    nobody can say which came first. A user without three moments is for training only.

    Args:
        data: the interactions.

    Returns:
        (training, validation, test).

    Raises:
        ConfigError: no user has three moments.

    Example:
        >>> users, items = np.zeros(4, np.int32), np.arange(4, dtype=np.int32)
        >>> data = Interactions(users, items, np.array([1.0, 2, 2, 3]), tuple("abcd"))
        >>> [side.items.tolist() for side in leave_one_out(data)]
        [[0], [2], [3]]
    """
    sides = np.zeros((3, len(data)), bool)
    starts = np.unique(data.users, return_index=True)[1]
    for start, stop in zip(starts, [*starts[1:], len(data)], strict=True):
        rows = np.arange(start, stop)
        times = data.times[rows]
        moments = np.unique(times)
        if len(moments) < 3:
            sides[0, rows] = True
            continue
        # Of one moment, the last row.
        sides[2, rows[-1]] = sides[1, rows[times == moments[-2]][-1]] = True
        sides[0, rows[times < moments[-2]]] = True
    if not sides[2].any():
        raise ConfigError(
            "interactions: no user has three moments, one each for training, validation and test;"
            " name more data"
        )
    train, validation, test = (data.take(side) for side in sides)
    return train, validation, test


def histories(data: Interactions, of: Interactions, longest: int) -> list[np.ndarray]:
    """The items that each user had strictly before each interaction, the latest ones last.

    Args:
        data: what a history is made of.
        of: the interactions whose histories are wanted.
        longest: items of a history at most; the latest are kept.

    Returns:
        int32 of each interaction; empty where there is nothing before it.

    Example:
        >>> users, items = np.zeros(3, np.int32), np.arange(3, dtype=np.int32)
        >>> data = Interactions(users, items, np.array([1.0, 2, 2]), tuple("abc"))
        >>> [h.tolist() for h in histories(data, data, 5)]
        [[], [0], [0]]
    """
    if not is_whole(longest, 1):
        raise ConfigError(f"longest: {brief(longest)} items; expected at least 1")
    found = []
    # `data` is ordered by user and time.
    starts = np.searchsorted(data.users, of.users)
    ends = np.searchsorted(data.users, of.users, side="right")
    for start, end, time in zip(starts, ends, of.times, strict=True):
        stop = start + int(np.searchsorted(data.times[start:end], time))
        found.append(data.items[max(start, stop - longest) : stop])
    return found


def candidates(
    items: Sequence[Example], counts: ArrayLike, negatives: int, *, length: int
) -> Callable[[Batch, np.random.Generator], Batch]:
    r"""Returns a change of batches that puts candidates in the place of `target`, an item's number.

    Candidate 0 of a row is its target, the others are drawn uniformly from all other items. With
    `log_q` a loss over the candidates of all rows corrects for how often each item is among them,
    $q_i \propto c_i / \sum_j c_j + K / N$ of $K$ negatives and $N$ items.

    Args:
        items: encoded texts, with `ids`, `types` and `keep`.
        counts: how often each item is a target in training, $c$; shape (items,).
        negatives: $K$, candidates of a row besides its target.
        length: what the items' tokens are padded to.

    Returns:
        Function (batch, random generator) -> batch with `items` (B, 1 + K), `log_q` (B, 1 + K),
        and `item_ids`, `item_types` and `item_keep` (B, 1 + K, length).

    Raises:
        ConfigError: no negatives, or not one count for each item.

    References:
        Yi et al. 2019, Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
        Recommendations, section 3; Yang et al. 2020, Mixed Negative Sampling, section 3.
    """
    own = np.asarray(counts, np.float64)
    if own.shape != (len(items),) or len(items) < 2 or own.min() < 0 or not own.sum():
        raise ConfigError(
            f"counts: shape {own.shape} for {len(items)} items; give a count for each, of two items"
            " or more"
        )
    if not is_whole(negatives, 1):
        raise ConfigError(f"negatives: {brief(negatives)}; expected at least 1 a row")
    if not is_whole(length, 1):
        raise ConfigError(f"length: {brief(length)}; expected at least 1 token")
    padded = pad(items, length)
    log_q = np.log(own / own.sum() + negatives / len(items)).astype(np.float32)

    def change(batch: Batch, draw: np.random.Generator) -> Batch:
        batch = dict(batch)
        target = batch.pop("target")[:, None].astype(np.int32)
        other = draw.integers(0, len(items) - 1, (len(target), negatives)).astype(np.int32)
        numbers = np.concatenate([target, other + (other >= target)], 1)
        texts = {f"item_{name}": padded[name][numbers] for name in ("ids", "types", "keep")}
        return batch | texts | {"items": numbers, "log_q": log_q[numbers]}

    return change
