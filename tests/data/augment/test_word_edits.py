"""Edits of words: how many change, what they become, and whose tags follow."""

import grain
import numpy as np
import pytest

from mpjax.data.augment import (
    OneOf,
    RandomDeletion,
    RandomInsertion,
    RandomSwap,
    SynonymReplacement,
    eda,
)
from mpjax.errors import ConfigError

TEXT = " ".join(f"w{i}" for i in range(25))
WORDS = TEXT.split()
SYNONYMS = {f"w{i}": [f"s{i}a", f"s{i}b"] for i in range(0, 25, 2)}
KINDS = ["O", "B-a", "I-a", "I-a", "O", "B-b", "B-b", "I-b", "O", "B-a", "I-a", "B-b", "O"]
SENTENCE = tuple((f"w{i}", tag) for i, tag in enumerate(KINDS))


def draw(seed):
    return np.random.default_rng(seed)


def entities(sentence):
    """(kind, words) of each entity; fails where the tags are not BIO."""
    found = []
    for word, tag in sentence:
        if tag.startswith("B-"):
            found.append((tag[2:], [word]))
        elif tag.startswith("I-"):
            assert found and found[-1] and found[-1][0] == tag[2:], "I- without its B-"
            found[-1][1].append(word)
        else:
            found.append(None)
    return [one for one in found if one]


def test_a_swap_moves_two_words_each_time():
    for seed in range(50):
        once = RandomSwap(0.03)(TEXT, draw(seed)).split()
        assert sorted(once) == sorted(WORDS)
        assert sum(a != b for a, b in zip(once, WORDS, strict=True)) == 2
    moved = [
        sum(a != b for a, b in zip(RandomSwap(0.2)(TEXT, draw(s)).split(), WORDS, strict=True))
        for s in range(50)
    ]
    assert max(moved) == 10 and min(moved) > 2, "five swaps, some of the same words"
    assert RandomSwap(0.5)("alone", draw(0)) == "alone"


def test_a_deletion_leaves_a_subsequence_of_the_expected_length():
    left = []
    for seed in range(400):
        words = RandomDeletion(0.3)(TEXT, draw(seed)).split()
        rest = iter(WORDS)
        assert all(word in rest for word in words), "in the same order"
        left.append(len(words))
    error = np.sqrt(25 * 0.3 * 0.7 / 400)
    assert abs(np.mean(left) - 25 * 0.7) < 4 * error
    assert all(RandomDeletion(0.999)("a b", draw(s)) in ("a", "b") for s in range(20))


def test_replaced_words_are_synonyms_and_as_many_as_asked():
    for seed in range(50):
        words = SynonymReplacement(0.2, SYNONYMS)(TEXT, draw(seed)).split()
        pairs = [(old, new) for old, new in zip(WORDS, words, strict=True) if old != new]
        assert len(pairs) == 5 and all(new in SYNONYMS[old] for old, new in pairs)
    assert len(set(SynonymReplacement(0.9, SYNONYMS)(TEXT, draw(0)).split()) - set(WORDS)) == 13
    replace = SynonymReplacement(0.5, {"Good": ["fine", "GOOD"], "movie": ["moving picture"]})
    assert replace("(GOOD) movie.", draw(0)) in ("(FINE) movie.", "(GOOD) moving picture.")
    assert replace("no such  word", draw(0)) == "no such  word", "spaces too"


def test_inserted_words_are_synonyms_of_words_of_the_text():
    all_synonyms = {s for synonyms in SYNONYMS.values() for s in synonyms}
    places = set()
    for seed in range(200):
        words = RandomInsertion(0.2, SYNONYMS)(TEXT, draw(seed)).split()
        new = [word for word in words if word in all_synonyms]
        assert len(new) == 5 and [w for w in words if w not in all_synonyms] == WORDS
        places |= {words.index(new[0]), words.index(new[-1])}
    assert {0, 29} <= places, "before the first and behind the last too"
    assert RandomInsertion(0.2, SYNONYMS)("none of them", draw(0)) == "none of them"


def repaired_only_by_tag(sentence, stays):
    """The mutant: words take their tags along, and nobody begins what lost its beginning."""
    return [pair for pair, stay in zip(sentence, stays, strict=True) if stay]


