"""What a batch holds, by our names or by those of transformers, and what may stand in it.

A model is given names whose meaning is clear. What a name asks for and the model does not do is an
error, not left out. Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.errors import ConfigError, brief, listed
from mpjax.formats.checks import as_array
from mpjax.typing import Array, Batch

IGNORE = -100  # a label that is no target, in torch, transformers and here
_ENCODER = {"input_ids": "ids", "token_type_ids": "types", "next_sentence_label": "next"}
_UNREAD = {
    "position_ids": "positions are counted from the padding",
    "inputs_embeds": "a model embeds ids itself, and adds an 'offset'",
    "head_mask": "no head is masked",
    "global_attention_mask": "all tokens see all others",
    "past_key_values": "a cache is the state of apply",
}
LANGUAGE = (
    "{'inputs': ids (B, T), 'targets': the next ids (B, T)}, with 'keep' and 'weights' if any, or"
    " 'input_ids', 'labels' and 'attention_mask' as transformers has them"
)
ENCODER = (
    "{'ids': ids (B, T), 'keep': 1 where there is no padding (B, T)} and what the task learns, or"
    " 'input_ids' and 'attention_mask' as transformers has them"
)
SEQ2SEQ = (
    "{'source': ids (B, S), 'inputs': ids (B, T), 'targets': the next ids (B, T)}, with"
    " 'source_keep', 'keep' and 'weights' if any, or 'input_ids', 'attention_mask',"
    " 'decoder_input_ids' and 'labels' as transformers has them"
)


def _as_dict(batch: object, where: str, form: str) -> dict[str, Any]:
    """A copy of a batch."""
    if not isinstance(batch, Mapping):
        raise ConfigError(f"{where}: a batch is {brief(batch)}; give {form}")
    if wrong := [name for name in _UNREAD if batch.get(name) is not None]:
        raise ConfigError(
            f"{where}: the batch holds {wrong[0]}, and {_UNREAD[wrong[0]]}; leave it out"
        )
    return dict(batch)


def _rename(batch: dict[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """The batch with our names in place of others."""
    if both := [pair for pair in names.items() if all(name in batch for name in pair)]:
        raise ConfigError(f"{where}: the batch holds {' and '.join(both[0])}; give one of them")
    return {names.get(name, name): value for name, value in batch.items()}


def _need(batch: Mapping[str, Any], needed: tuple[str, ...], where: str, form: str) -> None:
    for name in needed:
        if batch.get(name) is None:
            raise ConfigError(
                f"{where}: the batch holds {listed(map(str, batch)) or 'nothing'} and no {name!r};"
                f" give {form}"
            )


def encoder_batch(batch: Batch, where: str = "encoder") -> dict[str, Any]:
    """Returns a batch of an encoder under our names.

    `input_ids`, `token_type_ids` and `next_sentence_label` are `ids`, `types` and `next`.

    Raises:
      ConfigError: it is no dict, has no ids, names one thing twice or asks for what no encoder
        does.

    Example:
      >>> encoder_batch({"input_ids": 1, "attention_mask": 2, "labels": 3})
      {'ids': 1, 'attention_mask': 2, 'labels': 3}
    """
    found = _rename(_as_dict(batch, where, ENCODER), _ENCODER, where)
    _need(found, ("ids",), where, ENCODER)
    return found


def language_batch(batch: Batch, where: str) -> dict[str, Any]:
    r"""Returns a batch of a language model under our names.

    `inputs` come with `targets`, which are the next ids already. `input_ids` come with `labels`,
    which are not moved, as a causal model of transformers takes them: the label of token t is
    predicted from token t - 1, `IGNORE` is no target, and so is what follows on padding.

    Raises:
      ConfigError: it is no dict, lacks one of the two, mixes both, or asks for what the model does
        not do.

    Example:
      >>> ids = np.array([[5, 6, 7]])
      >>> found = language_batch({"input_ids": ids, "labels": ids}, "decoder")
      >>> found["targets"].tolist(), found["weights"].tolist()
      ([[6, 7, 0]], [[1.0, 1.0, 0.0]])
    """
    found = _as_dict(batch, where, LANGUAGE)
    if found.get("token_type_ids") is not None:
        raise ConfigError(f"{where}: the batch holds token_type_ids, and it has no token types;"
                          " leave it out")  # fmt: skip
    theirs, ours = (
        [name for name in names if name in found]
        for names in (("input_ids", "labels"), ("inputs", "targets"))
    )
    if theirs and ours:
        raise ConfigError(
            f"{where}: the batch holds {theirs[0]} and {ours[0]}; give inputs and targets, the next"
            " ids, or input_ids and labels, which are not moved"
        )
    if not theirs:
        _need(found, ("inputs", "targets"), where, LANGUAGE)
        return found
    _need(found, ("input_ids", "labels"), where, LANGUAGE)
    if "weights" in found:
        raise ConfigError(
            f"{where}: the batch holds labels and weights; leave a token out by {IGNORE} in labels,"
            " or give inputs, targets and weights"
        )
    if "segments" in found:
        raise ConfigError(
            f"{where}: the batch holds labels and segments; give inputs, targets and weights, 0"
            " where a document ends, as mpjax.data.packed_batches makes them"
        )
    found["inputs"], labels = found.pop("input_ids"), _integers(found.pop("labels"), where)
    if labels.ndim != 2 or labels.shape != np.shape(found["inputs"]):
        raise ConfigError(
            f"{where}: labels have shape {labels.shape}, input_ids {np.shape(found['inputs'])};"
            " give one for each token"
        )
    xp: Any = np if isinstance(labels, np.ndarray) else jnp
    behind = xp.full((labels.shape[0], 1), IGNORE, labels.dtype)
    targets = xp.concatenate([labels[:, 1:], behind], axis=1)
    chosen = targets != IGNORE
    if (keep := found.get("attention_mask", found.get("keep"))) is not None:
        if np.shape(keep) != labels.shape:
            raise ConfigError(
                f"{where}: attention_mask has shape {np.shape(keep)}, input_ids {labels.shape};"
                " give one for each token"
            )
        chosen = chosen & xp.asarray(keep).astype(bool)
    return found | _targets(targets, chosen, xp)


def seq2seq_batch(batch: Batch, where: str = "seq2seq") -> dict[str, Any]:
    """Returns a batch of an encoder-decoder under our names.

    `input_ids` are the `source`, `decoder_input_ids` the `inputs`; `labels` stand beside them, as
    in transformers, and `IGNORE` among them is no target.

    Raises:
      ConfigError: it is no dict, lacks a field, or mixes ours and theirs.

    Example:
      >>> one = {"input_ids": 1, "decoder_input_ids": 2, "labels": np.array([[6, -100]])}
      >>> found = seq2seq_batch(one)
      >>> found["source"], found["inputs"], found["targets"].tolist(), found["weights"].tolist()
      (1, 2, [[6, 0]], [[1.0, 0.0]])
    """
    found = _as_dict(batch, where, SEQ2SEQ)
    if "labels" in found and "targets" not in found and found.get("decoder_input_ids") is None:
        raise ConfigError(
            f"{where}: the batch holds labels and no decoder_input_ids, which are the labels behind"
            " the id that begins a target; DataCollatorForSeq2Seq(tokenizer, model=model) adds them"
        )
    found = _rename(found, {"input_ids": "source", "decoder_input_ids": "inputs"}, where)
    if "labels" in found:
        if more := [name for name in ("targets", "weights") if name in found]:
            raise ConfigError(
                f"{where}: the batch holds labels and {more[0]}; give labels with {IGNORE} where"
                " there is no target, or targets and weights"
            )
        labels = _integers(found.pop("labels"), where)
        xp: Any = np if isinstance(labels, np.ndarray) else jnp
        found |= _targets(labels, labels != IGNORE, xp)
    _need(found, ("source", "inputs", "targets"), where, SEQ2SEQ)
    return found


def _integers(labels: object, where: str) -> Array | np.ndarray:
    found = labels if isinstance(labels, np.ndarray) else as_array(labels, f"{where}: labels")
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise ConfigError(f"{where}: labels are {found.dtype}; give token ids, which are integers")
    return found


def _targets(targets: Any, chosen: Any, xp: Any) -> dict[str, Any]:
    weights = chosen.astype(xp.float32)  # counts, as `weights` are
    return {"targets": xp.where(chosen, targets, xp.zeros_like(targets)), "weights": weights}


def read_batch(model: object, batch: Batch) -> Batch:
    """Returns a batch under the names that a model reads; one of somebody else's reads its own."""
    own = getattr(model, "read_batch", None)
    return batch if own is None else own(batch)


