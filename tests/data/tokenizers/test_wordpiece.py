"""WordPiece: the ids that BERT expects."""

import json

import numpy as np
import pytest
import tokenizers

from mpjax.data.tokenizers.characters import Characters
from mpjax.data.tokenizers.wordpiece import WordPiece, load_wordpiece, train_wordpiece
from mpjax.errors import ConfigError
from tests.assets import asset

TEXTS = ["the quick brown fox jumps", "over the lazy dog", "a quick xdog"]


@pytest.fixture(scope="module")
def pieces():
    return train_wordpiece(TEXTS, 120)


def test_pairs_have_types_and_specials(pieces):
    one = pieces.encode(["the dog"], ["a fox"], longest=16)[0]
    assert pieces.tokens(one["ids"]) == "[CLS] the dog [SEP] a fox [SEP]".split()
    assert one["types"].tolist() == [0, 0, 0, 0, 1, 1, 1] and one["keep"].all()
    assert {one[name].dtype.name for name in one} == {"int32", "bool"}
    assert pieces.tokens(pieces.pieces("the dog")) == ["the", "dog"]
    assert pieces.encode(["[MASK] dog"], longest=9)[0]["ids"].max() < pieces.vocab_size


def test_chinese_is_split_into_characters():
    texts = ["我喜欢这本书", "书很好，hello 世界", "这书不好"] * 3
    pieces = train_wordpiece(texts, 120)
    assert pieces.tokens(pieces.pieces("世界我喜欢")) == list("世界我喜欢")
    assert pieces.tokens(pieces.pieces("hello书")) == ["hello", "书"]
    assert pieces.unknown not in pieces.pieces("很好这界")
    examples, starts = pieces.encode_words([list("这本书好")], longest=8)
    assert pieces.tokens(examples[0]["ids"]) == ["[CLS]", *"这本书好", "[SEP]"]
    assert starts[0].tolist() == [1, 2, 3, 4]
    # Control: without it a clause is one word, and its pieces are continuations.
    whole = json.loads(pieces.to_text())
    whole["normalizer"]["handle_chinese_chars"] = False
    backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
    assert WordPiece(backend).pieces("世界我喜欢").tolist() == [pieces.unknown]


def test_what_is_too_long_is_cut_and_said(pieces, caplog):
    examples = pieces.encode(["dog " * 20, "a dog"], ["fox " * 3] * 2, longest=12)
    assert [len(e["ids"]) for e in examples] == [12, 8]
    assert "1 of 2 texts are cut to 12 tokens" in caplog.text
    assert examples[0]["ids"].tolist().count(pieces.separator) == 2, "both ends are kept"
    caplog.clear()
    assert len(pieces.encode(["dog " * 20], longest=100)[0]["ids"]) == 22 and not caplog.text


def test_training_gives_the_same_ids_in_every_process():
    # Of ties: the library alone numbers and merges these otherwise each time it is started.
    texts = ["low lower lowest", "new newer newest", "wide wider widest"]
    expected = (
        "[PAD] [UNK] [CLS] [SEP] [MASK] ##d ##e ##i ##o ##r ##s ##t ##w d e i l n o r s t w"
        " ##we ##de ##ide ##st lo ne wide ##wer ##west low lower lowest new newer newest wider"
        " widest"
    )
    for order in (texts, texts[::-1]):
        pieces = train_wordpiece(order, 40)
        assert pieces.tokens(range(pieces.vocab_size)) == expected.split()
    assert pieces.tokens(pieces.pieces("##e")) == ["[UNK]", "[UNK]", "e"]


def test_words_know_their_first_piece(pieces):
    words = ["The", "foxdog", "\u200b", "dog"]
    (one,), (starts,) = pieces.encode_words([words], longest=32)
    tokens = pieces.tokens(one["ids"])
    assert [tokens[i] for i in starts] == ["the", "fox", "[UNK]", "dog"]
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and len(tokens) > 6
    assert not one["types"].any()
    (told,), _ = pieces.encode_words([["dog", "Foxdog", "\u200b"]], longest=32, capitals=True)
    foxdog = len(pieces.pieces("Foxdog"))
    assert foxdog > 1 and told["types"].tolist() == [0, 0, *[1] * foxdog, 0, 0]
    for sentence in (words * 20, []):
        with pytest.raises(ConfigError, match="sentence 0: .* expected at most 32 and one word"):
            pieces.encode_words([sentence], longest=32)


def test_mistakes_are_one_line(pieces, tmp_path):
    with pytest.raises(ConfigError, match="longest=3: no room for text"):
        pieces.encode(["a"], longest=3)
    with pytest.raises(ConfigError, match="1 first and 2 second"):
        pieces.encode(["a"], ["b", "c"], longest=9)
    with pytest.raises(ConfigError, match="no such file"):
        load_wordpiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="JSON without a model; expected a tokenizer.json"):
        load_wordpiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text(pieces.to_text().replace("[MASK]", "[HIDE]"))
    with pytest.raises(ConfigError, match=r"no token \[MASK\]"):
        load_wordpiece(tmp_path)
    with pytest.raises(ConfigError, match="31 ids are too few"):
        train_wordpiece(TEXTS, 31)


def test_a_saved_one_is_the_same(pieces, tmp_path):
    (tmp_path / "tokenizer.json").write_text(pieces.to_text())
    again = load_wordpiece(tmp_path)
    assert isinstance(again, WordPiece) and again.vocab_size == pieces.vocab_size
    both = [t.encode(TEXTS, longest=9) for t in (pieces, again)]
    assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(*both, strict=True))


def test_minilms_tokenizer_neither_pads_nor_cuts():
    pieces = load_wordpiece(asset("minilm"))
    assert pieces.vocab_size == 30522 and pieces.pad == 0
    example = pieces.encode(["This is an example sentence"], longest=512)[0]
    assert example["ids"].tolist() == [101, 2023, 2003, 2019, 2742, 6251, 102]
    assert len(pieces.encode(["dog " * 300], longest=512)[0]["ids"]) == 302


@pytest.mark.parametrize("wrong", [-1, -100, 10_000])
def test_an_id_that_is_no_token_is_one_line(wrong):
    pieces, characters = train_wordpiece(["the quick fox"], 60), Characters(["abc"])
    for read in (pieces.tokens, characters.decode):
        with pytest.raises(ConfigError, match=f"id {wrong}.*expected 0 to"):
            read([1, wrong])


def test_a_file_without_a_post_processor_is_a_bert_too(pieces):
    """Else a text would have no [CLS], which the pooler reads."""
    backend = tokenizers.Tokenizer.from_str(pieces.to_text())
    bare = json.loads(backend.to_str()) | {"post_processor": None}
    found = WordPiece(tokenizers.Tokenizer.from_str(json.dumps(bare)))
    for texts in ((["the dog"], []), (["the dog"], ["a fox"])):
        one, want = (p.encode(*texts, longest=16)[0] for p in (found, pieces))
        assert one["ids"].tolist() == want["ids"].tolist()
        assert one["types"].tolist() == want["types"].tolist()
