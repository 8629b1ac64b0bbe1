"""Pairs of sequences: names and their romanisation, help pages in two languages, or a file."""

from __future__ import annotations

import contextlib
import html
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from mpjax.data.assets import fetch
from mpjax.data.split import held_out
from mpjax.data.tables.rows import read_rows, say_counts
from mpjax.errors import ConfigError

Pair = tuple[str, str]

_HELD_OUT = 0.05
_PARAGRAPH = re.compile(r'<p id="(par_id\w+)"[^>]*>(.*?)</p>', re.DOTALL)


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


_SOURCES: dict[str, Callable[[], list[Pair]]] = {"names": _names, "libreoffice-help": _help}


def load_pairs(source: str, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Loads pairs of sequences as a training and a held-out side that share no source sequence.

    Equal pairs are kept once; 5 % of the source sequences are held out, by a hash of seed and
    sequence, with all their targets. What is left out is counted in one logged line.

    Args:
        source: ``names`` (Arabic to Latin script), ``libreoffice-help`` (English to German),
            fetched at first use; or a file of ``source<TAB>target`` lines, perhaps with a header
            that names these columns; the same in ``.csv``; or ``.jsonl``, ``.json`` or
            ``.parquet`` with these keys.
        seed: of the split.

    Returns:
        (training, held out) lists of (source, target).

    Raises:
        ConfigError: an asset that cannot be had, or a file that cannot be read.
    """
    blank = 0
    if source in _SOURCES:
        pairs = _SOURCES[source]()
    elif Path(source).is_file():
        rows, blank = read_rows(Path(source), ("source", "target"))
        pairs = [(a, b) for a, b in rows]
    else:
        raise ConfigError(
            f"data {source!r}: no such source or file; expected {' '.join(_SOURCES)} or a file of"
            " source<TAB>target lines"
        )
    distinct = list(dict.fromkeys(pairs))
    out = held_out([first for first, _ in distinct], _HELD_OUT, seed=seed)
    train = [pair for pair, one in zip(distinct, out, strict=True) if not one]
    test = [pair for pair, one in zip(distinct, out, strict=True) if one]
    dropped = {"blank": blank, "equal to an earlier one": len(pairs) - len(distinct)}
    say_counts(source, "pairs", {"for training": len(train), "held out": len(test)}, dropped)
    return train, test
