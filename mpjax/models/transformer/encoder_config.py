"""Sizes and choices of the encoder, by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from mpjax.errors import ConfigError
from mpjax.models.core.sizes import FieldValue, named_config
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.typing import Settings

_TASK_HEAD = re.compile(r"(?P<name>[A-Za-z]\w*)=(?P<kind>token|class):(?P<classes>[1-9]\d{0,8})")
_OUTPUTS = ("features", "pooled", "masked", "next", "class", "token")  # of every encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(BlockConfig):
    """Shape of a bidirectional encoder; the defaults are BERT's.

    Args:
      types: number of token types; 0 is no such embedding.
      head: `none` (features and pooled), `masked` (tokens), `pretrain` (tokens, and whether the
        second sentence is the next), `class` (of a text or a pair) or `token` (of each token).
      classes: of the heads `class` and `token`; 1 is regression, see `mpjax.tasks.TextRegression`.
      labels: names of the classes in the order of the logits; empty if they have none.
      pool: input of the heads `none`, `pretrain` and `class`: the `first` token through BERT's
        pooler, or the `mean` of all tokens that are no padding.
      task_heads: heads of several tasks beside `head`, as `NAME=token:CLASSES` (of each token) or
        `NAME=class:CLASSES` (of a text or a pair); the output has the name.

    Raises:
      ConfigError: a value outside its range or choices.
    """

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = BlockConfig.CHOICES | {
        "head": ("none", "masked", "pretrain", "class", "token"),
        "pool": ("first", "mean"),
    }
    OPTIONAL: ClassVar[tuple[str, ...]] = (*BlockConfig.OPTIONAL, "types")
    COUNTS: ClassVar[tuple[str, ...]] = (*BlockConfig.COUNTS, "classes")

    vocabulary: int = 30522
    context: int = 512
    norm: str = "layer"
    norm_first: bool = False
    norm_embed: bool = True
    position: str = "learned"
    activation: str = "gelu_exact"
    bias: bool = True
    epsilon: float = 1e-12
    types: int = 2
    head: str = "none"
    classes: int = 2
    labels: Sequence[str] = ()  # stored as a tuple
    pool: str = "first"
    task_heads: Sequence[str] = ()  # stored as a tuple

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_task_heads()
        if isinstance(self.labels, str) or not all(isinstance(x, str) for x in self.labels):
            raise ConfigError(
                f"model: labels={self.labels!r}; give the name of each class, such as"
                " labels=('negative', 'positive')"
            )
        object.__setattr__(self, "labels", tuple(self.labels))  # a list if it was read from JSON
        if self.labels and self.head not in ("class", "token"):
            raise ConfigError(
                f"model: head={self.head!r} has no classes that labels could name; leave them out,"
                " or set head='class' or head='token'"
            )
        if self.labels and len(self.labels) != self.classes:
            raise ConfigError(
                f"model: {len(self.labels)} labels {self.labels} for classes={self.classes}; give"
                " one for each class"
            )
        if self.pool != "first" and not self.pools:
            raise ConfigError(
                f"model: head={self.head!r} pools nothing, pool={self.pool!r}; leave pool out"
            )

    def _check_task_heads(self) -> None:
        heads = self.task_heads
        if isinstance(heads, str) or not all(isinstance(x, str) for x in heads):
            raise ConfigError(f"model: task_heads={heads!r}; give such as ('tags=token:48',)")
        object.__setattr__(self, "task_heads", tuple(heads))
        found = [_TASK_HEAD.fullmatch(head) for head in heads]
        for head, match in zip(heads, found, strict=True):
            if match is None or match["name"] in _OUTPUTS:
                raise ConfigError(
                    f"model: task head {head!r}; give NAME=token:CLASSES or NAME=class:CLASSES with"
                    f" a name of letters, digits and _ that is none of {' '.join(_OUTPUTS)}"
                )
        names = [match["name"] for match in found if match]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"model: two task heads are named {twice[0]!r}; rename one")

    @property
    def task_shapes(self) -> dict[str, tuple[str, int]]:
        """Name of each task head -> `token` or `class`, and its classes."""
        found = filter(None, map(_TASK_HEAD.fullmatch, self.task_heads))
        return {match["name"]: (match["kind"], int(match["classes"])) for match in found}

    @property
    def pools(self) -> bool:
        """Whether the outputs hold `pooled`."""
        kinds = [kind for kind, _ in self.task_shapes.values()]
        return self.head in ("none", "pretrain", "class") or "class" in kinds


_SIZES: dict[str, Settings] = {
    "bert-tiny": dict(layers=2, width=128, heads=2),
    "bert-mini": dict(layers=4, width=256, heads=4),
    "bert-base": dict(layers=12, width=768, heads=12),
    "bert-large": dict(layers=24, width=1024, heads=16),
    "minilm-l6": dict(layers=6, width=384, heads=12),
}


def encoder_sizes() -> tuple[str, ...]:
    """Returns the names of all sizes."""
    return tuple(_SIZES)


def encoder_config(size: str | EncoderConfig, **changes: FieldValue) -> EncoderConfig:
    """Returns the configuration of a named size with some fields changed.

    Args:
      size: a name that `encoder_sizes` lists, or an EncoderConfig.
      changes: fields of EncoderConfig.

    Raises:
      ConfigError: unknown size or field.

    Example:
      >>> encoder_config("minilm-l6").hidden
      1536

    References:
      Devlin et al. 2019 (BERT); Turc et al. 2019 (tiny, mini); Wang et al. 2020 (MiniLM).
    """
    labels = changes.get("labels")
    if isinstance(labels, Sequence) and labels and "classes" not in changes:
        changes = changes | {"classes": len(labels)}
    if isinstance(size, EncoderConfig) and "labels" not in changes:
        same = (changes.get("head", size.head), changes.get("classes", size.classes))
        if same != (size.head, size.classes):  # names of another head's classes
            changes = changes | {"labels": ()}
    return named_config(EncoderConfig, _SIZES, size, changes)