def test_entities_stay_bio_when_words_go():
    whole, broken = entities(SENTENCE), 0
    for seed in range(300):
        left = RandomDeletion(0.4)(SENTENCE, draw(seed))
        stays = [pair[0] in {word for word, _ in left} for pair in SENTENCE]
        assert [word for word, _ in left] == [w for (w, _), s in zip(SENTENCE, stays) if s]  # noqa: B905
        kept = {word for word, _ in left}
        want = [(kind, [w for w in words if w in kept]) for kind, words in whole]
        assert entities(left) == [one for one in want if one[1]]
        try:
            entities(repaired_only_by_tag(SENTENCE, stays))
        except AssertionError:
            broken += 1
    assert broken > 100


def test_entities_stay_whole_when_words_move_or_come():
    whole, synonyms = entities(SENTENCE), {f"w{i}": [f"s{i}"] for i in range(13)}
    for seed in range(100):
        for change in (RandomSwap(0.5), RandomInsertion(0.5, synonyms)):
            assert entities(change(SENTENCE, draw(seed))) == whole
        new = RandomInsertion(0.5, synonyms)(SENTENCE, draw(seed))
        assert {tag for word, tag in new if word.startswith("s")} == {"O"} and len(new) == 19
        tags = [tag for _, tag in SynonymReplacement(0.5, synonyms)(SENTENCE, draw(seed))]
        assert tags == KINDS
    parts = tuple((f"w{i}", f"T{i}") for i in range(9))
    swapped = RandomSwap(0.9)(parts, draw(0))
    assert sorted(swapped) == sorted(parts) and swapped != parts, "other tags move along"


def test_one_of_them_is_drawn_for_a_share_of_the_records():
    change = OneOf([lambda text, draw: text + " a", lambda text, draw: text + " b"], share=0.5)
    g = draw(0)
    found = [change("x", g) for _ in range(4000)]
    counts = [found.count(text) for text in ("x", "x a", "x b")]
    assert np.abs(np.array(counts) - [2000, 1000, 1000]).max() < 4 * np.sqrt(4000 / 4)
    four = {type(one).__name__ for one in eda(SYNONYMS).transforms}
    assert four == {"SynonymReplacement", "RandomInsertion", "RandomSwap", "RandomDeletion"}


def test_grain_takes_them_and_the_same_generator_gives_the_same():
    texts = [TEXT, TEXT[::-1], "a b c d e f"]
    data = grain.MapDataset.source(texts).seed(3).random_map(eda(SYNONYMS, 0.3))
    first = [data[i] for i in range(6)]
    assert first == [data[i] for i in range(6)] and first[:3] != texts and first[:3] != first[3:]
    assert RandomSwap(0)(TEXT, draw(0)) == TEXT


def wrong(make, *parts):
    with pytest.raises(ConfigError) as error:
        make()
    said = str(error.value)
    assert all(part in said for part in parts) and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, float("nan"), "0.1", True, None])
def test_a_rate_is_a_share_below_one(rate):
    for make in (
        lambda: RandomSwap(rate),
        lambda: RandomDeletion(rate),
        lambda: SynonymReplacement(rate, SYNONYMS),
        lambda: RandomInsertion(rate, SYNONYMS),
    ):
        wrong(make, "rate=", "0 or above and below 1")


def test_mistakes_are_one_line():
    for text in ("", "  \n", ()):
        wrong(lambda text=text: RandomSwap(0.1)(text, draw(0)), "has no words", "leave it out")
    wrong(lambda: RandomSwap(0.1)(["a", "b"], draw(0)), "no record of words", "give a text")
    for synonyms in ({}, None, ["good"]):
        wrong(lambda s=synonyms: SynonymReplacement(0.1, s), "synonyms", "read_synonyms")
    for words in ([], ["good"], "fine", [1]):
        wrong(lambda w=words: RandomInsertion(0.1, {"good": w}), "'good'")
    wrong(lambda: OneOf([]), "no transform")
    wrong(lambda: OneOf([RandomSwap]), "no transform", "RandomSwap(0.1)")
    wrong(lambda: OneOf([RandomSwap(0.1)], share=0), "share=0", "above 0")
    wrong(lambda: eda({"good": ["fine"]}, rate=1.5), "rate=1.5")
