"""Novels: every line of the books is in one chapter, and every chapter is one."""

import sys

import pytest

from common.datasets import novels
from common.datasets.novels import read_novels
from common.datasets.sources import DOCUMENTS
from mpjax.data.text import read_documents
from mpjax.errors import ConfigError
from tests.assets import asset

CHAPTERS = {  # as the printed books have them; Emma and Mansfield Park number anew in each volume
    "emma": 55, "mansfieldpark": 48, "northangerabbey": 31, "persuasion": 24,
    "prideprejudice": 61, "sensesensibility": 50,
}  # fmt: skip


def test_all_chapters_of_six_novels(monkeypatch):
    folder = asset("janeausten")
    monkeypatch.setattr(novels, "fetch", lambda name: folder)
    chapters = dict(read_novels())
    found = {name.split("/")[0] for name in chapters}
    last = {
        book: max(int(n.split("/")[1]) for n in chapters if n.startswith(book)) for book in found
    }
    assert last == CHAPTERS
    assert chapters["prideprejudice/1"].startswith("Chapter 1\n\n\nIt is a truth universally")
    assert chapters["northangerabbey/0"].startswith("NORTHANGER ABBEY")
    assert all(len(text) > 3900 for name, text in chapters.items() if not name.endswith("/0"))
    assert len(read_documents("janeausten", sources=DOCUMENTS)) == sum(CHAPTERS.values()) + 6


def test_without_the_reader_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(ConfigError, match=r"data 'janeausten': needs .*\[novels\]"):
        read_novels()
