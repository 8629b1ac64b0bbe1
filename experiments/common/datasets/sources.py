"""The data sets that the experiments know by name, as the loaders of `mpjax.data` take them."""

from __future__ import annotations

import ast
import contextlib
import gzip
import html
import re
import sqlite3
import tarfile
from pathlib import Path

import numpy as np

from common.datasets.assets import fetch
from common.datasets.frame import read_frame
from common.datasets.novels import read_novels
from mpjax.data.images import Labelled
from mpjax.data.interactions import Interaction
from mpjax.data.labelled import Rows
from mpjax.data.pairs import Pair
from mpjax.data.tagged import Sentence, read_sentences
from mpjax.data.text import read_documents
from mpjax.typing import Sources

_PARAGRAPH = re.compile(r'<p id="(par_id\w+)"[^>]*>(.*?)</p>', re.DOTALL)


def _reviews() -> tuple[Rows, Rows]:
    """4,000 and 1,000 food reviews, as their package splits them."""
    folder = fetch("reviews")
    sides = []
    for name in ("training", "testing"):
        frame = read_frame(folder / f"{name}_data.pkl.compress")
        pairs = zip(frame["score"], frame["review"], strict=True)
        sides.append([[str(score), str(review).replace("<br />", " ")] for score, review in pairs])
    return sides[0], sides[1]


def _snippets() -> tuple[Rows, Rows]:
    """Film snippets by the sign of their mean score; undecided ones are left out."""
    rows: Rows = []
    with tarfile.open(fetch("movie-snippets") / "hutto_ICWSM_2014.tar.gz") as archive:
        member = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None  # the archive is pinned
        for line in member.read().decode("latin-1").splitlines():
            _, score, text = line.split("\t", 2)
            if float(score):
                rows.append(["positive" if float(score) > 0 else "negative", text.strip()])
    return rows, []


def _news() -> tuple[Rows, Rows]:
    """BBC articles by topic."""
    paths = sorted(fetch("bbc").glob("*/*.txt"))
    return [[path.parent.name, path.read_text("latin-1").strip()] for path in paths], []


def _chinese_reviews() -> tuple[Rows, Rows]:
    """Chinese reviews of shops, good and bad; half of the lines repeat an earlier one."""
    folder = fetch("chinese-reviews")
    rows: Rows = []
    for label, name in (("good", "pos.txt"), ("bad", "neg.txt")):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        rows += [[label, line.strip()] for line in lines if line.strip()]
    return rows, []


def _films() -> list[Interaction]:
    """Films that users rated 4 or 5 stars of 5; the few without a title are left out."""
    frame = read_frame(fetch("movielens") / "movielens.pkl.compress")
    columns = [frame[name] for name in ("userId", "title", "year", "genres", "rating", "timestamp")]
    return [
        (str(user), f"{title} {year:.0f} {' '.join(genres.split('|'))}", float(time))
        for user, title, year, genres, rating, time in zip(*columns, strict=True)
        if rating >= 4 and isinstance(title, str)
    ]


def _parts_of_speech() -> list[Sentence]:
    """Lines of word/tag; a slash in a word is written &slash;."""
    text = (fetch("pos-oanc") / "tagged-en-oanc.txt").read_text(encoding="utf-8-sig")
    return [
        tuple(tuple(pair.replace("&slash;", "/").rsplit("/", 1)) for pair in line.split())  # type: ignore[misc]
        for line in text.splitlines()
        if line.strip()
    ]


def _chinese_words() -> list[Sentence]:
    """Characters of the People's Daily, tagged B-POS where a word begins and I-POS inside it.

    So one tag says where words are and what they are. A line is cut behind 。！？ and ；,
    behind other punctuation once it has 100 characters, and behind any word once it has 120.
    """
    sentences, current = [], list[tuple[str, str]]()
    for line in (fetch("peoples-daily") / "199801.txt").read_text(encoding="utf-8").splitlines():
        for token in [*line.split(), ""]:  # a line ends a sentence
            word, _, tag = token.rpartition("/")
            current += [(c, f"{'I' if place else 'B'}-{tag}") for place, c in enumerate(word)]
            ends = not token or word in "。！？；" or len(current) >= (100 if tag == "w" else 120)
            if current and ends:
                sentences.append(tuple(current))
                current = []
    return sentences


def _entities() -> list[Sentence]:
    """Tweets with a type of named entity for each word."""
    return read_sentences(fetch("ner-tweets") / "ner.txt", header=False)


def _names() -> list[Pair]:
    path = fetch("names") / "names.sqlite3"
    with contextlib.closing(
        sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    ) as database:
        query = (
            "select arabic_key, latin from full_names"
            " where source = 'wikidata' and latin_lang = 'en' order by rowid"
        )
        return [(str(arabic), str(latin)) for arabic, latin in database.execute(query)]


def _help() -> list[Pair]:
    sides = [_paragraphs(fetch(f"libreoffice-help-{language}")) for language in ("en", "de")]
    return [(text, sides[1][place]) for place, text in sides[0].items() if place in sides[1]]


def _paragraphs(folder: Path) -> dict[tuple[str, str], str]:
    """(page, id) -> text of a paragraph, without markup."""
    found = {}
    for path in sorted(folder.rglob("*.html")):
        page = path.relative_to(folder).as_posix()
        for name, body in _PARAGRAPH.findall(path.read_text(encoding="utf-8")):
            text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", body)).split())
            if text:
                found[page, name] = text
    return found


def _docstrings() -> list[Pair]:
    """Names of the standard library's public functions and classes, and what they are for."""
    found: dict[str, str] = {}
    for document in read_documents("stdlib"):
        if not document.name.endswith(".py"):
            continue
        module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.parse(document.text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                first = (ast.get_docstring(node) or "").strip().partition("\n")[0]
                found[f"What is {module}.{node.name}?"] = first
    return [(question, answer) for question, answer in found.items() if answer]


def _fashion() -> tuple[Labelled, Labelled]:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 images of 28 x 28."""
    folder = fetch("fashion-mnist")

    def side(name: str) -> Labelled:
        return _idx(folder / f"{name}-images-idx3-ubyte.gz"), _idx(
            folder / f"{name}-labels-idx1-ubyte.gz"
        )

    return side("train"), side("t10k")


def _idx(path: Path) -> np.ndarray:
    """An array of bytes as MNIST stores it: 0, 0, type 8, rank, sizes (big-endian), numbers."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape.tolist())


DOCUMENTS: Sources[list[tuple[str, str]]] = {"janeausten": read_novels}
LABELLED: Sources[tuple[Rows, Rows]] = {
    "reviews": _reviews,
    "movie-snippets": _snippets,
    "bbc": _news,
    "chinese-reviews": _chinese_reviews,
}
TAGGED: Sources[list[Sentence]] = {
    "pos-oanc": _parts_of_speech,
    "ner-tweets": _entities,
    "peoples-daily": _chinese_words,
}
PAIRS: Sources[list[Pair]] = {
    "names": _names,
    "libreoffice-help": _help,
    "docstrings": _docstrings,
}
IMAGES: Sources[tuple[Labelled, Labelled]] = {"fashion-mnist": _fashion}
INTERACTIONS: Sources[list[Interaction]] = {"movielens": _films}
