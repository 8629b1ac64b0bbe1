"""Tagged sentences: distinct, split without leaks; the baseline counts."""

import pytest

from mpjax.data.tagged import load_tagged, most_frequent_tags
from mpjax.errors import ConfigError


def write(path, sentences):
    lines = ("".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences)
    path.write_text("\n".join(lines))
    return str(path)


SENTENCES = [(("the", "D"), (f"cat{i % 70}", "N"), ("runs", "V" if i % 3 else "N"))
             for i in range(100)]  # fmt: skip


def test_sentences_are_distinct_and_on_one_side(tmp_path):
    train, test = load_tagged(write(tmp_path / "a.txt", SENTENCES))
    assert len(train) + len(test) == 70 and not set(train.words) & set(test.words)
    assert train.names == test.names == ("D", "N", "V")
    assert train.words[0] == ("the", "cat0", "runs") or test.words[0] == ("the", "cat0", "runs")
    assert train.word_count == 3 * len(train) == sum(map(len, train.tags))
    assert all(tags[0] == 0 and tags[1] == 1 for tags in train.tags)


def test_the_baseline_is_the_most_frequent_tag(tmp_path):
    train, test = load_tagged(write(tmp_path / "a.txt", SENTENCES))
    # runs is V two times in three; N is the commonest tag of all, for words never seen
    for words, tags in zip(test.words, most_frequent_tags(train, test), strict=True):
        assert tags.tolist() == [0, 1, 2] and words[1] not in {w for s in train.words for w in s}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("the\tD\ncat\n", r"line 2: 'cat'; expected word<TAB>tag"),
        ("the\tD\tX\n", "line 1"),
        ("\tD\n", "line 1"),
        ("\n\n", "empty"),
        ("".join(f"w{i}\tX\n\n" for i in range(60)), "one tag, 'X'"),
        ("a\tX\n", "one side"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, content, said):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_tagged(str(tmp_path / "a.txt"))
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(ConfigError, match="expected a file of word<TAB>tag lines"):
        load_tagged("pos")
