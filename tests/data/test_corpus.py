"""Corpus: streams depend on the texts alone, and the cache never changes them."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mpjax.data import Document, Tokenizer, load_corpus, make_tokenizer, split_documents
from mpjax.errors import ConfigError


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = Path(textwrap.__file__).read_text().splitlines(keepends=True)
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"part {i}\n" + "".join(lines[8 * i : 8 * i + 8]))
    return folder


def same(a, b):
    return (
        np.array_equal(a.train, b.train)
        and np.array_equal(a.validation, b.validation)
        and a.info == b.info
        and a.tokenizer.to_text() == b.tokenizer.to_text()
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_streams_are_the_documents_with_separators(source, tmp_path, tokenizer):
    corpus = load_corpus(str(source), tokenizer, held_out=0.2, cache_dir=tmp_path / "cache")
    documents = [Document(p.name, p.read_text()) for p in sorted(source.iterdir())]
    for side, stream in zip(
        split_documents(documents, 0.2), (corpus.train, corpus.validation), strict=True
    ):
        assert stream.dtype == corpus.tokenizer.dtype
        assert stream[-1] == corpus.tokenizer.separator
        ends = np.flatnonzero(stream == corpus.tokenizer.separator)
        texts = [corpus.tokenizer.decode(part[:-1]) for part in np.split(stream, ends + 1)[:-1]]
        assert sorted(texts) == sorted(document.text for document in side)
        assert texts != sorted(texts)  # shuffled: neighbours in a folder are alike
    info = json.loads(json.dumps(corpus.info))
    assert info == corpus.info
    assert info["train_documents"] + info["validation_documents"] == 60
    assert info["train_tokens"] == len(corpus.train)
    assert (info["source"], info["held_out"]) == (str(source), 0.2)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_the_second_start_reads_the_cache(source, tmp_path, monkeypatch, caplog, tokenizer):
    first = load_corpus(str(source), tokenizer, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(type(first.tokenizer), "encode_batch", None)  # a second encoding fails
    second = load_corpus(str(source), tokenizer, cache_dir=tmp_path / "cache")
    assert same(first, second)
    assert not caplog.messages
    for corpus in (first, second):
        with pytest.raises(ValueError, match="read-only"):
            corpus.train[0] = 1
    with pytest.raises(TypeError):
        load_corpus(str(source), tokenizer, held_out=0.3, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("change", ["text", "held_out", "tokenizer"])
def test_a_change_is_never_served_from_the_cache(source, tmp_path, change):
    settings = {"held_out": 0.1, "tokenizer": "bytes"}
    first = load_corpus(str(source), **settings, cache_dir=tmp_path / "cache")
    if change == "text":
        (source / "07.txt").write_text("changed\n")
    else:
        settings |= {"held_out": {"held_out": 0.3}, "tokenizer": {"tokenizer": "bpe:280"}}[change]
    cached = load_corpus(str(source), **settings, cache_dir=tmp_path / "cache")
    assert not same(first, cached)
    assert same(cached, load_corpus(str(source), **settings, cache_dir=tmp_path / "other"))


def test_names_and_places_do_not_matter(source, tmp_path):
    first = load_corpus(str(source), cache_dir=tmp_path / "a")
    for i, path in enumerate(sorted(source.iterdir())):
        path.rename(source / f"renamed-{99 - i}.md")
    second = load_corpus(str(source), cache_dir=tmp_path / "b")
    assert same(first, second)


@pytest.mark.parametrize("keep", [0, 50, -1])
def test_a_torn_cache_is_rebuilt_with_one_line(source, tmp_path, caplog, keep):
    first = load_corpus(str(source), cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.train.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert same(first, load_corpus(str(source), cache_dir=tmp_path / "cache"))
    assert len(caplog.messages) == 1 and "torn or corrupted" in caplog.text
    assert path.read_bytes() == whole


def test_an_unwritable_cache_costs_one_line(source, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    corpus = load_corpus(str(source), "bpe:280", cache_dir=tmp_path / "file")
    assert same(corpus, load_corpus(str(source), "bpe:280", cache_dir=tmp_path / "good"))
    assert len(caplog.messages) == 1 and "going on without" in caplog.text


def test_bpe_sees_the_training_side_only(source, tmp_path):
    corpus = load_corpus(str(source), "bpe:280", held_out=0.3, cache_dir=tmp_path / "cache")
    documents = [Document(p.name, p.read_text()) for p in sorted(source.iterdir())]
    train, _ = split_documents(documents, 0.3)
    alone = make_tokenizer("bpe:280", [document.text for document in train])
    everything = make_tokenizer("bpe:280", [document.text for document in documents])
    assert corpus.tokenizer.to_text() == alone.to_text()
    assert corpus.tokenizer.to_text() != everything.to_text()  # it would have been seen


def test_a_restored_tokenizer_is_taken_as_it_is(source, tmp_path):
    first = load_corpus(str(source), "bpe:280", cache_dir=tmp_path / "a")
    (source / "07.txt").write_text("changed, which would train another tokenizer\n" * 50)
    restored = Tokenizer.from_text(first.tokenizer.to_text())
    second = load_corpus(str(source), restored, cache_dir=tmp_path / "b")
    assert second.tokenizer is restored
    trained = load_corpus(str(source), "bpe:280", cache_dir=tmp_path / "b")
    assert trained.tokenizer.to_text() != restored.to_text()


def test_bad_settings_are_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="held_out=1.5"):
        load_corpus(str(source), held_out=1.5, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="too small"):
        load_corpus(str(source), "bpe:9", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
