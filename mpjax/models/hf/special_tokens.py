"""What tokenizer_config.json says of the tokens around a text, put into the tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, processors

_FLAGS = {"add_bos_token": "bos_token", "add_eos_token": "eos_token"}


def with_flags(text: str, settings: Mapping[str, Any]) -> str:
    """Returns a tokenizer.json whose template does what the flags say, as in transformers.

    Args:
      text: a tokenizer.json.
      settings: of a tokenizer_config.json; without `add_bos_token` and `add_eos_token` the
        tokenizer.json itself decides.
    """
    if not set(_FLAGS) & set(settings):
        return text
    backend = Tokenizer.from_str(text)
    around = {}
    for flag, name in _FLAGS.items():
        token: Any = settings.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        known = isinstance(token, str) and backend.token_to_id(token) is not None
        around[name] = [token] if settings.get(flag) and known else []
    begin, end = around["bos_token"], around["eos_token"]

    def side(letter: str, kind: int) -> list[str]:
        return [f"{token}:{kind}" for token in (*begin, f"${letter}", *end)]

    backend.post_processor = processors.TemplateProcessing(
        single=side("A", 0),
        pair=side("A", 0) + side("B", 1),
        special_tokens=[(t, backend.token_to_id(t)) for t in dict.fromkeys((*begin, *end))],
    )
    return backend.to_str()
