"""Instructions and their answers as sequences whose loss is taken on the answer only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mpjax.data.tokenizers.tokenizer import Tokenizer
from mpjax.data.tokenizers.wordpiece import Example
from mpjax.errors import ConfigError

logger = logging.getLogger("mpjax.data")


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
    examples = []
    for number, (prompt, answer) in enumerate(pairs):
        first, second = _ids(begin, prompt), _ids(go_on, answer)
        if not len(first) or not len(second):
            raise ConfigError(f"pair {number}: empty prompt or answer; drop it or fill it in")
        ids = np.concatenate([first, second, np.array([end], np.int32)])
        if len(ids) - 1 > longest:
            continue
        weights = np.concatenate([np.zeros(len(first) - 1), np.ones(len(second) + 1)])
        examples.append(
            {
                "inputs": ids[:-1],
                "targets": ids[1:],
                "weights": weights.astype(np.float32),
                "keep": np.ones(len(weights), bool),
            }
        )
    if not examples:
        raise ConfigError(f"pairs: none of {len(pairs)} fits {longest} tokens; raise longest")
    if left := len(pairs) - len(examples):
        logger.warning(
            "%d of %d pairs are longer than %d tokens; left out", left, len(pairs), longest
        )
    return examples
