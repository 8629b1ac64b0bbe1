"""Batches of sequences of different lengths, padded to a few lengths only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax.errors import ConfigError, brief, explains_calls, is_whole
from mpjax.typing import DType, Shape

Example = Mapping[str, Any]  # name -> one number, or an array with an entry (or array) a token
Batch = dict[str, np.ndarray]
Augment = Callable[[int, np.random.Generator], Example]  # place of an example -> that one anew

IGNORE = -100  # label of tokens that are no target, and the padding of labels
_PADDING: dict[str, int] = {"labels": IGNORE}  # other fields are padded with 0


class Field(NamedTuple):
    """What a field is in all examples.

    Args:
        dtype: holds the numbers of each.
        ndim: 0 of numbers, 1 of arrays, more where a token has an array.
        tail: shape of what a token has, () of a number.
    """

    dtype: DType
    ndim: int
    tail: Shape = ()


def fields_of(examples: Sequence[Example]) -> dict[str, Field]:
    """Returns the fields that examples have, each with the dtype that holds all its numbers.

    Raises:
        ConfigError: no examples, one that is no dict, a field that only some have, that holds
            something else than numbers, or that is a number in some and an array in others.

    Example:
        >>> fields_of([{"weights": [1, 0]}, {"weights": [0.5]}])["weights"].dtype.name
        'float64'
    """
    axes: dict[str, int] = {}
    tails: dict[str, Shape] = {}
    dtypes: dict[str, set[DType]] = {}
    for number, example in enumerate(examples):
        where = f"examples[{number}]"
        if not isinstance(example, Mapping) or not example:
            raise ConfigError(f"{where} is {brief(example)}; give a dict of field -> numbers")
        if number and (odd := sorted(map(str, axes.keys() ^ example.keys()))):
            there = "lacks" if odd[0] in axes else "has"
            raise ConfigError(
                f"{where}: {there} the field {odd[0]!r}, unlike examples[0]; give all the same"
            )
        arrays = {name: _numbers(value, f"{where}: {name}") for name, value in example.items()}
        tokens = {len(array) for array in arrays.values() if array.ndim == 1}
        for name, array in arrays.items():
            if array.ndim > 1 and not (tokens and len(array) in tokens | {1}):
                raise ConfigError(
                    f"{where}: {name} is {brief(example[name])}; give a number, or an entry a token"
                )
            if tails.setdefault(name, array.shape[1:]) != array.shape[1:]:
                raise ConfigError(
                    f"{where}: {name} has {array.shape[1:]} a token, in examples[0] {tails[name]};"
                    " give all the same"
                )
            if axes.setdefault(name, array.ndim) != array.ndim:
                raise ConfigError(
                    f"{where}: {name} has {array.ndim} axes, in examples[0] {axes[name]}; give"
                    " numbers or arrays, not both"
                )
            known = dtypes.setdefault(name, set())
            if array.size:  # NumPy takes [] for float64
                known.add(array.dtype)
    if not axes:
        raise ConfigError("examples: none; name more data")
    try:
        return {
            name: Field(np.result_type(*dtypes[name] or [np.int32]), ndim, tails[name])
            for name, ndim in axes.items()
        }
    except TypeError as error:
        raise ConfigError(
            f"examples: a field of dtypes that do not mix ({error}); cast it"
        ) from None


def _numbers(value: object, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # typed JAX keys, ragged lists
        array = np.empty(0, object)
    # Kind V: bfloat16 and other dtypes of ml_dtypes.
    if array.dtype.kind not in "biufV" or array.dtype.fields:
        raise ConfigError(f"{where} is {brief(value)}; give a number, or one a token")
    return array


def pad(
    examples: Sequence[Example],
    length: int,
    padding: Mapping[str, int] = {},
    fields: Mapping[str, Field] | None = None,
) -> Batch:
    """Stacks examples: arrays are padded behind to `length`, numbers become a vector.

    Args:
        examples: with equal names.
        length: tokens a row.
        padding: name -> what fills it up; `labels` are filled with `IGNORE`, all others with 0.
        fields: of all examples that these are some of, from `fields_of`; else of these alone.

    Returns:
        Name -> array of shape (examples, length, ...) or (examples,), of a dtype that holds all.

    Raises:
        ConfigError: an example is longer, or what `fields_of` raises.

    Example:
        >>> pad([{"ids": np.array([5, 6]), "labels": 1}], 3)
        {'ids': array([[5, 6, 0]]), 'labels': array([1])}
    """
    batch: Batch = {}
    for name, (dtype, ndim, tail) in (fields or fields_of(examples)).items():
        parts = [np.asarray(example[name]) for example in examples]
        if ndim == 0:
            batch[name] = np.array(parts, dtype)
            continue
        if (longest := max(map(len, parts))) > length:
            raise ConfigError(f"{name}: {longest} tokens do not fit {length}; raise the length")
        fill = (_PADDING | dict(padding)).get(name, 0)
        if dtype.kind in "biu" and fill != np.asarray(fill).astype(dtype):  # unsigned labels
            dtype = np.promote_types(dtype, np.min_scalar_type(fill))
        batch[name] = np.full((len(parts), length, *tail), fill, dtype)
        for row, part in zip(batch[name], parts, strict=True):
            row[: len(part)] = part
    return batch


def check_sizes(batch: int, seed: int = 0) -> None:
    """Checks the rows of a batch and the seed of an order.

    Raises:
        ConfigError: one is no whole number, or too small.
    """
    if not is_whole(batch, 1):
        raise ConfigError(f"batch={brief(batch)}: expected at least 1 row, a whole number")
    if not is_whole(seed, 0):
        raise ConfigError(f"seed={brief(seed)}: expected a whole number of 0 or above")


def sizes_of(examples: Sequence[Example]) -> np.ndarray:
    """Returns the tokens of each example."""
    return np.array(
        [max(len(np.atleast_1d(value)) for value in example.values()) for example in examples],
        np.int64,
    )


def bucket_lengths(sizes: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Returns the length that each example is padded to.

    Raises:
        ConfigError: no length, or an example that is longer than all.
    """
    ladder = np.array(sorted(set(lengths)))
    if not len(ladder) or not all(is_whole(length, 1) for length in lengths):
        raise ConfigError(f"lengths={tuple(lengths)}: expected at least one positive length")
    if sizes.max() > ladder[-1]:
        raise ConfigError(
            f"lengths: an example has {sizes.max()} tokens, the longest is {ladder[-1]}; raise it"
        )
    return ladder[np.searchsorted(ladder, sizes)]


