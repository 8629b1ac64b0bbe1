"""Sequence to sequence: pairs of texts as batches, and translations of texts.

Shapes: B batch, S source tokens, T target tokens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import ops
from mpjax.data.buckets import Example, eval_batches
from mpjax.data.pairs import Pair
from mpjax.errors import ConfigError
from mpjax.models import Seq2Seq
from mpjax.models.inference.beam import check_beams
from mpjax.models.inference.generate import beam_search, generate
from mpjax.models.inference.settings import CacheStorage, Count, as_cache
from mpjax.tasks.language import Language
from mpjax.typing import ModelState, Params

logger = logging.getLogger("mpjax.tasks")


class Tokens(Protocol):
    """What is read of a tokenizer."""

    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...


def _plain(tokens: Tokens, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text alone: a target has its own begin and end, and a source none."""
    before, behind = (len(getattr(tokens, name, ())) for name in ("prefix", "suffix"))
    return [ids[before : len(ids) - behind] for ids in tokens.encode_batch(texts)]


@dataclasses.dataclass(frozen=True)
class _Continued:
    """An encoder-decoder that has read its source, as `generate` continues any model."""

    model: Seq2Seq

    @property
    def config(self) -> Any:
        return self.model.config

    def init_cache(self, batch: int, length: int) -> dict[str, Any]:
        del batch, length  # `start` has made it
        return {}

    def apply(self, params: Params, ids: Any, *, state: ModelState) -> Any:
        return self.model.apply(params, ids, state=state)


@dataclasses.dataclass(frozen=True)
class Translation:
    """A target text for each source text; both sides share one tokenizer.

    Args:
      tokens: the tokenizer; behind its ids come one that begins a target and one that ends it.
    """

    tokens: Tokens

    @property
    def begin(self) -> int:
        """The id that a target begins with."""
        return self.tokens.vocab_size

    @property
    def end(self) -> int:
        """The id that ends a target."""
        return self.tokens.vocab_size + 1

    @property
    def vocabulary(self) -> int:
        """How many ids the model has."""
        return self.tokens.vocab_size + 2

    def _sources(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        ids = [one.astype(np.int32) for one in _plain(self.tokens, texts)]
        return [{"source": one, "source_keep": np.ones(len(one), bool)} for one in ids]

    def fitting(self, pairs: Sequence[Pair], *, longest: int) -> list[Pair]:
        """Returns the pairs of which neither side has too many tokens; others are logged.

        Args:
          pairs: (source, target) texts.
          longest: tokens a side; a target's end counts.

        Raises:
          ConfigError: none is left, or a limit below 2.
        """
        if longest < 2:
            raise ConfigError(f"longest={longest}: no room for a token and the end; give 2 or more")
        sources, targets = (_plain(self.tokens, [p[side] for p in pairs]) for side in (0, 1))
        sizes = [max(len(a), len(b) + 1) for a, b in zip(sources, targets, strict=True)]
        keep = np.array(sizes, int) <= longest
        if not keep.any():
            raise ConfigError(
                f"pairs: none of {len(pairs)} fits {longest} tokens a side; raise the lengths"
            )
        if not keep.all():
            logger.warning(
                "%d of %d pairs are longer than %d tokens a side and are left out",
                (~keep).sum(), len(keep), longest,
            )  # fmt: skip
        return [pair for pair, fits in zip(pairs, keep, strict=True) if fits]

    def examples(self, pairs: Sequence[Pair]) -> list[Example]:
        """Returns what the model reads of each pair: a target moved by one, and its weights."""
        targets = _plain(self.tokens, [target for _, target in pairs])
        found: list[Example] = []
        for source, ids in zip(self._sources([s for s, _ in pairs]), targets, strict=True):
            target = np.array([self.begin, *ids, self.end], np.int32)
            weights = np.ones(len(target) - 1, np.float32)
            found.append(
                source | {"inputs": target[:-1], "targets": target[1:], "weights": weights}
            )
        return found

    def objective(self, model: Seq2Seq) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`."""
        return Language().objective(model)

    def judge(
        self, model: Seq2Seq, *, batch: int, lengths: Sequence[int]
    ) -> Callable[[Params, Sequence[Example]], dict[str, float]]:
        """Returns a function (params, examples) -> `loss` in nats a token and `perplexity`."""
        evaluate = Language().judge(model)

        def judged(params: Params, examples: Sequence[Example]) -> dict[str, float]:
            batches = []
            for rows, padded in eval_batches(examples, batch=batch, lengths=lengths):
                padded["weights"][len(rows) :] = 0  # rows that only fill the batch up
                batches.append(padded)
            return evaluate(params, batches)

        return judged

    def translator(
        self,
        model: Seq2Seq,
        *,
        batch: int,
        lengths: Sequence[int],
        beams: Count = 1,
        cache: CacheStorage = "",
    ) -> Callable[[Params, Sequence[str]], list[str]]:
        """Returns a function (params, texts) -> their translations, of at most max(lengths) tokens.

        Args:
          model: the encoder-decoder.
          batch: texts at a time.
          lengths: what sources are padded to.
          beams: 1 takes the likeliest token each time, more search that wide.
          cache: storage of the target's keys and values, such as `int8`; by default the products'
            compute dtype.

        Raises:
          ConfigError: no beam, or a storage that is unknown.
        """
        beams, storage = check_beams(beams, 1.0)[0], as_cache(cache)
        longest, continued = max(lengths), _Continued(model)
        read = jax.jit(
            lambda params, source, keep: model.start(
                params, source, length=longest, source_keep=keep, storage=storage
            )
        )

        def translate(params: Params, texts: Sequence[str]) -> list[str]:
            found = [""] * len(texts)
            for rows, padded in eval_batches(self._sources(texts), batch=batch, lengths=lengths):
                state = read(params, padded["source"], padded["source_keep"])
                first = jnp.full((len(padded["source"]), 1), self.begin, jnp.int32)
                options: dict[str, Any] = dict(new=longest, end=self.end, state=state)
                if beams > 1:
                    ids = beam_search(continued, params, first, beams=beams, **options).tokens[:, 0]
                else:
                    ids = generate(continued, params, first, temperature=0.0, **options)
                for row, one in zip(rows, np.asarray(ids), strict=False):
                    known = one[: np.argmax(one == self.end)] if self.end in one else one
                    # a model may write its begin again, which is no text
                    found[row] = self.tokens.decode(known[known < self.begin])
            return found

        return translate
