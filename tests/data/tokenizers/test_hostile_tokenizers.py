"""Tokenizers of somebody else: bounded ids, time and memory; a panic of Rust is one line."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path

import pytest
import tokenizers

from mpjax.data import Tokenizer, make_tokenizer
from mpjax.data.chat.chat import Chat
from mpjax.data.tokenizers import tokenizer_file as file
from mpjax.data.tokenizers.tokenizer_bounds import unbounded
from mpjax.data.tokenizers.wordpiece import parse_wordpiece, train_wordpiece
from mpjax.errors import ConfigError
from tests.bounds import bounded
from tests.models.hf import text_cases

HUGE = 2**32 - 1
TEXT = "The quick brown fox, " * 300


def _fields() -> dict:
    """A byte-level BPE as it is published."""
    backend = text_cases.tokenizer(None)
    fields = json.loads(backend.to_str())
    assert unbounded(fields) == ""
    return fields


def with_(**changed) -> str:
    return json.dumps(_fields() | changed)


def model(**changed) -> str:
    return with_(model=_fields()["model"] | changed)


def token(content: str, number: int, **changed) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True} | flags | changed


def replace(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(regex: str) -> str:
    part = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return with_(pre_tokenizer=part)


def chain(*parts: dict) -> str:
    return with_(normalizer={"type": "Sequence", "normalizers": list(parts)})


def template(ids: list, times: int = 1) -> dict:
    a, s = ({k: {"id": n, "type_id": 0}} for k, n in (("Sequence", "A"), ("SpecialToken", "<s>")))
    special = {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}}
    single = [a, s] * times
    return {
        "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special
    }  # fmt: skip


def _letters() -> dict:
    known = {c: i + 1 for i, c in enumerate(sorted(set(file_text()) - {"x"}))}
    return {"x": 0} | known | {f"##{c}": i + len(known) for c, i in known.items()}


def file_text() -> str:
    from mpjax.data.tokenizers import tokenizer_child

    return tokenizer_child.TEXT


HOSTILE = {
    "an id of 2^32 - 1": lambda: (model(vocab={"a": HUGE}, merges=[]), "id 4294967295 in 4 tokens"),
    "an id of half a token": lambda: (model(vocab={"a": 0.5}, merges=[]), "id 0.5 in"),
    "an id below 0": lambda: (model(vocab={"a": -1}, merges=[]), "id -1 in"),
    "no tokens": lambda: (with_(model={"type": "BPE", "vocab": {}}, added_tokens=[]), "out tokens"),
    "no vocabulary": lambda: (with_(model={"type": "BPE"}), "without a vocabulary"),
    "an added id": lambda: (with_(added_tokens=[token("<e>", HUGE)]), "id 4294967295 in"),
    "an id around texts": lambda: (
        with_(post_processor={"type": "BertProcessing", "sep": ["[SEP]", HUGE], "cls": ["a", 1]}),
        "ids around a text",
    ),
    "an id in a template": lambda: (with_(post_processor=template([HUGE])), "ids around a text"),
    "a template that repeats": lambda: (
        with_(post_processor=template([1] * 300, 3000)), "takes more than .*post_processor"
    ),
    "replacements that grow": lambda: (chain(*[replace("e", "e" * 10)] * 8), "takes more"),
    "a replacement of nothing": lambda: (
        chain(replace("", "e" * 50), replace("", "e" * 50)), "takes more"
    ),
    "bytes of bytes": lambda: (
        chain({"type": "Prepend", "prepend": "é"}, *[{"type": "ByteLevel"}] * 20), "takes more"
    ),
    "a catastrophic regex": lambda: (split(r"(\w+\s?)+$"), "fails on plain text .*retry-limit"),
    "a quadratic regex": lambda: (split(r"\w[\s\S]*\b\B"), "takes more.*pre_tokenizer Split"),
    "a regex that is none": lambda: (split("(a"), "not a tokenizer.json .*unmatched"),
    "a table of replacements that is none": lambda: (
        with_(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}), "fails on"
    ),
    "a prefix longer than tokens": lambda: (
        model(vocab={"a": 0, "b": 1, "ab": 2}, merges=["a b"], continuing_subword_prefix="####"),
        "not a tokenizer.json .*out of range",
    ),
    "pieces of nothing": lambda: (
        with_(pre_tokenizer={"type": "FixedLength", "length": 0}), "non-zero"
    ),
    "a word as long as the text": lambda: (
        with_(
            pre_tokenizer=None,
            model={
                "type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**9, "vocab": _letters(),
            },
        ),
        "takes more.*model WordPiece",
    ),
    "a decoder that grows": lambda: (
        with_(decoder={"type": "Sequence", "decoders": [replace("a", "a" * 10)] * 9}), "takes more"
    ),
    "a decoder that strips what is not there": lambda: (
        with_(decoder={"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}), "bounds"
    ),
    "components without end": lambda: (chain(*[{"type": "NFKD"}] * 20_000), "takes more"),
    "a setting of another kind": lambda: (
        with_(truncation={"max_length": "x"}), "not a tokenizer.json .Cannot"
    ),
    "an unknown component": lambda: (with_(decoder={"type": "?"}), "not a tokenizer.json"),
    "a component that is a number": lambda: (with_(decoder=5), "not a tokenizer.json"),
    "tokens looked around": lambda: (
        with_(added_tokens=[token("e", 3, lstrip=True), token("<|endoftext|>", 4)]), None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_within_bounds(name, tmp_path, monkeypatch):
    assert file._SECONDS <= 3
    monkeypatch.setattr(file, "_SECONDS", 1.0)
    text, match = HOSTILE[name]()
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with bounded(path):
        if match is None:
            make_tokenizer(str(path), []).encode(TEXT)
        else:
            with pytest.raises(ConfigError, match=match) as error:
                make_tokenizer(str(path), []).encode(TEXT)
            assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - begun < 5
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - children < 7  # its start too


@pytest.mark.parametrize(
    "read",
    [
        lambda text: parse_wordpiece(text, "here"),
        lambda text: parse_wordpiece(text.encode(), "here"),
        lambda text: Chat(text, "", "<|endoftext|>"),
        Tokenizer.from_text,
    ],
    ids=["wordpiece", "wordpiece bytes", "chat", "tokenizer"],
)
def test_every_reader_goes_the_one_way(read):
    pytest.importorskip("jinja2")
    for text, match in (
        (model(vocab={"a": HUGE}, merges=[]), "id 4294967295"),
        (split("(a"), "un"),
    ):
        with pytest.raises(ConfigError, match=match):
            read(text)
    where = [
        path.name
        for path in sorted(Path(file.__file__).parents[2].rglob("*.py"))
        if "Tokenizer.from_" in path.read_text()
        and "tokenizers.Tokenizer.from_" in path.read_text()
    ]
    assert where == ["tokenizer_child.py", "tokenizer_file.py"]


def test_what_text_shows_later_is_one_line():
    whole = with_(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"})
    tokenizer = Tokenizer.from_text(whole)
    with pytest.raises(ConfigError, match="fails on this text .*UNK.*; fetch it again"):
        tokenizer.encode("b")

    class PanicException(BaseException):
        pass

    with pytest.raises(ConfigError, match="here: the tokenizer fails on this text .index out"):
        with file.tokenizer_errors("here"):
            raise PanicException("index out of bounds")
    for other in (KeyboardInterrupt(), TypeError(), ConfigError("x")):  # are somebody else's
        with pytest.raises(type(other)), file.tokenizer_errors("here"):
            raise other


def test_ordinary_tokenizers_start_no_child(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child"))
    for case in text_cases.AROUND.values():
        Tokenizer.from_text(text_cases.tokenizer(case[0]).to_str())
    Tokenizer.from_text(text_cases.pieces().to_str())
    parse_wordpiece(train_wordpiece(["the quick fox"], 60).to_text(), "here")
    padded = with_(
        padding={
            "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a",
        },
        truncation={
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5
        },
    )  # fmt: skip
    assert len(Tokenizer.from_text(padded).encode("abc")) == 3
    published = split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    Tokenizer.from_text(published)


def test_what_passed_is_remembered_by_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv("MPJAX_CACHE", str(tmp_path / "cache"))
    file._tried.cache_clear()
    ran = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (ran.append(1), run(*a, **k))[1])
    first, second = split("[ab]+|c+"), split("[ab]+|c+|d")
    for text, count in ((first, 1), (first, 1), (second, 2)):
        Tokenizer.from_text(text)
        assert len(ran) == count
    file._tried.cache_clear()
    Tokenizer.from_text(first)  # from the folder
    assert len(ran) == 2
    file._tried.cache_clear()
    for one in (tmp_path / "cache").glob("*.tried"):
        one.write_bytes(b"fein")
    Tokenizer.from_text(first)
    assert len(ran) == 3
    monkeypatch.setattr(tokenizers, "__version__", "0")
    Tokenizer.from_text(first)
    assert len(ran) == 4
