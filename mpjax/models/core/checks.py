"""Checks of what a caller passes to a model: parameters, batches and token ids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, brief, listed
from mpjax.formats import is_quantized, weight_view
from mpjax.formats.checks import as_array, as_batch
from mpjax.ops.cross_entropy import check_targets
from mpjax.paths import leaves_with_names
from mpjax.typing import Array, ArrayLike, Batch, Key, Params, PyTree, Shape

Ids: TypeAlias = ArrayLike | Sequence[Sequence[int]]
Counts: TypeAlias = ArrayLike | Sequence[int]


@runtime_checkable
class Initializable(Protocol):
    """What `check_params` asks of a model."""

    def init(self, key: Key, /) -> Params: ...
    def __hash__(self) -> int: ...


def below(params: Params, root: str) -> Params:
    """Returns the parameters below a model's root.

    Raises:
      ConfigError: they are another model's, or none.

    Example:
      >>> below({"decoder": {"embed": 1}}, "decoder")
      {'embed': 1}
    """
    if isinstance(params, Mapping) and root in params:
        return params[root]
    held = f"hold {' '.join(map(str, params))}" if isinstance(params, Mapping) else "are no dict"
    raise ConfigError(
        f"{root}: params {held}; pass what init of this model returned, of a training state"
        " state.params"
    )


def field(batch: Batch, name: str, where: str, form: str = "") -> PyTree:
    """Returns a field of a batch.

    Args:
      batch: name -> array.
      name: of the field.
      where: what takes it.
      form: what a batch looks like, for an error.

    Raises:
      ConfigError: the batch is no dict, or has no such field.

    Example:
      >>> field({"inputs": 1}, "inputs", "decoder")
      1
    """
    if not isinstance(batch, Mapping):
        expected = form or f"a dict with {name!r}"
        raise ConfigError(f"{where}: a batch is {brief(batch)}; give {expected}")
    if name not in batch:
        raise ConfigError(
            f"{where}: the batch holds {listed(map(str, batch)) or 'nothing'} and no {name!r};"
            f" {f'give {form}' if form else 'add it, or give it this name'}"
        )
    return batch[name]


def check_listed(batches: object, where: str, example: str = "[batch]") -> None:
    """Raises a ConfigError if batches are a single one, or not iterable."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"{where}: batches are {brief(batches)}; give a list of dicts, as {example}"
        )


def each_batch(batches: Iterable[Batch], where: str) -> Iterator[Mapping[str, ArrayLike]]:
    """Yields batches.

    Args:
      batches: dicts.
      where: what takes them.

    Raises:
      ConfigError: one of them is no dict, or they are a single batch or not iterable.
    """
    check_listed(batches, where)
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ConfigError(f"{where}: batch {number} is {brief(batch)}; give a dict of arrays")
        yield as_batch(batch)


def keep_of(
    batch: Mapping[str, ArrayLike], where: str, *, keep: str = "keep", mask: str = "attention_mask"
) -> ArrayLike | None:
    """Returns which tokens of a batch are no padding: its `keep` or its `attention_mask`.

    Args:
      batch: name -> array.
      where: what takes it.
      keep: name of the field.
      mask: its name in transformers.

    Returns:
      bool or 0 and 1, or None where the batch has neither.

    Raises:
      ConfigError: both are given, or a mask of floating-point numbers, which is to be added.

    Example:
      >>> keep_of({"attention_mask": np.array([[1, 0]])}, "decoder").tolist()
      [[1, 0]]
    """
    own = batch.get(keep)
    if batch.get(mask) is None:
        return own
    if own is not None:
        raise ConfigError(f"{where}: the batch holds {keep} and {mask}; give one of them")
    found = as_array(batch[mask], f"{where}: {mask}")
    if jnp.issubdtype(found.dtype, jnp.floating):
        raise ConfigError(
            f"{where}: {mask} is {found.dtype.name}; give True or 1 where there is no padding"
        )
    return found


def language_inputs(batch: Batch, where: str) -> tuple[Array, dict[str, Any]]:
    """Returns the token ids (B, T) of a language model's batch, and its `keep` and `segments`.

    Args:
      batch: with `inputs`, and `keep` or `attention_mask` if there is padding, or `segments`.
      where: what takes it.

    Raises:
      ConfigError: what is given is something else.
    """
    ids = as_ids(field(batch, "inputs", where), where)
    keep = keep_of(batch, where)
    if keep is not None and jnp.shape(keep) != ids.shape:
        raise ConfigError(
            f"{where}: what is no padding has shape {jnp.shape(keep)}, inputs {ids.shape}; give one"
            " for each token"
        )
    masks = {"keep": keep, "segments": batch.get("segments")}
    if masks["segments"] is not None and batch.get("weights") is None:
        raise ConfigError(
            f"{where}: the batch holds segments and no weights; add them, 0 at padding and where a"
            " document's last token has the next one's first as target"
        )
    return ids, {name: mask for name, mask in masks.items() if mask is not None}


