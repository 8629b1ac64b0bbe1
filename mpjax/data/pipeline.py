"""Input pipelines: a stream of ids as batches of windows, shuffled, sharded, resumable."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import numpy as np

from mpjax.errors import ConfigError, brief, is_whole

Batch = dict[str, np.ndarray]


def batches(
    tokens: np.ndarray,
    *,
    batch: int,
    seq: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingBatches:
    r"""Endless training batches of windows, in an order fixed by the seed.

    Window $i$ is the ids $[iT, iT + T]$, $T$ = `seq`: inputs its first $T$, targets its last $T$,
    so each id of the stream is predicted once an epoch (the rest that fills no window, never).
    Windows are packed: they cross document borders, and so does attention; the separator is all
    that marks a border (GPT-3's packing). Every epoch visits every window once, in a new order; a
    batch may hold the end of one epoch and the start of the next.

    The global batch does not depend on the process count: each process takes its rows of it. The
    state counts the batches handed out, whatever has been prefetched: ``get_state()`` is
    JSON-able, ``set_state`` of it on a fresh iterator of the same arguments continues exactly.

    Args:
        tokens: ids, shape (tokens,).
        batch: rows of the global batch.
        seq: T, tokens a row.
        seed: any non-negative integer; the orders of different seeds are unrelated.
        process_index: which rows of the global batch: ``jax.process_index()``.
        process_count: how many processes share the global batch: ``jax.process_count()``.

    Returns:
        An iterator of ``{"inputs", "targets"}``, int32, (batch / process_count, seq) each.

    Raises:
        ConfigError: a sequence longer than the text, a batch that does not divide, or a setting
            out of range.

    Example:
        >>> iterator = batches(np.arange(100), batch=2, seq=4, seed=0)
        >>> first = next(iterator)
        >>> first["inputs"].shape, bool((first["targets"] == first["inputs"] + 1).all())
        ((2, 4), True)
        >>> iterator.get_state()
        {'next_index': 1}

    References:
        Brown et al., Language Models are Few-Shot Learners (2020), appendix B (packing).
    """
    rows = local_rows(batch, process_index, process_count)
    count = _window_count(tokens, seq)
    if not is_whole(seed, 0):
        raise ConfigError(f"seed={brief(seed)}: expected a whole number of 0 or above")
    return TrainingBatches(tokens, count, batch, seq, seed, rows)


class TrainingBatches(Iterator[Batch]):
    """Endless batches whose position can be saved; made by `batches`.

    grain hands over chunks of `CHUNK` batches, because its bookkeeping, and a gather from a text
    that the caches do not hold, cost the host 0.5 ms a call, whatever the size.
    """

    CHUNK = 16

    def __init__(
        self, tokens: np.ndarray, count: int, batch: int, seq: int, seed: int, rows: slice
    ):
        import grain  # here, because it takes half a second

        source = _Shuffled(tokens, count, batch, seq, seed, rows)
        dataset = grain.MapDataset.source(source)
        # A prefetch thread would cost the host three times as much as the gather.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._chunks = iter(dataset.to_iter_dataset(options))
        self._position = 0
        self._chunk: Batch | None = None

    def __next__(self) -> Batch:
        place = self._position % self.CHUNK
        if self._chunk is None or place == 0:
            self._chunks.set_state({"next_index": self._position // self.CHUNK})
            self._chunk = next(self._chunks)
        self._position += 1
        return {name: ids[place] for name, ids in self._chunk.items()}

    def get_state(self) -> dict[str, int]:
        """How many batches have been handed out, as ``{"next_index": count}``."""
        return {"next_index": self._position}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues at a position; the next batch is the one that would have come there."""
        self._position, self._chunk = int(state["next_index"]), None


class _Shuffled:
    """A grain source whose elements are chunks of whole batches, one epoch after the other.

    Whole, because a chain of grain's shuffle, repeat and batch costs every row as much as this
    costs a batch. The order is grain's global shuffle: a permutation computed index by index.
    """

    def __init__(
        self, tokens: np.ndarray, count: int, batch: int, seq: int, seed: int, rows: slice
    ):
        from grain.experimental import index_shuffle

        self._tokens, self._count, self._batch, self._seq = tokens, count, batch, seq
        self._seed, self._rows, self._shuffle = seed, rows, index_shuffle
        self._epoch_seed = (-1, 0)

    def __len__(self) -> int:
        return sys.maxsize // (self._batch * TrainingBatches.CHUNK)  # endless

    def __getitem__(self, index: int) -> Batch:
        first = index * TrainingBatches.CHUNK
        windows = [
            [self._window(number * self._batch + row) for row in range(self._batch)[self._rows]]
            for number in range(first, first + TrainingBatches.CHUNK)
        ]
        return _gather(self._tokens, np.array(windows), self._seq)

    def _window(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        known = self._epoch_seed  # a tuple replaced at once, so that threads may share it
        if known[0] != epoch:
            # seed + epoch instead would give neighbouring seeds the same epochs.
            state = np.random.SeedSequence((self._seed, epoch)).generate_state(1)
            self._epoch_seed = known = (epoch, int(state[0]))
        return self._shuffle(place, max_index=self._count - 1, seed=known[1], rounds=4)


class ValidationBatches:
    """A finite sequence of validation batches; each is gathered when asked for.

    Args:
        tokens: ids, shape (tokens,).
        windows: the window of each row, shape (batches, rows).
        seq: tokens a row.
    """

    def __init__(self, tokens: np.ndarray, windows: np.ndarray, seq: int):
        self._tokens, self._windows, self._seq = tokens, windows, seq

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Batch:
        return _gather(self._tokens, self._windows[index], self._seq)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


def validation_batches(
    tokens: np.ndarray,
    *,
    batch: int,
    seq: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> ValidationBatches:
    r"""The batches of the held-out text, always the same, no window twice.

    Of $n$ windows (as in `batches`) $k$ are taken, window $\lfloor jn/k \rfloor$ for $j < k$:
    evenly spread, $k$ the largest multiple of `batch` that the text and the limit allow.

    Args:
        tokens: ids, shape (tokens,).
        batch: rows of the global batch.
        seq: tokens a row.
        limit: how many batches at most; None for all.
        process_index: which rows of the global batch.
        process_count: how many processes share the global batch.

    Returns:
        A sequence (``len``, index, any number of loops) of ``{"inputs", "targets"}``, int32,
        (batch / process_count, seq) each.

    Raises:
        ConfigError: fewer windows than one batch, or as `batches`.

    Example:
        >>> [int(b["inputs"][0, 0]) for b in validation_batches(np.arange(90), batch=1, seq=8)]
        [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80]
        >>> few = validation_batches(np.arange(90), batch=1, seq=8, limit=3)
        >>> [int(b["inputs"][0, 0]) for b in few]
        [0, 24, 56]
    """
    rows = local_rows(batch, process_index, process_count)
    count = _window_count(tokens, seq)
    if limit is not None and not is_whole(limit, 1):
        raise ConfigError(
            f"limit={brief(limit)}: expected at least 1 validation batch, or None for all"
        )
    if count < batch:
        raise ConfigError(
            f"batch={batch}: the held-out text has only {count} windows of seq={seq}; "
            "lower batch or seq, or hold out more"
        )
    taken = count // batch if limit is None else min(limit, count // batch)
    windows = np.arange(taken * batch) * count // (taken * batch)
    return ValidationBatches(tokens, windows.reshape(taken, batch)[:, rows], seq)


def _gather(tokens: np.ndarray, windows: np.ndarray, seq: int) -> Batch:
    ids = tokens[windows[..., None] * seq + np.arange(seq + 1)]
    # int32: the index dtype of embedding lookup and cross-entropy.
    return {"inputs": ids[..., :-1].astype(np.int32), "targets": ids[..., 1:].astype(np.int32)}


def local_rows(batch: int, process_index: int, process_count: int) -> slice:
    """Returns the rows of the global batch that belong to a process.

    Raises:
        ConfigError: a batch that does not divide, or a setting out of range.
    """
    if not is_whole(batch, 1):
        raise ConfigError(f"batch={brief(batch)}: expected at least 1 row, a whole number")
    if not 0 <= process_index < process_count:
        raise ConfigError(
            f"process_index={process_index}: expected 0 to {process_count - 1} "
            f"(process_count={process_count})"
        )
    if batch % process_count:
        raise ConfigError(
            f"batch={batch}: does not divide by process_count={process_count}; "
            f"use {batch // process_count * process_count or process_count}"
        )
    local = batch // process_count
    return slice(process_index * local, (process_index + 1) * local)


def _window_count(tokens: np.ndarray, seq: int) -> int:
    if not is_whole(seq, 1):
        raise ConfigError(f"seq={brief(seq)}: expected at least 1 token, a whole number")
    if getattr(getattr(tokens, "dtype", None), "kind", "") not in ("i", "u") or tokens.ndim != 1:
        raise ConfigError(f"tokens: {brief(tokens)}; give an array of token ids, shape (tokens,)")
    if len(tokens) <= seq:
        raise ConfigError(
            f"seq={seq}: longer than the text, which has {len(tokens)} tokens (a window takes "
            "seq + 1); lower seq or name more text"
        )
    return (len(tokens) - 1) // seq
