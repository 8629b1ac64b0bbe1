"""Baselines that count: alignment against all cuts there are, words before spelling, neighbours."""

import itertools
import math
from collections import Counter

import pytest

from common import lexicon
from common.lexicon import align, learn_lexicon, nearest_targets


def cuts(source, target):
    """All ways to give each character a piece of at most three."""
    for ends in itertools.product(range(len(target) + 1), repeat=len(source) - 1):
        edges = [0, *ends, len(target)]
        if all(0 <= b - a <= 3 for a, b in itertools.pairwise(edges)):
            yield [target[a:b] for a, b in itertools.pairwise(edges)]


def test_a_cut_is_the_best_of_all_cuts():
    scores = {("a", "x"): -0.1, ("b", "yy"): -0.7, ("b", "y"): -2.0, ("a", "yx"): -1.1}

    def worth(source, pieces):
        known = zip(source, pieces, strict=True)
        return sum(scores.get(one, lexicon._UNSEEN) for one in known)

    for source, target in (("ab", "xyy"), ("aba", "xyyx"), ("bab", "yxyz"), ("b", "yyy")):
        found = lexicon._cut(source, target, scores)
        best = max(worth(source, one) for one in cuts(source, target))
        assert "".join(found) == target and math.isclose(worth(source, found), best)
    assert lexicon._cut("a", "xyzw", scores) == [], "four characters are too many for one"


def test_training_finds_the_spelling_that_made_the_words():
    made = {"a": "x", "b": "yy", "c": "", "d": "zwz"}
    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product("abcd", repeat=n)]
    pairs = [((w, "".join(made[c] for c in w)), 1) for w in words if w.strip("c")]
    found = Counter(
        (c, piece)
        for ((source, _), _), parts in zip(pairs, align(pairs), strict=True)
        for c, piece in zip(source, parts, strict=True)
    )
    right = sum(found[one] for one in made.items())
    assert right > 0.95 * sum(found.values())
    spelled = learn_lexicon([pair for pair, _ in pairs if "dab" not in pair[0]])
    assert spelled.translate("abdab dada") == "xyyzwzxyy zwzxzwzx"


def test_words_go_before_spelling_and_the_most_frequent_wins():
    train = [("no", "NO"), ("no", "NAY"), ("no no", "NAY NAY"), ("on", "ON"), ("no on", "all")]
    learned = learn_lexicon(train)
    assert learned.translate("no on  no") == "NAY ON NAY"
    assert learned.translate("") == "" and learned.translate("#") == ""


def test_the_nearest_source_gives_its_target():
    pytest.importorskip("sklearn", reason="the extra `tasks` is not installed")
    train = [("save the file", "a"), ("open a window", "b"), ("quit now", "c")]
    assert nearest_targets(train, ["saves files", "windows", "quit now"]) == ["a", "b", "c"]
