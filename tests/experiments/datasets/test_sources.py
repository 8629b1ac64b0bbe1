"""The data sets that are known by name, and what a loader says of another name."""

import doctest
import gzip
from pathlib import Path

import numpy as np
import pytest

from common import lexicon
from common.datasets import assets, sources
from common.datasets.sources import DOCUMENTS, IMAGES, INTERACTIONS, LABELLED, PAIRS, TAGGED
from common.datasets.wordnet import read_wordnet
from mpjax.data import (
    leave_one_out,
    load_images,
    load_interactions,
    load_labelled,
    load_pairs,
    load_tagged,
    most_frequent_tags,
    read_documents,
)
from mpjax.errors import ConfigError
from tests.assets import CACHE, asset


@pytest.mark.parametrize(
    ("load", "named", "known"),
    [
        (
            load_labelled,
            LABELLED,
            "expected reviews movie-snippets bbc chinese-reviews or a file of label<TAB>text",
        ),
        (load_tagged, TAGGED, "expected pos-oanc ner-tweets peoples-daily or a file of"),
        (load_interactions, INTERACTIONS, "expected movielens or a file of user<TAB>text<TAB>time"),
        (load_pairs, PAIRS, "expected names libreoffice-help docstrings or a file"),
        (load_images, IMAGES, "give digits, fashion-mnist, or FILE.npz with"),
        (read_documents, DOCUMENTS, "expected stdlib, janeausten, a file, a directory"),
    ],
)
def test_an_unknown_source_lists_the_known_ones(load, named, known):
    with pytest.raises(ConfigError, match=known):
        load("nothing", sources=named)


@pytest.mark.parametrize("module", [assets, lexicon], ids=lambda module: module.__name__)
def test_the_examples_are_right(module):
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


@pytest.mark.parametrize(
    ("source", "sizes", "share"),
    [
        ("reviews", (3973, 1000), 0.658),
        ("movie-snippets", (8473, 2093), None),
        ("bbc", (1697, 430), None),
        ("chinese-reviews", (13919, 3491), None),
    ],
)
def test_labelled_assets_are_read(monkeypatch, source, sizes, share):
    asset(source)
    monkeypatch.setattr(sources, "fetch", lambda name: asset(name))
    train, test = load_labelled(source, sources=LABELLED)
    assert (len(train), len(test)) == sizes and CACHE.is_dir()
    assert not set(train.texts) & set(test.texts) and all(map(str.strip, train.texts))
    if share:
        assert (test.labels == test.classes.index("great")).mean() == pytest.approx(share)


@pytest.mark.parametrize(
    ("source", "words", "tags", "share"),
    [
        ("pos-oanc", 355_217, 48, (0.85, 0.97)),
        ("ner-tweets", 44_486, 21, (0.85, 0.97)),
        ("peoples-daily", 1_833_085, 77, (0.57, 0.59)),  # characters
    ],
)
def test_tagged_assets_are_read(monkeypatch, source, words, tags, share):
    asset(source)
    monkeypatch.setattr(sources, "fetch", lambda name: asset(name))
    train, test = load_tagged(source, sources=TAGGED)
    assert train.word_count + test.word_count == words and len(train.names) == tags
    if source == "pos-oanc":
        slashes = [t for s, ts in zip(train.words, train.tags, strict=True)
                   for w, t in zip(s, ts, strict=True) if w == "/"]  # fmt: skip
        assert slashes, "a slash that is a word"
    guess = np.concatenate(most_frequent_tags(train, test))
    assert share[0] < (guess == np.concatenate(test.tags)).mean() < share[1]


