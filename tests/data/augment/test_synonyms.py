"""Word lists: both forms of a line, and what is refused."""

import pytest

from mpjax.data.augment import read_synonyms
from mpjax.errors import ConfigError


def test_both_forms_of_lines_are_read(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(
        b"\xef\xbb\xbfGood: fine, very nice ,good\r\n\r\nfilm\tmovie\tmotion  picture\r\ngood:great"
    )
    assert read_synonyms(path) == {
        "good": ("fine", "very nice", "great"),
        "film": ("movie", "motion picture"),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("good: fine\ngood fine\n", "line 2: 'good fine'; expected lines of `word: synonym"),
        ("good:\n", "line 1: 'good:'"),
        ("good: , \n", "line 1"),
        (": fine\n", "line 1"),
        ("very good: fine\n", "line 1"),
        ("film\t\n", "line 1"),
        ("good: GOOD\n", "'good' has no synonym; give it one or leave it out"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, text, said):
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_synonyms(path)
    assert said in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file; expected lines of"):
        read_synonyms(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"good: \xe9pris\n")
    with pytest.raises(ConfigError, match="save it as such"):
        read_synonyms(tmp_path / "latin.txt")
