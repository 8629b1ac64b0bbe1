"""The ids that a tokenizer's post-processor puts around a text: BOS, EOS, [CLS], [SEP]."""

from __future__ import annotations

import tokenizers

_PROBES = 32  # ids whose texts are tried


def ids_around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids before and behind a text, whatever kind of post-processor asks for them.

    Example:
        >>> from tokenizers import Tokenizer, models, processors
        >>> backend = Tokenizer(models.BPE({"<s>": 0, "a": 1}, []))
        >>> backend.post_processor = processors.TemplateProcessing(
        ...     single="<s> $A", special_tokens=[("<s>", 0)]
        ... )
        >>> ids_around(backend)
        ((0,), ())
    """
    if backend.post_processor is None:
        return (), ()
    known = [backend.decode([i], skip_special_tokens=False) for i in range(_PROBES)]
    for text in ("a", "0", *known):  # the first that the vocabulary has ids for
        if count := len(backend.encode(text, add_special_tokens=False).ids):
            one = backend.encode(text)
            first = one.special_tokens_mask.index(0) if 0 in one.special_tokens_mask else 0
            return tuple(one.ids[:first]), tuple(one.ids[first + count :])
    return (), ()
