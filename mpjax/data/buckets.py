"""Batches of sequences of different lengths, padded to a few lengths only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax.errors import ConfigError, brief
from mpjax.typing import DType

Example = Mapping[str, Any]  # name -> one number, or an array with an entry a token
Batch = dict[str, np.ndarray]

IGNORE = -100  # label of tokens that are no target, and the padding of labels
_PADDING: dict[str, int] = {"labels": IGNORE}  # other fields are padded with 0


class Field(NamedTuple):
    """What a field is in all examples.

    Args:
        dtype: holds the numbers of each.
        ndim: 0 of numbers, 1 of arrays.
    """

    dtype: DType
    ndim: int


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
        for name, value in example.items():
            array = _numbers(value, f"{where}: {name}")
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
            name: Field(np.result_type(*dtypes[name] or [np.int32]), ndim)
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
    if array.dtype.kind not in "biufV" or array.dtype.fields or array.ndim > 1:
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
        Name -> array of shape (examples, length) or (examples,), of a dtype that holds all.

    Raises:
        ConfigError: an example is longer, or what `fields_of` raises.

    Example:
        >>> pad([{"ids": np.array([5, 6]), "labels": 1}], 3)
        {'ids': array([[5, 6, 0]]), 'labels': array([1])}
    """
    batch: Batch = {}
    for name, (dtype, ndim) in (fields or fields_of(examples)).items():
        parts = [np.asarray(example[name]) for example in examples]
        if ndim == 0:
            batch[name] = np.array(parts, dtype)
            continue
        if (longest := max(map(len, parts))) > length:
            raise ConfigError(f"{name}: {longest} tokens do not fit {length}; raise the length")
        fill = (_PADDING | dict(padding)).get(name, 0)
        if dtype.kind in "biu" and fill != np.asarray(fill).astype(dtype):  # unsigned labels
            dtype = np.promote_types(dtype, np.min_scalar_type(fill))
        batch[name] = np.full((len(parts), length), fill, dtype)
        for row, part in zip(batch[name], parts, strict=True):
            row[: len(part)] = part
    return batch


def sizes_of(examples: Sequence[Example]) -> np.ndarray:
    """Returns the tokens of each example."""
    return np.array(
        [max(np.size(value) for value in example.values()) for example in examples], np.int64
    )


def bucket_lengths(sizes: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Returns the length that each example is padded to.

    Raises:
        ConfigError: no length, or an example that is longer than all.
    """
    ladder = np.array(sorted(set(lengths)))
    if not len(ladder) or ladder[0] < 1:
        raise ConfigError(f"lengths={tuple(lengths)}: expected at least one positive length")
    if sizes.max() > ladder[-1]:
        raise ConfigError(
            f"lengths: an example has {sizes.max()} tokens, the longest is {ladder[-1]}; raise it"
        )
    return ladder[np.searchsorted(ladder, sizes)]


class _Epochs:
    """A grain source whose elements are whole batches, one epoch after the other.

    In each epoch every example is taken once, in a new order; what does not fill a batch of its
    length joins the next longer one, and the last batch is filled up with examples of that epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch: int,
        seed: int,
        lengths: Sequence[int],
        change: Callable[[Batch, np.random.Generator], Batch],
        padding: Mapping[str, int],
    ):
        self._examples, self._batch, self._seed = examples, batch, seed
        self._change, self._padding, self._fields = change, padding, fields_of(examples)
        self._of = bucket_lengths(sizes_of(examples), lengths)
        self._count = -(-len(examples) // batch)
        self._planned: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    def __len__(self) -> int:
        return sys.maxsize // self._batch  # endless

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

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, self._count)
        length, rows = self._plan(epoch)[place]
        batch = pad([self._examples[row] for row in rows], length, self._padding, self._fields)
        return self._change(batch, np.random.default_rng((self._seed, index, 1)))


def bucket_batches(
    examples: Sequence[Example],
    *,
    batch: int,
    seed: int,
    lengths: Sequence[int],
    change: Callable[[Batch, np.random.Generator], Batch] = lambda batch, draw: batch,
    padding: Mapping[str, int] = {},
) -> Iterator[Batch]:
    """Endless training batches of examples of similar length, in an order fixed by the seed.

    Args:
        examples: name -> number or array with an entry a token.
        batch: rows.
        seed: of the orders and of `change`.
        lengths: what examples may be padded to; a step is compiled for each that occurs.
        change: batch, random generator -> batch; such as masking, drawn anew in every epoch.
        padding: name -> what fills it up, as `pad` takes it.

    Returns:
        grain's iterator of batches, with ``get_state()`` and ``set_state()``.

    Raises:
        ConfigError: no examples, one that is too long, a batch or length below 1, fields that
            differ.

    Example:
        >>> examples = [{"ids": np.arange(n)} for n in (3, 2, 7, 4)]
        >>> batches = bucket_batches(examples, batch=2, seed=0, lengths=(4, 8))
        >>> sorted(next(batches)["ids"].shape for _ in range(2))
        [(2, 4), (2, 8)]
    """
    import grain  # here, because it takes half a second

    if batch < 1:
        raise ConfigError(f"batch={batch}: expected at least 1 row")
    if seed < 0:
        raise ConfigError(f"seed={seed}: expected 0 or above")
    source = _Epochs(examples, batch, seed, lengths, change, padding)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


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
    if batch < 1:
        raise ConfigError(f"batch={batch}: expected at least 1 row")
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