def test_chinese_words_are_tags_of_characters(tmp_path, monkeypatch):
    text = "我们/r  喜欢/v  书/n  。/w  ／/w  好/a  。/w\n\n书/n\n"
    (tmp_path / "199801.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    first, second, third = TAGGED["peoples-daily"]()
    assert "".join(c for c, _ in first) == "我们喜欢书。"
    assert [t for _, t in first] == ["B-r", "I-r", "B-v", "I-v", "B-n", "B-w"]
    assert second == (("／", "B-w"), ("好", "B-a"), ("。", "B-w")) and third == (("书", "B-n"),)


def test_films_are_those_that_were_liked(tmp_path, monkeypatch):
    frame = {
        "userId": np.array([1, 1, 2, 2]),
        "title": np.array(["Heat", "Alien", "Heat", np.nan], object),
        "year": np.array([1995.0, 1979.0, 1995.0, np.nan]),
        "genres": np.array(["Action|Crime", "Horror", "Action|Crime", "Drama"], object),
        "rating": np.array([4.0, 3.5, 5.0, 5.0]),
        "timestamp": np.array([30, 10, 20, 40]),
    }
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    monkeypatch.setattr(sources, "read_frame", lambda path: frame)
    heat = "Heat 1995 Action Crime"
    assert INTERACTIONS["movielens"]() == [("1", heat, 30.0), ("2", heat, 20.0)]


def test_movielens_is_read(monkeypatch):
    asset("movielens")
    monkeypatch.setattr(sources, "fetch", lambda name: asset(name))
    data = load_interactions("movielens", sources=INTERACTIONS)
    assert (len(data), len(data.texts), len(set(data.users))) == (51_564, 6_167, 671)
    train, validation, test = leave_one_out(data)
    assert len(validation) == len(test) == 665 and len(train) < len(data)


def test_help_pages_are_joined_by_paragraph(tmp_path, monkeypatch):
    pages = {"en": "<b>Save</b> &amp; close", "de": "<i>Sichern</i> &amp;\n schlie&szlig;en"}
    for language, text in pages.items():
        (tmp_path / language).mkdir()
        (tmp_path / language / "a.html").write_text(
            f'<p id="par_id1" class="x">{text}</p><p id="par_id{language}">alone</p>\n'
            + "".join(f'<p id="par_id9{i}" dir="auto">{language} {i}</p>' for i in range(90)),
            encoding="utf-8",
        )
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path / name.rsplit("-")[-1])
    train, test = load_pairs("libreoffice-help", sources=PAIRS)
    assert ("Save & close", "Sichern & schließen") in train + test and len(train + test) == 91
    assert all(a.split()[-1] == b.split()[-1] for a, b in train if a.startswith("en "))


def test_names_are_read(monkeypatch):
    asset("names")
    monkeypatch.setattr(sources, "fetch", lambda name: asset(name))
    train, test = load_pairs("names", sources=PAIRS)
    assert len(train) + len(test) == 64_201 and ("ائمه بيگ", "Aima Baig") in train + test


def test_fashion_mnist_is_read_as_its_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, array: np.ndarray) -> None:
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))

    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 3, 2)).astype(np.uint8)
    labels = np.array([0, 1, 2, 3, 1, 0], np.uint8)
    for side, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        write(f"{side}-images-idx3", pixels[part])
        write(f"{side}-labels-idx1", labels[part])
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    images = load_images("fashion-mnist", sources=IMAGES)
    assert images.classes == 4 and images.held_out["targets"].tolist() == [1, 0]
    wide = pixels.astype(np.float64)
    want = (wide - wide[:4].mean()) / wide[:4].std()
    np.testing.assert_allclose(images.held_out["inputs"][..., 0], want[4:], rtol=1e-6)


def test_wordnets_synonyms_are_the_words_of_a_synset(tmp_path, monkeypatch):
    licence = "  1 This software and database is being provided to you\n"
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(licence)
    with (tmp_path / "data.noun").open("a") as file:
        file.write("06613686 10 n 03 movie 0 film 0 moving_picture 0 001 @ 07 n 0000 | a form\n")
        file.write("00000001 10 n 02 Paris 0 city_of_light 0 000 | no common word\n")
    with (tmp_path / "data.adj").open("a") as file:
        file.write("00000002 00 a 0b " + " ".join(f"w{i}(p) 0" for i in range(11)) + " 000 | x\n")
    monkeypatch.setattr("common.datasets.wordnet.fetch", lambda name: tmp_path)
    found = read_wordnet(without={"film"})
    assert found["movie"] == ["film", "moving picture"] and "film" not in found
    assert found["w3"] == [f"w{i}" for i in range(11) if i != 3], "eleven words, in hexadecimal"
    assert set(found) == {"movie", *(f"w{i}" for i in range(11))}
