"""Tokenizers: nothing is lost in a round trip, text never makes a separator."""

import json
import textwrap
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mpjax.data import Tokenizer, load_corpus, make_tokenizer
from mpjax.data.cache import Cache
from mpjax.data.chat.instructions import instruction_examples
from mpjax.data.tokenizers.bpe import in_short_words
from mpjax.errors import ConfigError
from mpjax.tasks import Translation
from tests.models.hf import text_cases

TEXTS = [Path(textwrap.__file__).read_text(), "héllo wörld, 数 <|endoftext|>"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    return [make_tokenizer(spec, TEXTS, cache=cache) for spec in ("bytes", "bpe:300")]


@hypothesis.given(st.text() | st.text("<|endoftext|> \n\r\t\0aé'"))
@hypothesis.example("<|endoftext|>")
@hypothesis.example("  two  spaces \r\n\0 \U0001f600 e\u0301 \ufeff\ufffd")
def test_round_trip(tokenizers, text):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert ids.dtype == tokenizer.dtype
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text
        assert "\0" in text or tokenizer.separator not in ids


def test_bytes_are_utf8_with_nul_between_documents():
    tokenizer = make_tokenizer("bytes", [])
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.separator) == ("bytes", 256, 0)
    assert tokenizer.encode("é€").tolist() == list("é€".encode())
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_bpe_has_the_size_asked_for_and_shortens_text(tokenizers):
    _, bpe = tokenizers
    assert (bpe.name, bpe.vocab_size, bpe.separator, bpe.dtype) == ("bpe:300", 300, 0, np.uint16)
    assert len(bpe.encode(TEXTS[0])) < 0.8 * len(TEXTS[0])
    batch = bpe.encode_batch(TEXTS * 50)  # more than one inner batch
    assert len(batch) == 100
    assert all(np.array_equal(ids, bpe.encode(TEXTS[i % 2])) for i, ids in enumerate(batch))


def test_bpe_says_when_the_text_is_too_small(tmp_path, caplog):
    tokenizer = make_tokenizer("bpe:4096", ["ab ab"], cache=Cache(tmp_path))
    assert 257 <= tokenizer.vocab_size < 4096
    assert "bpe:4096" in caplog.text and str(tokenizer.vocab_size) in caplog.text


def test_training_is_cached_by_texts_and_spec(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    first = make_tokenizer("bpe:300", TEXTS, cache=cache)
    other = make_tokenizer("bpe:300", TEXTS[0].split("class")[:1], cache=cache)
    smaller = make_tokenizer("bpe:280", TEXTS, cache=cache)
    assert len({t.to_text() for t in (first, other, smaller)}) == 3
    again = make_tokenizer("bpe:300", TEXTS, cache=Cache(tmp_path / "fresh"))
    assert again.to_text() == first.to_text()  # training is deterministic
    monkeypatch.delattr("mpjax.data.tokenizers.bpe.trainers.BpeTrainer")  # a second training fails
    assert make_tokenizer("bpe:300", TEXTS, cache=cache).to_text() == first.to_text()
    with pytest.raises(AttributeError):
        make_tokenizer("bpe:301", TEXTS, cache=cache)


def test_training_time_grows_as_the_longest_word(tmp_path, caplog):
    """A word of 2 MB took many minutes, without a line; time grew with its square."""
    caplog.set_level("INFO", "mpjax.data")
    letters = np.random.default_rng(0).choice(list("etaoinshrdlu"), 2_100_000)
    seconds = []
    for count in (525_000, 2_100_000):
        begun = time.process_time()
        made = make_tokenizer("bpe:400", ["".join(letters[:count])], cache=Cache(tmp_path))
        seconds.append(time.process_time() - begun)
        assert made.vocab_size == 400
    assert seconds[1] < 8 * seconds[0] + 1  # the square would be 16 times
    assert [line.split(": ")[1][:8] for line in caplog.messages] == ["training", "trained "]


def test_only_words_without_end_are_cut_for_training(tmp_path):
    pieces = lambda text: list(in_short_words(text))  # noqa: E731
    for text in ["", "a b", "x" * 128, "x" * 128 + " " * 128 + "y", "word " * 1000]:
        assert pieces(text) == [text]
    assert pieces("x" * 300 + " y") == ["x" * 128, "x" * 128, "x" * 44 + " y"]
    assert pieces("a" + " " * 130) == ["a" + " " * 128, "  "]


def test_text_and_file_recreate_the_tokenizer(tokenizers, tmp_path):
    for tokenizer in tokenizers:
        tokenizer.save(tmp_path / "t.json")
        for copy in (
            Tokenizer.from_text(tokenizer.to_text()),
            make_tokenizer(str(tmp_path / "t.json"), []),
        ):
            assert copy.to_text() == tokenizer.to_text()
            assert (copy.name, copy.vocab_size, copy.separator) == (
                tokenizer.name,
                tokenizer.vocab_size,
                tokenizer.separator,
            )
            for text in TEXTS:
                assert np.array_equal(copy.encode(text), tokenizer.encode(text))


def test_a_published_file_is_freed_of_truncation_and_padding(tokenizers, tmp_path):
    fields = json.loads(tokenizers[1].to_text())
    fields["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    assert np.array_equal(
        make_tokenizer(str(path), []).encode(TEXTS[0]), tokenizers[1].encode(TEXTS[0])
    )


@pytest.mark.parametrize("ids", [[300], [-1], [5, 256000]])
def test_ids_outside_the_vocabulary_are_refused(tokenizers, ids):
    for tokenizer in tokenizers:
        with pytest.raises(ConfigError, match=f"cannot decode id {max(ids, key=abs)}"):
            tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bpe", ["'bpe'", "malformed", "bpe:4096"]),
        ("bpe:", ["malformed"]),
        ("bpe:many", ["'bpe:many'", "malformed"]),
        ("bpe:-5", ["malformed"]),
        ("bpe:12345678", ["malformed"]),
        ("bytes:3", ["malformed"]),
        ("bpe:256", ["too small", "257"]),
        ("bpe:0", ["too small"]),
        ("", ["cannot be read"]),
        ("nothing.json", ["nothing.json", "no such file", "bytes"]),
        ("x" * 5000, ["cannot be read"]),
        (".", ["cannot be read", "tokenizer.json"]),
        ("binary.json", ["binary.json", "cannot be read"]),
        ("text.json", ["text.json", "not JSON"]),
        ("other.json", ["other.json", "without a model"]),
        ("broken.json", ["broken.json", "without a vocabulary"]),
        ("bare.json", ["bare.json", "no token to put between documents", "<|endoftext|>"]),
    ],
)
def test_bad_specs_are_one_line_with_the_remedy(tokenizers, tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\0")
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text('{"model": {"type": "?"}}')
    bare = json.loads(tokenizers[1].to_text()) | {"added_tokens": []}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    with pytest.raises(ConfigError) as caught:
        make_tokenizer(spec, TEXTS)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "hf_texts.json").read_text())["ids"]
