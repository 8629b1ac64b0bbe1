"""Pairs: no source on both sides."""

import pytest

from mpjax.data import pairs
from mpjax.data.pairs import load_pairs
from mpjax.errors import ConfigError
from tests.assets import asset


def test_all_targets_of_a_source_are_on_one_side(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"s{i % 100}\tt{i % 300}\n" for i in range(600)))
    train, test = load_pairs(str(path))
    assert len(train) + len(test) == 300 and test
    assert not {a for a, _ in train} & {a for a, _ in test}
    assert len(test) == 3 * len({a for a, _ in test})
    with pytest.raises(ConfigError, match="expected names libreoffice-help or a file"):
        load_pairs("name")
    path.write_text("only one\n")
    with pytest.raises(ConfigError, match=r"line 1: 1 field\(s\); expected source<TAB>target"):
        load_pairs(str(path))


def test_help_pages_are_joined_by_paragraph(tmp_path, monkeypatch):
    pages = {"en": "<b>Save</b> &amp; close", "de": "<i>Sichern</i> &amp;\n schlie&szlig;en"}
    for language, text in pages.items():
        (tmp_path / language).mkdir()
        (tmp_path / language / "a.html").write_text(
            f'<p id="par_id1" class="x">{text}</p><p id="par_id{language}">alone</p>\n'
            + "".join(f'<p id="par_id9{i}" dir="auto">{language} {i}</p>' for i in range(90)),
            encoding="utf-8",
        )
    monkeypatch.setattr(pairs, "fetch", lambda name: tmp_path / name.rsplit("-")[-1])
    train, test = load_pairs("libreoffice-help")
    assert ("Save & close", "Sichern & schließen") in train + test and len(train + test) == 91
    assert all(a.split()[-1] == b.split()[-1] for a, b in train if a.startswith("en "))


def test_names_are_read(monkeypatch):
    asset("names")
    monkeypatch.setattr(pairs, "fetch", lambda name: asset(name))
    train, test = load_pairs("names")
    assert len(train) + len(test) == 64_201 and ("ائمه بيگ", "Aima Baig") in train + test
