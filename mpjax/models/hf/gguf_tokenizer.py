"""The tokenizer inside a GGUF file, as the text of a tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mpjax.errors import ConfigError

_CONTROL, _USER = 3, 4  # kinds of tokens that are no result of merges
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# How texts are cut before merging, by llama.cpp's name for it.
_PIECES = {
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}


def gguf_special(reader: Any) -> dict[str, int]:
    """Returns the ids of the special tokens that a GGUF file names, by the names of config.json."""
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "separator": "sep"}
    fields = {ours: f"tokenizer.ggml.{name}_token_id" for name, ours in named.items()}
    return {
        f"{ours}_token_id": int(reader.fields[field].contents())
        for ours, field in fields.items()
        if field in reader.fields
    }


def gguf_settings(reader: Any) -> dict[str, Any]:
    """Returns what a tokenizer_config.json would say of the tokenizer of a GGUF file."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {n.removesuffix("_id"): tokens[i] for n, i in gguf_special(reader).items()}
    if "tokenizer.chat_template" in reader.fields:
        settings["chat_template"] = reader.fields["tokenizer.chat_template"].contents()
    return settings


def gguf_tokenizer(path: Path, reader: Any) -> str:
    """Returns a tokenizer.json with the vocabulary and merges of a GGUF file.

    Args:
      path: for errors.
      reader: from `open_gguf`.

    Raises:
      ConfigError: a tokenizer that is no byte-level BPE, or cuts texts in a way that is not known.
    """
    fields = reader.fields

    def value(name: str) -> object:
        name = f"tokenizer.ggml.{name}"
        return fields[name].contents() if name in fields else None

    kind, pieces = value("model"), value("pre")
    if kind != "gpt2" or pieces not in _PIECES:
        raise ConfigError(
            f"{path}: tokenizer {kind!r} with pieces {pieces!r}; expected 'gpt2' with"
            f" {' or '.join(map(repr, _PIECES))}; take the tokenizer.json of this model"
        )
    tokens, kinds, merges = value("tokens"), value("token_type"), value("merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise ConfigError(f"{path}: a tokenizer without tokens or merges; fetch it again")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = _PIECES[str(pieces)]
    tokenizer.decoder = decoders.ByteLevel()
    for token, one in zip(tokens, kinds if isinstance(kinds, list) else [], strict=False):
        if one in (_CONTROL, _USER):
            tokenizer.add_tokens([AddedToken(token, special=one == _CONTROL, normalized=False)])
    special = gguf_special(reader)
    begin, end = (
        [tokens[special[f"{name}_token_id"]]]
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
