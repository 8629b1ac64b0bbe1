"""A checkpoint with what it needs for a task: a head, its tokenizer."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mpjax.data import Tokenizer, WordPiece, parse_wordpiece
from mpjax.errors import ConfigError
from mpjax.models import Encoder, EncoderConfig
from mpjax.models.hf import load_checkpoint, open_checkpoint
from mpjax.models.hf.checkpoint import Checkpoint
from mpjax.precision import Precision
from mpjax.typing import Json, Params, Settings

# Head that a task reads -> what its tensors begin with.
_PRETRAINED = {"masked": "cls.predictions.", "next": "cls.seq_relationship."}
_HEADS = _PRETRAINED | {"labels": "classifier."}
_POOLER = "*pooler*"  # tensors of BERT's pooler
HEAD_OF = {"classify": "class", "pair": "class", "regress": "class", "tag": "token"}


class Pretrained(NamedTuple):
    """What `from_pretrained` returns.

    Args:
      model: in the Precision that was asked for.
      params: its weights.
      tokenizer: its own; None where the checkpoint has none.
    """

    model: Any
    params: Params
    tokenizer: WordPiece | Tokenizer | None


def from_pretrained(
    name: str | Path | Checkpoint,
    precision: str | Precision = "fp32",
    *,
    task: str | None = None,
    labels: Sequence[str] = (),
    seed: int = 0,
    **changes: Json,
) -> Pretrained:
    """Loads a checkpoint with the head that a task needs, and its tokenizer.

    A head that the checkpoint has for the same labels is kept, with its order of them; any other
    is drawn by the seed. Heads that the task does not read are left out.

    Args:
      name: a folder, a file or a name on the Hugging Face Hub, as of `open_checkpoint`.
      precision: anything that `get_precision` reads.
      task: `classify`, `pair`, `regress`, `tag`, `lm` or `instruct`; None takes the head that is
        there.
      labels: names of the classes or tags.
      seed: of what is drawn.
      changes: fields of the model's config, such as `dropout=0.1`.

    Raises:
      ConfigError: what `load_checkpoint` raises, an unknown task, or a model of another family.

    Example:
      >>> import tempfile
      >>> from mpjax.models import encoder
      >>> from mpjax.models.hf import save_checkpoint
      >>> bert = encoder("bert-tiny", layers=1, width=16, heads=2, vocabulary=40, head="masked")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_checkpoint(f"{folder}/bert", bert, bert.init(jax.random.key(0)))
      ...     found = from_pretrained(f"{folder}/bert", "bf16", task="tag", labels=("N", "V"))
      >>> found.model.config.head, found.model.config.labels, found.tokenizer
      ('token', ('N', 'V'), None)
    """
    known = [*HEAD_OF, "lm", "instruct"]
    if task is not None and task not in known:
        raise ConfigError(f"task: unknown {task!r}; known: {' '.join(known)}")
    checkpoint = name if isinstance(name, Checkpoint) else open_checkpoint(name)
    kind = checkpoint.config.get("model_type")
    if task is not None and (task in HEAD_OF) != (kind == "bert"):
        wanted = "an encoder (BERT)" if task in HEAD_OF else "a decoder (Llama, GPT-2)"
        raise ConfigError(
            f"model {str(checkpoint.where)!r}: {task} takes {wanted}; its model_type is {kind!r}"
        )
    if task in HEAD_OF:
        model, params = _with_head(
            checkpoint, precision, HEAD_OF[task], tuple(labels), seed,
            1 if task == "regress" else len(labels), changes,
        )  # fmt: skip
    else:
        model, params = load_checkpoint(checkpoint, precision, **changes)
    return Pretrained(model, params, tokenizer_of(checkpoint, isinstance(model, Encoder)))


def tokenizer_of(checkpoint: Checkpoint, wordpiece: bool) -> WordPiece | Tokenizer | None:
    """Returns the tokenizer of a checkpoint; None where there is none."""
    text = checkpoint.tokenizer_json()
    if text is None:
        return None
    if wordpiece:
        return parse_wordpiece(text, f"checkpoint {str(checkpoint.where)!r}")
    return Tokenizer.from_text(text)


def _with_head(
    checkpoint: Checkpoint, precision: str | Precision, head: str, labels: tuple[str, ...],
    seed: int, classes: int, changes: Settings,
) -> tuple[Any, Params]:  # fmt: skip
    """Loads an encoder with a head of its own or a new one."""
    held = {
        own: theirs
        for own, theirs in _HEADS.items()
        if any(name.startswith(theirs) for name in checkpoint.tensors)
    }
    title = (checkpoint.config.get("architectures") or [""])[0]
    kind = {"BertForSequenceClassification": "class", "BertForTokenClassification": "token"}
    theirs = tuple((checkpoint.config.get("id2label") or {}).values())
    own_head = kind.get(title) == head and "labels" in held
    own_head = own_head and (len(theirs) == 1 if classes == 1 else set(labels) == set(theirs))
    own: Settings = {"head": head} | changes
    if own_head:
        new, unused = [], []
    else:
        new = [f"encoder/{head}/**"]
        unused = [f"{prefix}*" for prefix in held.values()]
        own |= {"classes": classes, "labels": labels}
    pools = EncoderConfig(head=head).pools and own.get("pool", "first") == "first"
    has_pooler = bool(fnmatch.filter(checkpoint.tensors, _POOLER))
    if has_pooler and not pools:
        unused.append(_POOLER)
    elif pools and not has_pooler:
        new.append("encoder/pooler/**")
    return load_checkpoint(
        checkpoint, precision, new=new, key=jax.random.key(seed), unused=unused, **own
    )