def real_tokens(batch: Mapping[str, ArrayLike], where: str) -> Array | None:
    """Returns which tokens of a batch are no padding, by its `keep` or `segments`; None is all.

    Args:
      batch: name -> array.
      where: what takes it.

    Raises:
      ConfigError: as `keep_of`.

    Example:
      >>> real_tokens({"segments": np.array([[1, 2, 0]])}, "encoder").tolist()
      [[True, True, False]]
    """
    keep, segments = keep_of(batch, where), batch.get("segments")
    if segments is not None:
        return jnp.asarray(segments) > 0
    return None if keep is None else jnp.asarray(keep).astype(bool)


def targets_of(batch: Batch, shape: Shape, where: str) -> Array:
    """Returns the `targets` of a batch, integers of a shape.

    Raises:
      ConfigError: they are missing, or something else.
    """
    found = as_array(field(batch, "targets", where), f"{where}: targets")
    check_targets(found, shape, where)
    return found


def as_ids(ids: object, where: str) -> Array:
    """Returns token ids as an array.

    Args:
      ids: integers of shape (B, T).
      where: what takes them.

    Raises:
      ConfigError: they are something else.

    Example:
      >>> as_ids([[5, 6]], "decoder").shape
      (1, 2)
    """
    found = as_array(ids, f"{where}: ids")
    if found.ndim != 2 or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ConfigError(
            f"{where}: ids are {found.dtype.name} of shape {found.shape}; give integers of shape"
            " (B, T), such as jnp.array([[5, 6]])"
        )
    return found


def as_segments(segments: object, shape: Shape, where: str) -> Array:
    """Returns which document of its row each token is of, integers of a shape.

    Args:
      segments: 1, 2 ... for documents and 0 for padding.
      shape: of the token ids, (B, T).
      where: what takes them.

    Raises:
      ConfigError: they are something else. Negative numbers are found where there are numbers, not
        while a function is traced.

    Example:
      >>> as_segments([[1, 1, 2]], (1, 3), "decoder").shape
      (1, 3)
    """
    found = as_array(segments, f"{where}: segments")
    if found.shape != shape or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ConfigError(
            f"{where}: segments are {found.dtype.name} of shape {found.shape}; give integers of"
            f" shape {shape}, one for each token"
        )
    if not isinstance(found, jax.core.Tracer) and found.size and (least := int(found.min())) < 0:
        raise ConfigError(
            f"{where}: segments hold {least}; number documents 1, 2 ... and give padding 0"
        )
    return found


def as_counts(counts: object, where: str) -> Array | np.ndarray:
    """Returns numbers of tokens, (B,) int32.

    Raises:
      ConfigError: they are no integers, or not one for each row.

    Example:
      >>> as_counts([3, 1], "lengths").tolist()
      [3, 1]
    """
    try:
        found = counts if isinstance(counts, jax.Array) else np.asarray(counts)
    except (TypeError, ValueError):  # ragged
        found = np.asarray(None)
    if found.ndim != 1 or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ConfigError(f"{where}: {brief(counts)}; give integers, one for each row")
    return found.astype(np.int32)


@functools.lru_cache(maxsize=64)
def _shapes(model: Initializable) -> dict[str, Shape]:
    """Path -> shape of a model's weights."""
    tree = jax.eval_shape(lambda: weight_view(model.init(jax.random.key(0))))
    return {name: leaf.shape for name, leaf in named_leaves(tree).items()}


def named_leaves(tree: PyTree) -> dict[str, PyTree]:
    """Returns path, such as `up/kernel`, -> leaf of a tree; a Quantized is a leaf."""
    return dict(leaves_with_names(tree, is_quantized))


def check_params(model: Initializable, params: Params, where: str) -> None:
    """Checks that parameters are a model's; the error names all that are not.

    Args:
      model: the model.
      params: dense or quantised.
      where: what needs them.

    Raises:
      ConfigError: weights that are missing, unexpected or of another shape.
    """
    try:
        wanted = _shapes(model)
    except TypeError:  # a model with an unhashable shard
        wanted = _shapes.__wrapped__(model)
    weights = named_leaves(params)
    misshaped = [
        f"{name} is {np.shape(x)}, not {wanted[name]}"
        for name, x in weights.items()
        if name in wanted and np.shape(x) != wanted[name]
    ]
    said = [f"{what} {listed(names, 3)}" for what, names in
            (("missing", [name for name in wanted if name not in weights]),
             ("unexpected", [name for name in weights if name not in wanted]),
             ("misshaped", misshaped)) if names]  # fmt: skip
    if said:
        raise ConfigError(
            f"{where}: params: {'; '.join(said)}; pass the parameters of this model, of a training"
            " state state.params"
        )
