"""Bounds on what a tokenizer.json costs, from its text alone."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator

from mpjax.errors import ConfigError, brief, printable
from mpjax.typing import Json, Settings

_SPARSE, _SPARE = 4, 1000  # the largest id is at most 4 * tokens + 1000
_MOST_AROUND = 64  # parts of a post-processor's templates
_MOST_PARTS = 16  # of a sequence of normalizers, pre-tokenizers or decoders
_MOST_GROWN = 4.0  # factor by which a text may grow
_LONGEST_TOKEN, _LONGEST_AFFIX, _LONGEST_WORD = 1024, 16, 1000  # characters
_MARKED = re.compile(r"<[^ ]*>|\[[A-Za-z0-9_]*\]")  # tokens that ordinary text lacks

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Published regexes that repeat something; their time is linear in an ordinary text.
_KNOWN = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _LETTERS + r"\p{N}{1,3}" + _OTHERS,  # Llama 3
    _LETTERS + r"\p{N}" + _OTHERS,  # Qwen 2
    _LETTERS + r"\p{N}+" + _OTHERS,
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASES[0]}*{_CASES[1]}+{_SHORT}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CASES[0]}+{_CASES[1]}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # GPT-4o
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM
    " {2,}", r"\s+", r"\d+", r"\p{N}+", r"\p{L}+", r"\p{N}{1,3}", r"\w+|[^\w\s]+",
}  # fmt: skip
_NO_REPEAT = re.compile(r"(?:[^*+{?\\(]|\\p\{\w+\}|\\[dDsSwWrnt])+")


def check_ids(fields: Settings, where: str, remedy: str) -> None:
    """Refuses ids that no model could have.

    Args:
      fields: of a tokenizer.json.
      where: the file, for errors.
      remedy: what to do about it.

    Raises:
      ConfigError: no tokens; an id that is no integer, negative, far above the number of tokens, or
        around a text and no token's.
    """
    vocabulary = fields["model"].get("vocab") if isinstance(fields["model"], dict) else None
    if not isinstance(vocabulary, dict | list):
        raise ConfigError(f"{where}: a tokenizer without a vocabulary; {remedy}")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [one.get("id") for one in _dicts(fields.get("added_tokens"))]
    most = _SPARSE * (len(ids) + len(added)) + _SPARE
    if not ids and not added:
        raise ConfigError(f"{where}: a tokenizer without tokens; {remedy}")
    _check(itertools.chain(ids, added), most, f"{len(ids) + len(added)} tokens", where, remedy)
    largest = max(itertools.chain(ids, added))
    around = list(_around(fields.get("post_processor")))
    _check(around, largest + 1, "ids around a text", where, remedy)


def _check(ids: Iterable[Json], most: int, what: str, where: str, remedy: str) -> None:
    ids = list(ids)
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < most)):
        return
    wrong = next(i for i in ids if type(i) is not int or not 0 <= i < most)
    raise ConfigError(
        f"{where}: id {brief(wrong)} in {what}; expected integers of 0 to {most - 1}; {remedy}"
    )


def _dicts(value: Json) -> list[Settings]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _around(processor: Json) -> Iterator[Json]:
    """The ids that a post-processor names."""
    if not isinstance(processor, dict):
        return
    for one in _dicts(processor.get("processors")):
        yield from _around(one)
    for name in ("sep", "cls"):
        if isinstance(pair := processor.get(name), list):
            yield from pair[1:2]
    special = processor.get("special_tokens")
    for token in _dicts(list(special.values())) if isinstance(special, dict) else ():
        yield from token["ids"] if isinstance(token.get("ids"), list) else ()


# Field of a tokenizer.json -> field of a Sequence that lists its parts.
_FIELDS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def unbounded(fields: Settings) -> str:
    """Returns the first part whose cost cannot be told, empty where all can.

    Args:
      fields: of a tokenizer.json whose ids are checked.

    Example:
      >>> model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
      >>> unbounded({"model": model})
      ''
      >>> split = {"type": "Split", "pattern": {"Regex": "a+"}}
      >>> unbounded({"model": model, "pre_tokenizer": split})
      'pre_tokenizer Split'
    """
    try:
        if not _plain_model(fields["model"]):
            return f"model {printable(str(fields['model'].get('type')), 40)}"
        if not all(map(_plain_token, fields.get("added_tokens") or [])):
            return "added_tokens"
        if not _plain_post_processor(fields.get("post_processor")):
            return "post_processor"
        for name, inside in _FIELDS.items():
            parts = list(_parts(fields.get(name), inside))
            for kind, part in parts:
                if not isinstance(kind, str) or not _plain_part(name, kind, part):
                    return f"{name} {printable(str(kind), 40)}"
            if len(parts) > _MOST_PARTS or math.prod(_grows(*one) for one in parts) > _MOST_GROWN:
                return f"{name} of {len(parts)} parts"
    except (AttributeError, KeyError, TypeError, ValueError):
        return "what it says"
    return ""


def _parts(value: Json, inside: str) -> Iterator[tuple[Json, Settings]]:
    """The normalizers, pre-tokenizers or decoders of one that may be a sequence of them."""
    if value is None:
        return
    if value["type"] == "Sequence":
        for one in value[inside]:
            yield from _parts(one, inside)
    else:
        yield value["type"], value


def _plain_model(model: Settings) -> bool:
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "Unigram":
        number = model.get("unk_id")
        return (
            type(number) is int
            and 0 <= number < len(vocabulary)
            and all(
                isinstance(token, str) and len(token) <= _LONGEST_TOKEN and math.isfinite(score)
                for token, score in vocabulary
            )
        )
    if not isinstance(vocabulary, dict) or max(map(len, vocabulary)) > _LONGEST_TOKEN:
        return False
    if kind == "BPE":
        return (
            not model.get("continuing_subword_prefix")
            and len(model.get("end_of_word_suffix") or "") <= _LONGEST_AFFIX
            and model.get("dropout") is None
            and (unknown is None or unknown in vocabulary)
        )
    if kind == "WordPiece":
        longest = model["max_input_chars_per_word"]
        fits = 0 <= longest <= _LONGEST_WORD
        return len(model["continuing_subword_prefix"]) <= _LONGEST_AFFIX and fits
    return kind == "WordLevel"


def _plain_token(token: Settings) -> bool:
    spaces = token["lstrip"] or token["rstrip"]  # searched around each occurrence
    content = token["content"]
    return 0 < len(content) <= _LONGEST_TOKEN and (not spaces or bool(_MARKED.fullmatch(content)))


def _plain_post_processor(processor: Json) -> bool:
    if processor is None:
        return True
    kind = processor["type"]
    if kind == "Sequence":
        found = processor["processors"]
        return len(found) <= 2 and all(
            one["type"] != "Sequence" and _plain_post_processor(one) for one in found
        )
    if kind == "TemplateProcessing":
        sequences = [part for part in processor["single"] if "Sequence" in part]
        return (
            len(sequences) == 1
            and len(processor["single"]) + len(processor["pair"]) <= _MOST_AROUND
            and all(len(one["ids"]) <= 4 for one in processor["special_tokens"].values())
        )
    return kind in ("ByteLevel", "BertProcessing", "RobertaProcessing")


# Parts whose cost is bounded whatever their settings, by field of the tokenizer.json.
_PLAIN = {
    "normalizer": {
        "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip",
        "StripAccents",
    },
    "pre_tokenizer": {
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation",
        "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    },
    "decoder": {"ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "WordPiece"},
}  # fmt: skip


def _plain_part(field: str, kind: str, part: Settings) -> bool:
    if kind in _PLAIN[field]:
        return True
    if kind == "Prepend":
        return len(part["prepend"]) <= _LONGEST_AFFIX
    if kind == "BPEDecoder":
        return len(part["suffix"]) <= _LONGEST_AFFIX
    if kind == "Strip":  # of a decoder
        return 0 <= part["start"] <= _LONGEST_AFFIX and 0 <= part["stop"] <= _LONGEST_AFFIX
    if kind in ("Replace", "Split"):
        return _plain_pattern(**part["pattern"])
    return False


def _plain_pattern(String: str | None = None, Regex: str | None = None) -> bool:
    if Regex is not None:
        return Regex in _KNOWN or bool(_NO_REPEAT.fullmatch(Regex))
    return bool(String)


def _grows(kind: str, part: Settings) -> float:
    """How many times longer a part can make an ordinary text."""
    if kind == "Replace":
        found = part["pattern"].get("String") or " "
        return max(1.0, len(part["content"]) / len(found))
    return 2.0 if kind == "ByteLevel" else 1.0
