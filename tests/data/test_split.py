"""Held-out split: no content on both sides, both sides filled, stable."""

import hypothesis
import pytest
from hypothesis import strategies as st

from mpjax.data import Document, split_documents
from mpjax.data.split import held_out
from mpjax.errors import ConfigError

DOCUMENTS = [Document(str(i), f"text number {i}") for i in range(2000)]


def texts(documents):
    return {document.text for document in documents}


@hypothesis.given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=2), min_size=1
    ).map(lambda found: [Document(str(i), text) for i, text in enumerate(found)]),
    st.floats(0.01, 0.99),
)
def test_both_sides_are_filled_and_share_nothing(documents, fraction):
    train, held = split_documents(documents, fraction)
    assert train and held
    if len(texts(documents)) > 1:
        assert not texts(train) & texts(held)
        assert sorted(d.name for d in train + held) == sorted(d.name for d in documents)
    else:
        assert train[0].text + held[0].text == documents[0].text
        assert train[0].text and held[0].text


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.5])
def test_the_share_is_the_fraction(fraction):
    _, held = split_documents(DOCUMENTS, fraction)
    deviation = (fraction * (1 - fraction) / len(DOCUMENTS)) ** 0.5
    assert abs(len(held) / len(DOCUMENTS) - fraction) < 4 * deviation


def test_a_document_keeps_its_side_when_renamed_or_joined_by_others():
    _, held = split_documents(DOCUMENTS[:500])
    renamed = [Document("other" + d.name, d.text) for d in reversed(DOCUMENTS)]
    _, held_of_all = split_documents(renamed)
    assert texts(held) == texts(held_of_all) & texts(DOCUMENTS[:500])


def test_copies_follow_their_original():
    copies = [Document("copy of " + d.name, d.text) for d in DOCUMENTS]
    train, held = split_documents(DOCUMENTS + copies)
    assert not texts(train) & texts(held)
    by_name = [(d.text, hash(d.name) % 20 == 0) for d in DOCUMENTS + copies]  # negative control
    assert {t for t, out in by_name if out} & {t for t, out in by_name if not out}


def test_one_document_is_cut_at_a_line_end():
    text = "".join(f"line {i}\n" for i in range(1000))
    (head,), (tail,) = split_documents([Document("a", text)], 0.1)
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert abs(len(tail.text) / len(text) - 0.1) < 0.001


@pytest.mark.parametrize(
    ("text", "tail"), [("abcdefghij", "j"), ("ab\ncdefghi", "cdefghi"), ("abcdefghi\n", "\n")]
)
def test_one_document_of_few_lines(text, tail):
    assert split_documents([Document("a", text)], 0.1)[1][0].text == tail


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"held_out={fraction}: .*0.05"):
        split_documents(DOCUMENTS, fraction)


def test_a_text_too_short_to_cut_is_refused():
    with pytest.raises(ConfigError, match="short.txt: 1 character.*longer"):
        split_documents([Document("short.txt", "x")])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_few_texts_are_on_both_sides(fraction: float) -> None:
    contents = ["a", "b", "a", "c"]
    out = held_out(contents, fraction)
    alone = [n for n, x in enumerate(out) if x == (fraction < 0.5)]
    assert 0 < out.sum() < 4 and out[0] == out[2] and len({contents[n] for n in alone}) == 1
    with pytest.raises(ConfigError, match="all 2 examples are one text"):
        held_out(["a", "a"], fraction)


def test_a_text_keeps_its_side_when_others_come() -> None:
    contents = [f"text {n}" for n in range(200)]
    few, all_of_them = held_out(contents[:60], 0.3), held_out(contents, 0.3)
    assert few.tolist() == all_of_them[:60].tolist() and 30 < all_of_them.sum() < 90
