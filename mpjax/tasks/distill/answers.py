"""A teacher's answers on disk: the likeliest classes of each position, so that it is asked once.

Shapes: B batch, T positions, K classes kept, V all classes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.data.buckets import Example, bucket_lengths, eval_batches, sizes_of
from mpjax.data.cache import Cache
from mpjax.errors import ConfigError
from mpjax.paths import leaves_with_names
from mpjax.typing import Array, Batch, Params

logger = logging.getLogger("mpjax.tasks")

_FIELDS = ("ids", "logs", "rest")  # of a record
FIELDS = tuple(f"teacher_{name}" for name in _FIELDS)  # of a batch
_CHUNK = 512  # examples of a file


def _record(top: int) -> np.dtype[Any]:
    """What is kept of a position: float16 of a logarithm is within 1/2048 of it."""
    fields = [("ids", "<i4", (top,)), ("logs", "<f2", (top,)), ("rest", "<f4")]
    return np.dtype(fields)


def likeliest(logits: Array, temperature: float, top: int) -> tuple[Array, Array, Array]:
    r"""Returns the largest of $\mathrm{softmax}(t / \tau)$ and what all others have together.

    Args:
      logits: $t$, (..., V).
      temperature: $\tau$.
      top: K, at most V.

    Returns:
      ids (..., K), their log-probabilities (..., K) and the log-probability of the rest (...), -inf
      where there is none; float32.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) * jnp.float32(1 / temperature))
    logs, ids = jax.lax.top_k(log_p, top)
    return ids, logs, log_rest(log_p, ids)


def log_rest(log_p: Array, ids: Array) -> Array:
    """Returns the log-probability of all classes but some, (...), -inf if there are no others.

    Args:
      log_p: of all classes, (..., V).
      ids: those that are left out, (..., K), each once.
    """
    if ids.shape[-1] == log_p.shape[-1]:
        return jnp.full(log_p.shape[:-1], -jnp.inf, jnp.float32)
    # Summed, not 1 - sum: that difference of nearly equal numbers has no digits left.
    others = jnp.put_along_axis(log_p, ids, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1)


def bucketed(student: Array, batch: Batch, temperature: float) -> tuple[Array, Array]:
    """Returns log-probabilities of the student and of the teacher, each (..., K + 1).

    The last is that of all other classes together, so that the divergence is that of the two
    distributions seen through these K + 1 classes, never more than the whole one.

    Args:
      student: logits (..., V).
      batch: with the fields of `Answers`, (..., K) and (...).
      temperature: of both.

    Raises:
      ConfigError: answers of more classes than the student has.
    """
    ids, logs, rest = (jnp.asarray(batch[name]) for name in FIELDS)
    if ids.shape[:-1] != student.shape[:-1] or ids.shape[-1] > student.shape[-1]:
        raise ConfigError(
            f"distillation: the student's logits have shape {student.shape}, the stored answers"
            f" {ids.shape}; both need one vocabulary and one batch"
        )
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) * jnp.float32(1 / temperature))
    own = [jnp.take_along_axis(log_q, ids, axis=-1), log_rest(log_q, ids)[..., None]]
    logs = logs.astype(jnp.float32)  # stored in float16
    known = jnp.concatenate([logs, rest.astype(jnp.float32)[..., None]], axis=-1)
    if ids.shape[-1] == student.shape[-1]:  # nothing is left for a rest
        return own[0], jax.nn.log_softmax(logs)
    return jnp.concatenate(own, axis=-1), jax.nn.log_softmax(known)


class Answers(Sequence[Example]):
    """Examples with a teacher's answers, which are read when an example is asked for.

    Args:
      examples: what was asked.
      chunks: arrays of the answers, on the disk, of so many examples each.
      sizes: positions of each example.
    """

    def __init__(
        self, examples: Sequence[Example], chunks: Sequence[np.ndarray], sizes: Sequence[int]
    ) -> None:
        self._examples, self._chunks = examples, chunks
        starts = [
            np.concatenate([[0], np.cumsum(sizes[first : first + _CHUNK])])
            for first in range(0, len(sizes), _CHUNK)
        ]
        self._starts = starts

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        chunk, place = divmod(range(len(self))[index], _CHUNK)
        rows = self._chunks[chunk][slice(*self._starts[chunk][place : place + 2])]
        found = dict(self._examples[index])
        names = zip(FIELDS, _FIELDS, strict=True)
        return found | {field: rows[name] for field, name in names}


def store_answers(
    answer: Callable[[Params, Batch], tuple[Array, Array, Array]], params: Params, what: str,
    examples: Sequence[Example], sizes: Sequence[int], *, folder: str | os.PathLike[str] | None,
    batch: int, lengths: Sequence[int], top: int, padding: Mapping[str, int] = {},
) -> Answers:  # fmt: skip
    """Returns examples with a teacher's answers; those that are in the folder are not asked again.

    Args:
      answer: (params, batch) -> what `likeliest` gives, (B, T, K) and (B, T).
      params: of the teacher.
      what: everything else that the answers depend on, as a text.
      examples: to be answered, in their order.
      sizes: positions of each that have answers.
      folder: of the files; None is the cache folder.
      batch: examples at a time.
      lengths: what they are padded to.
      top: classes K of a position.
      padding: as `pad` takes it.

    Raises:
      ConfigError: no examples, one that is too long, or a folder that cannot be written.
    """
    if not len(examples):
        raise ConfigError("answers: no examples; name more data")
    bucket_lengths(sizes_of(examples), lengths)  # before any is asked
    cache, run = Cache(folder), jax.jit(answer)
    whole = hashlib.sha256(f"{what}, top {top}".encode())
    for name, leaf in leaves_with_names(params):
        whole.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        whole.update(np.asarray(leaf).tobytes())
    chunks, asked = [], 0
    for first in range(0, len(examples), _CHUNK):
        part = [examples[i] for i in range(first, min(first + _CHUNK, len(examples)))]
        own = whole.copy()
        for name, x in itertools.chain.from_iterable(sorted(example.items()) for example in part):
            own.update(f"{name} {np.asarray(x).dtype} {np.shape(x)}".encode())
            own.update(np.asarray(x).tobytes())
        name = f"answers-{own.hexdigest()[:32]}.npy"
        if (path := cache.find(name)) is None:
            found = _asked(
                run, params, part, sizes[first : first + _CHUNK], batch, lengths, top, padding
            )
            # Of a plain array there is nothing to pickle.
            cache.store(name, functools.partial(np.save, arr=found, allow_pickle=False))
            asked, path = asked + len(part), cache.find(name)
        if path is None:
            raise ConfigError(f"answers: {cache.folder} cannot be written; name another folder")
        chunks.append(np.load(path, mmap_mode="r", allow_pickle=False))
    logger.info(
        "answers: %d of %d examples were asked, the others are stored", asked, len(examples)
    )
    return Answers(examples, chunks, sizes)


def _asked(
    run: Callable[..., Any], params: Params, part: Sequence[Example], sizes: Sequence[int],
    batch: int, lengths: Sequence[int], top: int, padding: Mapping[str, int],
) -> np.ndarray:  # fmt: skip
    """The answers of some examples, one after the other."""
    found = [np.empty(size, _record(top)) for size in sizes]
    for rows, padded in eval_batches(part, batch=batch, lengths=lengths, padding=padding):
        answers = jax.device_get(run(params, padded))
        for row, *one in zip(rows, *answers, strict=False):  # the rows behind them fill up
            for name, x in zip(_FIELDS, one, strict=True):
                found[row][name] = x[: sizes[row]]  # to float16 what is kept in it
    return np.concatenate(found)
