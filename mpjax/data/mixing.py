"""Batches whose rows are of several tasks, drawn in the proportions that one asks for."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpjax.data.buckets import (
    IGNORE,
    Batch,
    Example,
    bucket_lengths,
    check_sizes,
    fields_of,
    pad,
    sizes_of,
)
from mpjax.errors import ConfigError, brief
from mpjax.typing import Shape

INPUTS = ("ids", "types", "keep", "attention_mask", "segments")  # what a model reads, of every task
TASK = "task"  # the field that holds the number of each row's task
Change = Callable[[Batch, np.random.Generator], Batch]


def mixing_weights(
    sizes: Mapping[str, int],
    *,
    temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    r"""Returns the share of each task in the rows that are drawn.

    $$p_i = n_i^{1/T} \Big/ \sum_j n_j^{1/T}$$ of $n_i$ examples: proportional to their number at
    $T = 1$, ever more alike above. Or $p_i = w_i / \sum_j w_j$ of fixed weights.

    Args:
        sizes: name -> examples of a task.
        temperature: $T$.
        weights: name -> $w_i$, in place of the temperature.

    Raises:
        ConfigError: no task, a task without examples, a temperature that is not positive, weights
            that are not positive or that name other tasks.

    Example:
        >>> mixing_weights({"a": 100, "b": 400})
        {'a': 0.2, 'b': 0.8}
        >>> found = mixing_weights({"a": 100, "b": 400}, temperature=2)
        >>> {name: round(share, 4) for name, share in found.items()}
        {'a': 0.3333, 'b': 0.6667}

    References:
        Raffel et al. 2020, T5, section 3.5.2; Arivazhagan et al. 2019, section 4.
    """
    if not sizes:
        raise ConfigError("mixing: no task; give examples of at least one")
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(
                f"mixing: the task {name!r} has no examples; leave it out or add data"
            )
    if weights is None:
        if not (_is_number(temperature) and temperature > 0):
            raise ConfigError(
                f"mixing: temperature={brief(temperature)} is not positive; 1 is proportional"
            )
        largest = max(sizes.values())
        raw = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    else:
        if temperature != 1.0:
            raise ConfigError("mixing: temperature and weights exclude each other; leave one out")
        check_weights("mixing", weights, sizes)
        raw = {name: float(weights[name]) for name in sizes}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]  # a number


def check_weights(where: str, weights: object, tasks: Mapping[str, object]) -> None:
    """Checks that weights name every task and no other, and are positive.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}: weights={brief(weights)}; give a dict of task -> number")
    for name in weights:
        if name not in tasks:
            raise ConfigError(
                f"{where}: weights name {name!r}, which is no task; known: {' '.join(tasks)}"
            )
    if missing := [name for name in tasks if name not in weights]:
        raise ConfigError(f"{where}: weights lack {missing[0]!r}; give one for every task")
    for name, value in weights.items():
        if not (_is_number(value) and value > 0):
            raise ConfigError(
                f"{where}: the weight of {name!r} is {brief(value)}; give a positive number, or"
                " leave the task out"
            )


class _Order:
    """A source of (task, example), one epoch after the other, each in an order of its own."""

    def __init__(self, task: int, count: int, seed: int):
        self._task, self._count, self._seed = task, count, seed
        self._known: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return sys.maxsize  # endless

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, self._count)
        known = self._known  # a tuple replaced at once, so that threads may share it
        if known[0] != epoch:
            draw = np.random.default_rng((self._seed, self._task, epoch))
            self._known = known = (epoch, draw.permutation(self._count))
        return self._task, int(known[1][place])


class _Form(NamedTuple):
    """What the field of a batch is: of all rows, or of one task's and filled in others'.

    Args:
        dtype: of its numbers.
        by_token: whether a row has an entry a token.
        tail: shape of such an entry, () of a number.
        fill: of rows of other tasks, and of padding.
    """

    dtype: np.dtype
    by_token: bool
    tail: Shape
    fill: int


