"""What a run trains on: examples, the objective, and how weights are judged."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mpjax.data import Tokenizer, WordPiece
from mpjax.precision import Precision
from mpjax.typing import Params

Scores = dict[str, float]
Judge = Callable[[Params], Scores]
Tokens = WordPiece | Tokenizer
Lines = list[tuple[str, str]]  # what was read, as (what, how much)
_LADDER = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run trains on, once its model and its tokenizer are known.

    Args:
      task: of `mpjax.tasks`.
      batches: endless, in the order of the seed; their position can be saved.
      epoch: steps in which every example is seen once.
      judge: a model -> weights -> scores on held-out data.
      metric: the score that ranks weights by default.
      lines: what was read.
      fingerprint: of the data as ids, which a resumed run must find again.
    """

    task: Any
    batches: Any
    epoch: int
    judge: Callable[[Any], Judge]
    metric: str
    lines: Lines
    fingerprint: str


class Source(Protocol):
    """Data that has been read, before it is tokenised."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of classes or tags."""
        ...

    def tokenizer(self) -> Tokens:
        """Returns a tokenizer that is trained on the training side."""
        ...

    def new_model(self, precision: str | Precision, vocabulary: int) -> Any:
        """Returns a model without weights."""
        ...

    def work(self, tokens: Any, labels: tuple[str, ...]) -> Work:
        """Returns what is trained, with labels in the order of the model's logits."""
        ...


def lengths_of(sizes: Sequence[int], longest: int) -> tuple[int, ...]:
    """Returns the lengths that examples are padded to: few, and none that no example needs."""
    ladder = [length for length in _LADDER if length < longest] + [longest]
    needed = {next(length for length in ladder if size <= length) for size in sizes}
    return tuple(sorted(needed | {longest}))


def fingerprint(tokenizer: Tokens, sides: Sequence[Any]) -> str:
    """Returns a hash of a tokenizer and of ids: arrays, or examples with arrays."""
    found = hashlib.sha256(tokenizer.to_text().encode())
    for side in sides:
        for one in [side] if isinstance(side, np.ndarray) else side:
            for x in one.values() if isinstance(one, Mapping) else [one]:
                found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:16]


def told_sizes(examples: Sequence[Mapping[str, Any]], name: str, longest: int) -> Lines:
    """Returns how long examples are, in tokens."""
    sizes = np.array([len(example[name]) for example in examples])
    middle, most = (int(np.quantile(sizes, q, method="higher")) for q in (0.5, 0.95))
    cut = int((sizes >= longest).sum())
    return [("tokens", f"median {middle}, 95 % up to {most}, longest {sizes.max()}"),
            (f"of {longest} tokens, perhaps cut", f"{cut} of {len(sizes)}")]  # fmt: skip