HI, BOS, EOS = [74, 75], 1, 2


def around(name):
    return Tokenizer.from_text(text_cases.tokenizer(text_cases.AROUND[name][0]).to_str())


@pytest.mark.parametrize("name", text_cases.AROUND)
def test_whole_texts_are_the_ids_of_transformers(name):
    tokenizer, want = around(name), GOLDEN[name]
    assert [tokenizer.encode(text).tolist() for text in text_cases.TEXTS] == want
    assert [ids.tolist() for ids in tokenizer.encode_batch(text_cases.TEXTS)] == want
    for text, ids in zip(text_cases.TEXTS, want, strict=True):
        assert tokenizer.encode(text).dtype == tokenizer.dtype
        plain = tokenizer.encode(text, special=False).tolist()
        assert [*tokenizer.prefix, *plain, *tokenizer.suffix] == ids
        assert tokenizer.prompt(text).tolist() == [*tokenizer.prefix, *plain], (
            "it goes on behind it"
        )
        assert tokenizer.decode(plain) == text
    assert Tokenizer.from_text(tokenizer.to_text()).prefix == tokenizer.prefix


def test_documents_begin_and_end_once(tmp_path):
    """Packed: BOS before each document, one separator behind it, none inside."""
    (tmp_path / "a.txt").write_text("hi")
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text("hi" + "i" * i)
    bodies = [HI + [75] * i for i in range(4)]
    before = {"byte level, as GPT-2": [], "BOS, as Llama 2": [BOS]}
    for name in (*before, "BOS and EOS", "RoBERTa"):
        tokenizer = around(name)
        assert tokenizer.separator == EOS
        corpus = load_corpus(str(folder), tokenizer, held_out=0.25, cache_dir=tmp_path / "cache")
        stream = np.concatenate([corpus.train, corpus.validation]).tolist()
        documents = [[*before.get(name, [BOS]), *body, EOS] for body in bodies]
        assert len(stream) == sum(map(len, documents))
        parts = [
            list(part) for part in np.split(stream, np.flatnonzero(np.array(stream) == EOS) + 1)
        ]
        assert sorted(parts[:-1]) == sorted(documents), name


def test_answers_and_translations_do_not_begin_anew():
    tokenizer = around("BOS and EOS")
    (one,) = instruction_examples([("hi", "i")], tokenizer.encode, end=EOS, longest=9)
    assert [*one["inputs"].tolist(), one["targets"][-1]] == [BOS, *HI, 75, EOS]
    task = Translation(tokenizer)
    (pair,) = task.examples([("hi", "i")])
    assert pair["source"].tolist() == HI and pair["inputs"].tolist() == [task.begin, 75]
    assert task.fitting([("hi", "i")], longest=2) == [("hi", "i")]


def test_a_continuation_keeps_its_first_space():
    tokenizer = Tokenizer.from_text(text_cases.pieces().to_str())
    assert tokenizer.prefix == (BOS,)
    prompt, new = tokenizer.prompt("a b"), tokenizer.encode("a", special=False)
    assert tokenizer.decode(new) == "a", "alone it has none"
    assert tokenizer.continuation(prompt, new) == " a"
    plain = make_tokenizer("bytes", [])
    half = "é".encode()
    assert plain.continuation(list(half[:1]), list(half[1:])) == "\ufffd", "not of one letter"
    assert plain.continuation(list(b"ab"), list(b" c")) == " c"
