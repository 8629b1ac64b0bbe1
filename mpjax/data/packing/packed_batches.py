"""Batches of rows that hold several documents each, told apart by segments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpjax.data.buckets import IGNORE, Batch, Example, Field, fields_of
from mpjax.data.packing.first_fit import LONGER, cut, first_fit
from mpjax.data.pipeline import local_rows
from mpjax.data.tokenizers.tokenizer import Tokenizer
from mpjax.errors import ConfigError, brief, is_whole
from mpjax.typing import Json

logger = logging.getLogger("mpjax.data")

Change = Callable[[Batch, np.random.Generator], Batch]
Row = np.ndarray  # numbers of its pieces

WINDOW = 1024  # pieces that are packed at a time
SEGMENTS = "segments"
_MASKS = ("keep", "attention_mask")


def document_examples(tokens: np.ndarray, tokenizer: Tokenizer) -> list[Example]:
    """Cuts a stream of documents into examples of next tokens, one a document.

    Each token of a document and the separator behind it are a target once. A document is read
    behind a separator, as it stands in the stream, unless the tokenizer puts a token of its own,
    such as BOS, before each: then that is read first, and is no target.

    Args:
        tokens: ids, each document followed by a separator, as `Corpus.train`.
        tokenizer: what made them.

    Returns:
        ``{"inputs", "targets"}`` of each document that holds a token; parts of `tokens`, not
        copies, but for the first.

    Raises:
        ConfigError: something else than such a stream, or than a tokenizer.

    Example:
        >>> from mpjax.data import make_tokenizer
        >>> stream = np.array([97, 98, 0, 99, 0])
        >>> one, other = document_examples(stream, make_tokenizer("bytes", []))
        >>> one["inputs"].tolist(), one["targets"].tolist(), other["targets"].tolist()
        ([0, 97, 98], [97, 98, 0], [99, 0])
    """
    if not (hasattr(tokenizer, "separator") and hasattr(tokenizer, "prefix")):
        raise ConfigError(
            f"tokenizer: {brief(tokenizer)}; give the one that made the ids, as corpus.tokenizer"
        )
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        raise ConfigError(f"tokens: {brief(tokens)}; give an array of token ids, shape (tokens,)")
    end, own = tokenizer.separator, tuple(tokenizer.prefix[:1])
    ends = np.flatnonzero(tokens == end) + 1
    starts = np.concatenate([[0], ends])
    found: list[Example] = []
    for start, stop in zip(starts.tolist(), [*ends.tolist(), len(tokens)], strict=True):
        first = start + (own not in ((), (end,)))  # of the targets
        if stop <= first or (stop == first + 1 and tokens[first] == end):
            continue  # nothing is between two separators
        if first:
            inputs = tokens[first - 1 : stop - 1]
        else:
            inputs = np.concatenate([np.array([end], tokens.dtype), tokens[: stop - 1]])
        found.append({"inputs": inputs, "targets": tokens[first:stop]})
    if not found:
        raise ConfigError("tokens: only separators; name more text")
    return found


class _Position(NamedTuple):
    """The row that comes next.

    Args:
        epoch: number of the epoch.
        window: number of the window of pieces in it.
        row: number of the row of that window.
    """

    epoch: int = 0
    window: int = 0
    row: int = 0


class PackedBatches(Iterator[Batch]):
    """Endless packed batches whose position can be saved; made by `packed_batches`.

    Args:
        examples: name -> array with an entry a token.
        fields: of them, those that a batch has.
        pieces: of the examples, as `cut` returns them.
        batch: rows of the global batch.
        length: tokens of a row.
        seed: of the orders and of `change`.
        change: global batch, random generator -> batch.
        rows: those of the global batch that this process takes.
    """

    def __init__(
        self, examples: Sequence[Example], fields: Mapping[str, Field], pieces: np.ndarray, *,
        batch: int, length: int, seed: int, change: Change, rows: slice,
    ):  # fmt: skip
        self._examples, self._fields, self._pieces = examples, fields, pieces
        self._sizes = pieces[:, 2] - pieces[:, 1]
        self._batch, self._length, self._seed = batch, length, seed
        self._change, self._own, self._next = change, rows, _Position()
        self._windows = max(1, round(len(pieces) / WINDOW))
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self._packed: tuple[tuple[int, int], list[Row]] = ((-1, -1), [])

    def __next__(self) -> Batch:
        first, rows = self._next, list[Row]()
        while len(rows) < self._batch:
            epoch, window, row = self._next
            packed = self._rows(epoch, window)
            taken = packed[row : row + self._batch - len(rows)]
            rows += taken
            if row + len(taken) < len(packed):
                self._next = _Position(epoch, window, row + len(taken))
            elif window + 1 < self._windows:
                self._next = _Position(epoch, window + 1)
            else:
                self._next = _Position(epoch + 1)
        return self._made(rows, (*first, 5))

    def get_state(self) -> dict[str, int]:
        """The row that comes next, as ``{"epoch", "window", "row"}``."""
        return self._next._asdict()

    def set_state(self, state: Mapping[str, Json]) -> None:
        """Continues at a position.

        Raises:
            ConfigError: it is of another iterator, or of other data.
        """
        names = _Position._fields
        numbers = [state.get(name) for name in names] if isinstance(state, Mapping) else []
        if all(type(number) is int and number >= 0 for number in numbers) and numbers:
            position = _Position(*numbers)  # type: ignore[arg-type]  # integers
            if position.window < self._windows and position.row < len(self._rows(*position[:2])):
                self._next = position
                return
        raise ConfigError(
            f"packing: the position {brief(state)} is none of these batches; resume with the data"
            " and the settings that it was saved with"
        )

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """Every piece once, as an evaluation needs it; the last batch has empty rows behind.

        Args:
            number: which epoch; the endless batches go through the same rows.
        """
        rows = [row for window in range(self._windows) for row in self._rows(number, window)]
        for start in range(0, len(rows), self._batch):
            yield self._made(rows[start : start + self._batch], (number, start, 6))

    def padding(self, epoch: int = 0) -> float:
        """The share of padding in the rows of an epoch."""
        rows = sum(len(self._rows(epoch, window)) for window in range(self._windows))
        return 1 - int(self._sizes.sum()) / (rows * self._length)

    def _rows(self, epoch: int, window: int) -> list[Row]:
        """The rows of one window of an epoch, in an order that does not follow their lengths."""
        if self._packed[0] != (epoch, window):
            count = len(self._pieces)
            if self._order[0] != epoch:
                draw = np.random.default_rng((self._seed, epoch, 3))
                self._order = epoch, draw.permutation(count)
            bounds = (np.array([window, window + 1]) * count // self._windows).tolist()
            pieces = self._order[1][slice(*bounds)]
            rows = first_fit(self._sizes[pieces], self._length)
            shuffled = np.random.default_rng((self._seed, epoch, window, 4)).permutation(len(rows))
            self._packed = (epoch, window), [pieces[rows[row]] for row in shuffled]
        return self._packed[1]

    def _made(self, rows: Sequence[Row], drawn: tuple[int, ...]) -> Batch:
        shape = (self._batch, self._length)
        batch = {
            name: np.full((*shape, *field.tail), IGNORE if name == "labels" else 0, field.dtype)
            for name, field in self._fields.items()
        }
        segments = np.zeros(shape, np.int32)
        for row, pieces in enumerate(rows):
            place = 0
            for number, (example, start, stop) in enumerate(self._pieces[pieces].tolist(), 1):
                tokens = slice(place, place := place + stop - start)
                segments[row, tokens] = number
                for name, array in batch.items():
                    array[row, tokens] = self._examples[example][name][start:stop]
        batch[SEGMENTS] = segments
        if "targets" in batch and "weights" not in batch:
            batch["weights"] = (segments > 0).astype(np.float32)  # the dtype of a count of targets
        batch = self._change(batch, np.random.default_rng((self._seed, *drawn)))
        return {name: array[self._own] for name, array in batch.items()}


def packed_batches(
    examples: Sequence[Example],
    *,
    batch: int,
    length: int,
    seed: int,
    longer: str = "error",
    change: Change = lambda batch, draw: batch,
    process_index: int = 0,
    process_count: int = 1,
) -> PackedBatches:
    """Endless training batches of rows that hold several examples each, fixed by the seed.

    `segments` (batch, length) says which example of its row a token is of: 1, 2 ..., and 0 at
    padding. A model that takes them attends within an example, whose positions begin at 0, so an
    example is computed as in a row of its own. With `targets` and without `weights` each real
    target has the weight 1. In each epoch every example is taken once, in a new order; 1024 pieces
    at a time are packed, the largest first, each into the first row that has room. A batch may hold
    the end of one epoch and the start of the next.

    Args:
        examples: name -> array with an entry a token, as `document_examples`, `WordPiece.encode`
            or `mpjax.data.chat.instruction_examples` make them. `keep` and `attention_mask`, all
            True, are left out: `segments` take their place.
        batch: rows of the global batch.
        length: tokens of a row.
        seed: of the orders and of `change`.
        longer: what becomes of an example that is longer than a row: `error`, or `split`, which
            takes it apart; each part is then read without the ones before. How many is logged.
        change: global batch, random generator -> batch, such as masking, drawn anew in every epoch.
        process_index: which rows of the global batch: ``jax.process_index()``.
        process_count: how many processes share the global batch: ``jax.process_count()``.

    Returns:
        An iterator with ``get_state()`` and ``set_state()``, ``padding()``, the share of padding,
        and ``epoch()``, the batches of one epoch. Integers are int32 or wider.

    Raises:
        ConfigError: no examples, fields that are no array or of several lengths, an example
            without tokens, with padding or too long, or a setting out of range.

    Example:
        >>> texts = [{"inputs": np.full(n, n), "targets": np.full(n, n)} for n in (3, 1, 2)]
        >>> one = next(packed_batches(texts, batch=1, length=6, seed=0))
        >>> one["inputs"].tolist(), one["segments"].tolist()
        ([[3, 3, 3, 2, 2, 1]], [[1, 1, 1, 2, 2, 3]])

    References:
        Krell et al., Efficient sequence packing without cross-contamination (2021); Raffel et al.,
        Exploring the Limits of Transfer Learning (2020), section 2.2.
    """
    for name, value, least in (("batch", batch, 1), ("length", length, 1), ("seed", seed, 0)):
        if not is_whole(value, least):
            raise ConfigError(f"packing: {name}={brief(value)}; give a whole number from {least}")
    if longer not in LONGER:
        raise ConfigError(f"packing: longer={brief(longer)}; known: {' '.join(LONGER)}")
    if not isinstance(examples, Sequence):
        raise ConfigError(
            f"packing: examples are {brief(examples)}; give a list of dicts, of a stream of"
            " documents document_examples(tokens, tokenizer)"
        )
    rows = local_rows(batch, process_index, process_count)
    fields = _fields(examples)
    pieces = cut(_sizes(examples), length, longer)
    if longer_ones := len(np.unique(pieces[pieces[:, 1] > 0, 0])):
        logger.warning(
            "%d of %d examples are longer than %d tokens; split, which makes %d",
            longer_ones, len(examples), length, len(pieces),
        )  # fmt: skip
    return PackedBatches(
        examples, fields, pieces, batch=batch, length=length, seed=seed, change=change, rows=rows
    )


def _fields(examples: Sequence[Example]) -> dict[str, Field]:
    """The fields that a batch has, integers int32 or wider, as models look them up."""
    found = {}
    for name, field in fields_of(examples).items():
        if name == SEGMENTS:
            raise ConfigError(
                f"packing: the examples have {SEGMENTS!r}, which packing adds; leave it out"
            )
        if not field.ndim:
            raise ConfigError(
                f"packing: {name!r} is one number an example, and a row holds several; give an"
                " entry a token, or leave it out"
            )
        if field.dtype.kind in "iu" and field.dtype.itemsize < 8:
            field = field._replace(dtype=np.promote_types(field.dtype, np.int32))
        if name not in _MASKS:
            found[name] = field
    return found


def _sizes(examples: Sequence[Example]) -> np.ndarray:
    """The tokens of each example, at least one, none of them padding."""
    sizes = np.zeros(len(examples), np.int64)
    for number, example in enumerate(examples):
        where, lengths = f"packing: examples[{number}]", {n: len(x) for n, x in example.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"{where}: {brief(lengths)} tokens; give each field as many")
        sizes[number] = next(iter(lengths.values()))
        if not sizes[number]:
            raise ConfigError(f"{where} has no token; leave it out")
        if odd := [name for name in _MASKS if not np.all(example.get(name, True))]:
            raise ConfigError(f"{where}: {odd[0]} hides tokens; give examples without padding")
    return sizes