class _Rows(NamedTuple):
    """The examples of a batch.

    Args:
        places: of each row, shape (rows,).
        rounds: how often each has been taken before, shape (rows,).
        length: that they are padded to.
    """

    places: np.ndarray
    rounds: np.ndarray
    length: int


class _ByLength:
    """Batches of similar length, one epoch after the other.

    In each epoch every example is taken once, in a new order; what does not fill a batch of its
    length joins the next longer one, and the last batch is filled up with examples of that epoch.
    """

    def __init__(self, of: np.ndarray, batch: int, seed: int):
        self._of, self._batch, self._seed = of, batch, seed
        self._count = -(-len(of) // batch)
        self._planned: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        if self._planned[0] != epoch:
            draw = np.random.default_rng((self._seed, epoch))
            order = draw.permutation(len(self._of))
            plan: list[tuple[int, np.ndarray]] = []
            left = order[:0]
            for length in np.unique(self._of):
                rows = np.concatenate([left, order[self._of[order] == length]])
                full = len(rows) // self._batch * self._batch
                plan += [(int(length), part) for part in rows[:full].reshape(-1, self._batch)]
                left = rows[full:]
            if len(left):
                rows = np.concatenate([left, np.resize(order, self._batch - len(left))])
                plan.append((int(self._of.max()), rows))
            self._planned = (epoch, [plan[i] for i in draw.permutation(len(plan))])
        return self._planned[1]

    def __call__(self, index: int) -> _Rows:
        epoch, place = divmod(index, self._count)
        length, rows = self._plan(epoch)[place]
        return _Rows(rows, np.full(len(rows), epoch), length)


class _Balanced:
    """Batches that take classes in turn, and each class's examples in orders of its own.

    Rows have any length: a batch of one length alone would hold the classes that are so long.
    """

    def __init__(self, of: np.ndarray, batch: int, seed: int, classes: np.ndarray):
        self._of, self._batch, self._seed = of, batch, seed
        self._members = [np.flatnonzero(classes == one) for one in np.unique(classes)]
        self._known: dict[int, tuple[int, np.ndarray]] = {}

    def _order(self, one: int, round_: int) -> np.ndarray:
        known = self._known.get(one)
        if known is None or known[0] != round_:
            draw = np.random.default_rng((self._seed, one, round_, 3))  # a record's ends in 2
            known = self._known[one] = (round_, draw.permutation(self._members[one]))
        return known[1]

    def __call__(self, index: int) -> _Rows:
        places, rounds = [], []
        for number in range(index * self._batch, (index + 1) * self._batch):
            taken, one = divmod(number, len(self._members))
            round_, place = divmod(taken, len(self._members[one]))
            places.append(self._order(one, round_)[place])
            rounds.append(round_)
        rows = np.array(places)
        return _Rows(rows, np.array(rounds), int(self._of[rows].max()))


def _classes(examples: Sequence[Example], fields: Mapping[str, Field], name: str) -> np.ndarray:
    """The class of each example, for `_Balanced`."""
    where = f"balanced={brief(name)}"
    if name not in fields:
        raise ConfigError(f"{where}: examples have no such field; known: {' '.join(fields)}")
    if fields[name].ndim or fields[name].dtype.kind not in "iub":
        raise ConfigError(
            f"{where}: is {brief(examples[0][name])} in examples[0]; one whole number an example is"
            " a class; leave balanced out"
        )
    found = np.array([int(example[name]) for example in examples])
    if len(without := np.flatnonzero(found == IGNORE)):
        raise ConfigError(
            f"{where}: examples[{without[0]}] has no class ({IGNORE}); leave such examples out"
        )
    if len(set(found.tolist())) < 2:
        raise ConfigError(f"{where}: all examples are of class {found[0]}; expected two classes")
    return found


class _Batches:
    """A grain source whose elements are whole batches."""

    def __init__(
        self,
        examples: Sequence[Example],
        rows: Callable[[int], _Rows],
        fields: Mapping[str, Field],
        seed: int,
        lengths: Sequence[int],
        change: Callable[[Batch, np.random.Generator], Batch],
        padding: Mapping[str, int],
        augment: Augment | None,
    ):
        self._examples, self._rows, self._fields = examples, rows, fields
        self._seed, self._lengths, self._change = seed, lengths, change
        self._padding, self._augment = padding, augment

    def __len__(self) -> int:
        return sys.maxsize  # endless

    def __getitem__(self, index: int) -> Batch:
        places, rounds, length = self._rows(index)
        if self._augment is None:
            chosen = [self._examples[row] for row in places]
        else:
            pairs = zip(rounds, places, strict=True)
            chosen = [self._anew(self._augment, int(round_), int(row)) for round_, row in pairs]
            length = int(bucket_lengths(sizes_of(chosen), self._lengths).max())
        batch = pad(chosen, length, self._padding, self._fields)
        return self._change(batch, np.random.default_rng((self._seed, index, 1)))

    def _anew(self, augment: Augment, epoch: int, row: int) -> Example:
        example = augment(row, record_generator(self._seed, epoch, row))
        if not isinstance(example, Mapping) or example.keys() != self._fields.keys():
            raise ConfigError(
                f"augment: example {row} becomes {brief(example)}; give a dict of"
                f" {' '.join(self._fields)}, as it was"
            )
        return example


def record_generator(seed: int, epoch: int, record: int) -> np.random.Generator:
    """Returns the random generator of one record in one epoch, whoever asks and in which order."""
    return np.random.default_rng((seed, epoch, record, 2))  # an order and a change have others


class WorkerBatches(Iterator[Batch]):
    """Batches that processes make ahead; the same as without, and so is the position.

    Args:
        source: batch by number, for grain.
        workers: how many processes.
    """

    def __init__(self, source: Any, workers: int):
        self._source, self._workers, self._position = source, workers, 0
        self._batches: Any = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._position += 1
        return batch

    def _start(self) -> Any:
        import grain  # here, because it takes half a second
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain asks for one, and only absl's programs parse them
            flags.FLAGS.mark_as_parsed()
        left = grain.MapDataset.source(self._source).slice(slice(self._position, None))
        options = grain.MultiprocessingOptions(num_workers=self._workers)
        threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = left.to_iter_dataset(threads)
        return iter(dataset.mp_prefetch(options, worker_init_fn=_stay_on_cpu))

    def get_state(self) -> dict[str, int]:
        """How many batches have been handed out, as ``{"next_index": count}``."""
        return {"next_index": self._position}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues at a position, of a run with any number of workers."""
        self.close()
        self._position = int(state["next_index"])

    def close(self) -> None:
        """Ends the processes; the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _stay_on_cpu(worker: int, workers: int) -> None:
    """Keeps a worker that calls JAX from the accelerators, which are the training's."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def batches_of(source: Any, workers: int) -> Iterator[Batch]:
    """Returns an iterator over a source of whole batches, with `get_state` and `set_state`.

    Args:
        source: batch by number, for grain.
        workers: processes that make them ahead; 0 makes them in this one, when asked for.

    Raises:
        ConfigError: a number of workers below 0.
    """
    if not is_whole(workers, 0):
        raise ConfigError(f"workers={brief(workers)}: expected a whole number of 0 or above")
    if workers:
        return WorkerBatches(source, workers)
    import grain  # here, because it takes half a second

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


@explains_calls
def bucket_batches(
    examples: Sequence[Example],
    *,
    batch: int,
    seed: int,
    lengths: Sequence[int],
    change: Callable[[Batch, np.random.Generator], Batch] = lambda batch, draw: batch,
    padding: Mapping[str, int] = {},
    augment: Augment | None = None,
    balanced: str | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless training batches of examples of similar length, in an order fixed by the seed.

    Args:
        examples: name -> number or array with an entry a token.
        batch: rows.
        seed: of the orders and of `change`.
        lengths: what examples may be padded to; a step is compiled for each that occurs.
        change: batch, random generator -> batch; such as masking, drawn anew in every epoch.
        padding: name -> what fills it up, as `pad` takes it.
        augment: place of an example, random generator -> that example anew, as those of
            `mpjax.data.augment`; called for each example in each epoch, with a generator of seed,
            epoch and place alone. What it makes longer goes to the next length.
        balanced: field whose whole numbers are classes, such as `labels`: rows are then of each
            class in turn, so that a batch has of every class as many, give or take one. A class's
            examples are all taken before one is taken again, in a new order; that often counts as
            an epoch of `augment`. Such a batch has examples of any length, and is padded to its
            longest.
        workers: processes that make batches ahead, for an `augment` that takes time; 0 is none.
            The batches are the same, and a position may be continued with another number.

    Returns:
        An iterator of batches, with ``get_state()`` and ``set_state()``.

    Raises:
        ConfigError: no examples, one that is too long, a batch or length below 1, fields that
            differ, workers below 0; to be balanced, a field that has no classes, or one alone.

    Example:
        >>> examples = [{"ids": np.arange(n)} for n in (3, 2, 7, 4)]
        >>> batches = bucket_batches(examples, batch=2, seed=0, lengths=(4, 8))
        >>> sorted(next(batches)["ids"].shape for _ in range(2))
        [(2, 4), (2, 8)]
    """
    check_sizes(batch, seed)
    fields, of = fields_of(examples), bucket_lengths(sizes_of(examples), lengths)
    rows: Callable[[int], _Rows] = (
        _ByLength(of, batch, seed)
        if balanced is None
        else _Balanced(of, batch, seed, _classes(examples, fields, balanced))
    )
    source = _Batches(examples, rows, fields, seed, lengths, change, padding, augment)
    return batches_of(source, workers)


@explains_calls
def eval_batches(
    examples: Sequence[Example],
    *,
    batch: int,
    lengths: Sequence[int],
    padding: Mapping[str, int] = {},
) -> list[tuple[np.ndarray, Batch]]:
    """Every example once, in batches of similar length.

    Args:
        examples: as in `bucket_batches`.
        batch: rows.
        lengths: what examples may be padded to.
        padding: as in `pad`.

    Returns:
        (indices of the examples, batch) pairs; a batch may have more rows than indices, which
        repeat its first example so that no step is compiled for what is left over.

    Raises:
        ConfigError: as `bucket_batches`.
    """
    check_sizes(batch)
    fields = fields_of(examples)
    of = bucket_lengths(sizes_of(examples), lengths)
    found = []
    for length in np.unique(of):
        rows = np.flatnonzero(of == length)
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            filled = np.concatenate([part, np.repeat(part[:1], batch - len(part))])
            chosen = [examples[row] for row in filled]
            found.append((part, pad(chosen, int(length), padding, fields)))
    return found