def check_batch(model: object, batch: Batch) -> None:
    """Checks the token ids of a batch, if the model has a check.

    Raises:
      ConfigError: see `NextToken.check_batch` and `Encoder.check_batch`.
    """
    if (own := getattr(model, "check_batch", None)) is not None:
        own(batch)


def check_ids(ids: object, vocabulary: int, where: str, weights: object = None) -> None:
    """Checks that ids are a model's, if the host can read them without waiting.

    In a compiled function they cannot be read; an id that is no token then gives NaN.

    Args:
      ids: integers of any shape.
      vocabulary: how many ids there are.
      where: what to call them in an error.
      weights: of the ids, of their shape; those of weight 0 may be anything.

    Raises:
      ConfigError: one is negative or too large.

    Example:
      >>> check_ids(np.array([[0, 7]]), 8, "decoder: inputs")
    """
    values = _at_hand(ids)
    if values is None or values.dtype.kind not in "iu" or not values.size:
        return
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < vocabulary:
        return
    if weights is not None:
        counted = _at_hand(weights)
        if counted is None or counted.shape != values.shape:
            return
        values = values[counted != 0]
        if not values.size or (values.min() >= 0 and values.max() < vocabulary):
            return
        low, high = int(values.min()), int(values.max())
    wrong = low if low < 0 else high
    cure = "take the tokenizer that the model was made for"
    if wrong == IGNORE:
        cure = "give 'weights' of 0 there, or input_ids and labels as transformers has them"
    raise ConfigError(
        f"{where} hold {wrong}, which is no token of the model, whose ids are 0..{vocabulary - 1};"
        f" {cure}"
    )


def check_padding(batch: Mapping[str, Any], where: str) -> None:
    """Checks that no label stands at padding, where a model predicts nothing.

    Raises:
      ConfigError: one does.
    """
    labels, mask = (_at_hand(batch.get(name)) for name in ("labels", "attention_mask"))
    if labels is None or mask is None or labels.shape != mask.shape:
        return
    if ((labels != IGNORE) & (mask == 0)).any():
        raise ConfigError(
            f"{where}: labels hold tokens where attention_mask is 0; set them to {IGNORE} there, as"
            " transformers' collators do"
        )


def _at_hand(x: object) -> np.ndarray | None:
    """The numbers of an array that can be read now."""
    if isinstance(x, jax.core.Tracer) or x is None:
        return None
    if isinstance(x, jax.Array):
        there: Any = x  # `is_ready` is not in the type
        if not (there.is_fully_addressable and there.is_ready()):
            return None
    return np.asarray(x)
