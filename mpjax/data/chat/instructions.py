"""Instructions and their answers as sequences whose loss is taken on the answer only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mpjax.data.tokenizers.tokenizer import Tokenizer
from mpjax.data.tokenizers.wordpiece import Example
from mpjax.errors import ConfigError

logger = logging.getLogger("mpjax.data")
Part = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]  # ids, which are taught


def _ids(encode: Callable[[str], ArrayLike], text: str) -> np.ndarray:
    ids = np.asarray(encode(text))
    if ids.size and ids.dtype.kind not in "iu":
        raise ConfigError(f"encode: gives {ids.dtype.name}; expected token ids, which are integers")
    return ids.astype(np.int32)


def instruction_examples(
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[str], ArrayLike],
    *,
    end: int,
    longest: int,
) -> list[Example]:
    """Joins prompts and answers; the prompt's tokens have weight 0.

    Args:
        pairs: (prompt, answer), the prompt with all that a chat template puts around it.
        encode: text -> ids, such as `Tokenizer.encode`, of which the tokens before a text stand
            before the prompt alone.
        end: id that ends an answer.
        longest: tokens at most; a pair that is longer is left out, which is logged, because an
            answer that is cut teaches to stop anywhere.

    Returns:
        ``{"inputs", "targets", "weights", "keep"}`` of each, as a decoder's loss takes them: int32,
        int32 shifted by one, float32 1 where the target is of the answer or its end, and True.

    Raises:
        ConfigError: an empty prompt or answer, or no pair is short enough.

    Example:
        >>> one = instruction_examples([("ab", "c")], lambda t: list(t.encode()), end=0, longest=8)
        >>> one[0]["inputs"].tolist(), one[0]["targets"].tolist(), one[0]["weights"].tolist()
        ([97, 98, 99], [98, 99, 0], [0.0, 1.0, 1.0])
    """
    begin = go_on = encode
    if isinstance(own := getattr(encode, "__self__", None), Tokenizer):
        begin, go_on = own.prompt, functools.partial(own.encode, special=False)

    def parts() -> Iterator[Part]:
        for number, (prompt, answer) in enumerate(pairs):
            first, second = _ids(begin, prompt), _ids(go_on, answer)
            if not len(first) or not len(second):
                raise ConfigError(f"pair {number}: empty prompt or answer; drop it or fill it in")
            ids = np.concatenate([first, second, np.array([end], np.int32)])
            yield ids, np.arange(len(ids)) >= len(first)

    return taught_examples(parts(), "pairs", len(pairs), longest)


def taught_examples(parts: Iterable[Part], what: str, count: int, longest: int) -> list[Example]:
    """Sequences that predict their next ids, with weight 1 where these are taught.

    Args:
        parts: (ids, whether each is taught).
        what: they are, in messages.
        count: of what they were made of.
        longest: tokens at most; a part that is longer is left out, which is logged.

    Raises:
        ConfigError: none is short enough.
    """
    examples, left = [], 0
    for ids, taught in parts:
        if len(ids) - 1 > longest:
            left += 1
            continue
        examples.append(
            {
                "inputs": np.array(ids[:-1], np.int32),
                "targets": np.array(ids[1:], np.int32),
                "weights": np.array(taught[1:], np.float32),
                "keep": np.ones(len(ids) - 1, bool),
            }
        )
    if not examples:
        raise ConfigError(f"{what}: none of {count} fits {longest} tokens; raise longest")
    if left:
        logger.warning(
            "%d of %d %s are longer than %d tokens; left out",
            left, left + len(examples), what, longest,
        )  # fmt: skip
    return examples