class _Mixed:
    """A grain source whose elements are whole batches."""

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example]],
        shares: Mapping[str, float],
        batch: int,
        seed: int,
        lengths: Sequence[int],
        change: Mapping[str, Change],
        padding: Mapping[str, int],
    ):
        import grain  # here, because it takes half a second

        self._names, self._examples = list(examples), list(examples.values())
        self._batch, self._seed, self._padding = batch, seed, padding
        self._change = [change.get(name, lambda batch, draw: batch) for name in self._names]
        self._fields = [fields_of(part) for part in self._examples]
        self._lengths = [bucket_lengths(sizes_of(part), lengths) for part in self._examples]
        orders = [
            grain.MapDataset.source(_Order(i, len(part), seed))
            for i, part in enumerate(self._examples)
        ]
        self._rows = grain.MapDataset.mix(orders, [shares[name] for name in self._names])
        self._forms = self._formed()

    def __len__(self) -> int:
        return sys.maxsize // self._batch  # endless

    def _part(
        self, task: int, places: Sequence[int], length: int, draw: np.random.Generator
    ) -> Batch:
        """The rows of one task, under the names that a mixed batch has."""
        rows = [self._examples[task][place] for place in places]
        part = self._change[task](pad(rows, length, self._padding, self._fields[task]), draw)
        own_fields = [x for field, x in part.items() if field not in INPUTS]
        if not any(np.issubdtype(x.dtype, np.signedinteger) for x in own_fields):
            part = {"weights": np.ones(len(rows), np.float32)} | part
        own = self._names[task] + "/"
        return {name if name in INPUTS else own + name: x for name, x in part.items()}

    def _formed(self) -> dict[str, _Form]:
        """The fields of every batch, whichever tasks are in it."""
        forms: dict[str, _Form] = {}
        inputs: dict[str, set[str]] = {}
        for task, name in enumerate(self._names):
            part = self._part(task, [0], int(self._lengths[task][0]), np.random.default_rng(0))
            inputs[name] = {field for field in part if field in INPUTS}
            for field, x in part.items():
                own = field not in INPUTS
                fill = IGNORE if own and np.issubdtype(x.dtype, np.signedinteger) else 0
                fill = fill if own else self._padding.get(field, 0)
                dtype = np.result_type(x.dtype, forms[field].dtype) if field in forms else x.dtype
                forms[field] = _Form(dtype, x.ndim > 1, x.shape[2:], fill)
        first = self._names[0]
        for name, found in inputs.items():
            if odd := sorted(found ^ inputs[first]):
                who, other = (name, first) if odd[0] in found else (first, name)
                raise ConfigError(
                    f"mixing: examples of {who!r} have {odd[0]!r} and those of {other!r} have not;"
                    " give all tasks the same inputs"
                )
        return forms

    def __getitem__(self, index: int) -> Batch:
        rows = [self._rows[index * self._batch + row] for row in range(self._batch)]
        length = max(int(self._lengths[task][place]) for task, place in rows)
        tasks = np.array([task for task, _ in rows], np.int32)
        batch = {}
        for name, form in self._forms.items():
            shape = (length, *form.tail) if form.by_token else ()
            batch[name] = np.full((self._batch, *shape), form.fill, form.dtype)
        for task in np.unique(tasks).tolist():
            draw = np.random.default_rng((self._seed, index, 1, task))
            places = [place for one, place in rows if one == task]
            for field, x in self._part(task, places, length, draw).items():
                batch[field][tasks == task] = x
        return batch | {TASK: tasks}


def mixed_batches(
    examples: Mapping[str, Sequence[Example]],
    *,
    batch: int,
    seed: int,
    lengths: Sequence[int],
    temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
    change: Mapping[str, Change] = {},
    padding: Mapping[str, int] = {},
) -> Iterator[Batch]:
    """Endless training batches of several tasks, each row of one of them.

    What a model reads (`ids types keep attention_mask segments`) has its own name in the batch, any
    other field that of its task too, such as `tags/labels`. In rows of other tasks such a field is
    `IGNORE` where it holds signed integers, and 0 elsewhere. A task without such integers gets
    `weights`, 1 in its own rows. `task` (B,) is the number of each row's task. Rows come in the
    proportions of `mixing_weights`, evenly spread; each task goes through its examples epoch by
    epoch, in a new order each time.

    Args:
        examples: name of a task -> its examples, as in `bucket_batches`.
        batch: rows.
        seed: of the orders and of `change`.
        lengths: what rows may be padded to; a batch is as long as its longest row needs.
        temperature: see `mixing_weights`.
        weights: see `mixing_weights`.
        change: name of a task -> (batch of its rows, random generator) -> batch, such as masking.
        padding: name -> what fills it up, as `pad` takes it.

    Returns:
        grain's iterator of batches, with ``get_state()`` and ``set_state()``.

    Raises:
        ConfigError: a task without examples or whose name or fields collide with others', weights
            or a temperature that `mixing_weights` refuses, or what `bucket_batches` raises.

    Example:
        >>> texts = [{"ids": np.array([5, 6]), "labels": np.int32(1)}]
        >>> words = [{"ids": np.array([7, 8, 9]), "labels": np.array([0, 2, 1], np.int32)}]
        >>> data = mixed_batches({"mood": texts, "tags": words}, batch=2, seed=0, lengths=(3,))
        >>> first = next(data)
        >>> first["ids"].tolist(), first["mood/labels"].tolist(), first["tags/labels"].tolist()
        ([[5, 6, 0], [7, 8, 9]], [1, -100], [[-100, -100, -100], [0, 2, 1]])
    """
    import grain  # here, because it takes half a second

    check_sizes(batch, seed)
    if not isinstance(examples, Mapping):
        raise ConfigError(f"mixing: examples={brief(examples)}; give a dict of task -> examples")
    shares = mixing_weights(
        {name: len(part) for name, part in examples.items()},
        temperature=temperature, weights=weights,
    )  # fmt: skip
    for name, part in examples.items():
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name in (*INPUTS, TASK):
            raise ConfigError(
                f"mixing: the task {name!r}; give a name of letters, digits and _ that is none of"
                f" {' '.join((*INPUTS, TASK))}"
            )
        if odd := [field for field in fields_of(part) if field == TASK or "/" in field]:
            raise ConfigError(
                f"mixing: examples of {name!r} have a field {odd[0]!r}, which would collide with"
                " those of a mixed batch; rename it"
            )
    if unknown := [name for name in change if name not in examples]:
        raise ConfigError(
            f"mixing: change names {unknown[0]!r}, which is no task; known: {' '.join(examples)}"
        )
    source = _Mixed(examples, shares, batch, seed, lengths, change, padding)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
