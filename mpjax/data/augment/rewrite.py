"""Rewritten data: texts through two translators, and tokens from a masked-language model.

A model of ours runs over the data once, before the training; what comes of it is data like other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from mpjax.data.augment.token_noise import text_places
from mpjax.data.augment.transform import check_rate
from mpjax.data.buckets import Example
from mpjax.data.tokenizers.wordpiece import WordPiece
from mpjax.errors import ConfigError, brief, is_whole

logger = logging.getLogger("mpjax.data")

Translate = Callable[[Sequence[str]], Sequence[str]]


def contextual_replacement(
    examples: Sequence[Example],
    predict: Callable[[Sequence[Example]], Sequence[np.ndarray]],
    pieces: WordPiece,
    *,
    rate: float = 0.15,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 32,
) -> list[Example]:
    r"""Returns examples in which tokens are drawn from a masked-language model's predictions.

    Of each example $\max(1, \lfloor \alpha l \rfloor)$ of $l$ tokens of text are masked, all at
    once, and drawn from softmax$(z / \tau)$ of the logits there. Special tokens are neither masked
    nor drawn. Labels and other fields stay.

    Args:
        examples: of the training side.
        predict: examples -> logits (T, V) of each, as `mpjax.tasks.predictor(model, "masked", ...)`
            with its parameters.
        pieces: tokenizer of both.
        rate: $\alpha$.
        temperature: $\tau$; a low one takes the likeliest token.
        seed: of masks and tokens; each example has a generator of its own.
        batch: examples that `predict` gets at a time.

    Returns:
        As many examples; train on them beside the others.

    Raises:
        ConfigError: a setting out of range, an example without text, logits of another shape or
            that are not finite.

    Example:
        >>> from mpjax.data import train_wordpiece
        >>> pieces = train_wordpiece(["the food was good"], 60)
        >>> examples = pieces.encode(["the food was good"], longest=8)
        >>> was = pieces.pieces("was")[0]
        >>> def predict(examples):  # which knows one word
        ...     return [9.0 * np.eye(60)[np.full(len(e["ids"]), was)] for e in examples]
        >>> new = contextual_replacement(examples, predict, pieces, rate=0.5, temperature=0.1)
        >>> pieces.tokens(new[0]["ids"])
        ['[CLS]', 'the', 'food', 'was', 'was', '[SEP]']

    References:
        Kobayashi 2018, Contextual Augmentation, section 2; Kumar et al. 2020, Data Augmentation
        using Pre-trained Transformer Models, section 3.
    """
    check_rate("contextual_replacement", "rate", rate)
    if not (isinstance(temperature, int | float) and 0 < temperature < np.inf):
        raise ConfigError(
            f"contextual_replacement: temperature={brief(temperature)}; give a number above 0"
        )
    if not (is_whole(batch, 1) and is_whole(seed, 0)):
        raise ConfigError(
            f"contextual_replacement: batch={brief(batch)} seed={brief(seed)}; expected a batch of"
            " 1 or above and a seed of 0 or above, whole numbers"
        )
    found: list[Example] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        draws = [np.random.default_rng((seed, start + i, 3)) for i in range(len(part))]
        hidden, masked = [], []
        for example, draw in zip(part, draws, strict=True):
            places = text_places(example, pieces, "contextual_replacement")
            count = max(1, int(rate * len(places))) if rate else 0
            places = draw.choice(places, count, replace=False)
            ids = np.array(example["ids"])
            ids[places] = pieces.mask
            hidden.append(places)
            masked.append({**example, "ids": ids})
        logits = predict(masked)
        if len(logits) != len(part):
            raise ConfigError(
                f"contextual_replacement: predict gives {len(logits)} for {len(part)} examples;"
                " give the logits (T, V) of each"
            )
        for each, places, draw, scores in zip(masked, hidden, draws, logits, strict=True):
            new = np.array(each["ids"])
            new[places] = _drawn(scores, places, len(new), pieces, temperature, draw)
            found.append({**each, "ids": new})
    return found


def _drawn(
    logits: np.ndarray, places: np.ndarray, length: int, pieces: WordPiece, temperature: float,
    draw: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Tokens drawn at some places; the largest of logits plus Gumbel noise is one draw."""
    if np.ndim(logits) != 2 or len(logits) < length or np.shape(logits)[1] < pieces.vocab_size:
        raise ConfigError(
            f"contextual_replacement: predict gives {brief(logits)}; expected logits of"
            f" ({length}, {pieces.vocab_size}), those of a masked-language model"
        )
    own = np.asarray(logits)[places, : pieces.vocab_size].astype(np.float64)
    if not np.isfinite(own).all():
        raise ConfigError(
            "contextual_replacement: logits are not finite; give a model that has been trained, or"
            " its Precision more range"
        )
    special = [pieces.pad, pieces.unknown, pieces.first, pieces.separator, pieces.mask]
    own[:, special] = -np.inf
    return np.argmax(own / temperature + draw.gumbel(size=own.shape), -1)


def back_translation(texts: Sequence[str], there: Translate, back: Translate) -> list[str]:
    """Returns texts translated into another language and back.

    A text whose translation is empty, on either way, stays as it is; how many is one logged line.

    Args:
        texts: of the training side.
        there: texts -> their translations; such as `mpjax.tasks.Translation.translator` with its
            parameters.
        back: the other way.

    Raises:
        ConfigError: a translator that gives another number of texts, or something else.

    Example:
        >>> german, english = {"good food": "gutes Essen"}, {"gutes Essen": "nice food"}
        >>> translate = lambda words: lambda texts: [words[text] for text in texts]
        >>> back_translation(["good food"], translate(german), translate(english))
        ['nice food']

    References:
        Sennrich et al. 2016, Improving Neural Machine Translation Models with Monolingual Data,
        section 3; Yu et al. 2018, QANet, section 3 (paraphrases).
    """
    foreign = _translated(list(texts), there, "there")
    lost = {i for i, text in enumerate(foreign) if not text.strip()}
    known = [i for i in range(len(texts)) if i not in lost]
    found = list(texts)
    returned = _translated([foreign[i] for i in known], back, "back") if known else []
    for place, text in zip(known, returned, strict=True):
        if text.strip():
            found[place] = text
        else:
            lost.add(place)
    if lost:
        logger.warning("%d of %d texts have no translation and stay", len(lost), len(texts))
    return found


def _translated(texts: list[str], translate: Translate, name: str) -> list[str]:
    found = list(translate(texts))
    if len(found) != len(texts) or not all(isinstance(text, str) for text in found):
        raise ConfigError(
            f"back_translation: {name} gives {brief(found)} for {len(texts)} texts; expected a text"
            " for each"
        )
    return found
