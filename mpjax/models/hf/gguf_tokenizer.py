"""The tokenizer inside a GGUF file, as the text of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mpjax.errors import ConfigError, brief, printable
from mpjax.models.hf.gguf_reader import GgufField
from mpjax.typing import Json, Settings

_CONTROL, _USER = 3, 4  # kinds of tokens that merges do not produce
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# llama.cpp's name of a pre-tokenizer -> the pre-tokenizer.
_PIECES = {
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}


def gguf_special(path: Path, fields: Mapping[str, GgufField]) -> dict[str, int]:
    """Returns the ids of the special tokens that a GGUF file names, by the names of config.json.

    Raises:
      ConfigError: one that is no id.
    """
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "separator": "sep"}
    found = {}
    for name, ours in named.items():
        if (field := f"tokenizer.ggml.{name}_token_id") in fields:
            value = fields[field].contents()
            if type(value) is not int or not 0 <= value < 2**32:
                raise ConfigError(f"{path}: {field}={brief(value)} is no id; fetch it again")
            found[f"{ours}_token_id"] = value
    return found


def gguf_settings(path: Path, fields: Mapping[str, GgufField]) -> Settings:
    """Returns what a tokenizer_config.json would say of the tokenizer of a GGUF file.

    Raises:
      ConfigError: an id without a token.
    """
    tokens = _tokens(path, fields)
    settings: Settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {
        n.removesuffix("_id"): _token(path, tokens, i)
        for n, i in gguf_special(path, fields).items()
    }
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"].contents()
    return settings


def _tokens(path: Path, fields: Mapping[str, GgufField]) -> list[str]:
    field = fields.get("tokenizer.ggml.tokens")
    if not _are_texts(found := field and field.contents()):
        raise ConfigError(f"{path}: a tokenizer without tokens; fetch it again")
    return found


def _are_texts(found: object) -> TypeGuard[list[str]]:
    return isinstance(found, list) and all(isinstance(x, str) for x in found) and bool(found)


def _token(path: Path, tokens: list[str], i: int) -> str:
    if i >= len(tokens):
        raise ConfigError(f"{path}: token {i} of {len(tokens)} tokens; fetch it again")
    return tokens[i]


def gguf_tokenizer(path: Path, fields: Mapping[str, GgufField]) -> str:
    """Returns a tokenizer.json with the vocabulary and merges of a GGUF file.

    Args:
      path: for errors.
      fields: its settings.

    Raises:
      ConfigError: a tokenizer that is no byte-level BPE, or cuts texts in a way that is not known,
        or parts of it that do not fit each other.
    """

    def value(name: str) -> Json:
        field = fields.get(f"tokenizer.ggml.{name}")
        return field and field.contents()

    kind, pieces = value("model"), value("pre")
    if kind != "gpt2" or not isinstance(pieces, str) or pieces not in _PIECES:
        raise ConfigError(
            f"{path}: tokenizer {brief(kind)} with pieces {brief(pieces)}; expected 'gpt2' with"
            f" {' or '.join(map(repr, _PIECES))}; take the tokenizer.json of this model"
        )
    tokens, kinds, merges = _tokens(path, fields), value("token_type"), value("merges")
    if not _are_texts(merges) or not all(" " in merge[1:-1] for merge in merges):
        raise ConfigError(f"{path}: a tokenizer without pairs to merge; fetch it again")
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the package raises nothing narrower
        raise ConfigError(
            f"{path}: merges that are not of its tokens ({printable(str(error), 200)}); fetch it"
            " again"
        ) from None
    tokenizer.pre_tokenizer = _PIECES[pieces]
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=one == _CONTROL, normalized=False)
        for token, one in zip(tokens, kinds if isinstance(kinds, list) else [], strict=False)
        if one in (_CONTROL, _USER)
    ]
    tokenizer.add_tokens(added)  # in one call, because each call scans all tokens
    special = gguf_special(path, fields)
    begin, end = (
        [_token(path, tokens, special[f"{name}_token_id"])]
        if value(f"add_{name}_token") and f"{name}_token_id" in special
        else []
        for name in ("bos", "eos")
    )
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B", *end],
            special_tokens=[(token, vocabulary[token]) for token in {*begin, *end}],
        )
    return tokenizer.to_str()
