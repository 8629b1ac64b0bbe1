"""Noise on encoded texts: which tokens may go, and what goes with them."""

import numpy as np
import pytest

from mpjax.data import WordPiece, train_wordpiece
from mpjax.data.augment import TokenDropout, TokenMasking
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError

TEXT = " ".join("abcdefghijklmnopqrst")


@pytest.fixture(scope="module")
def pieces() -> WordPiece:
    return train_wordpiece([TEXT], 60)


@pytest.fixture(scope="module")
def example(pieces):
    """A pair with padding behind it, and labels that name their place."""
    one = pieces.encode([TEXT], ["a b c"], longest=40)[0]
    padding = np.zeros(4, np.int32)
    found = {name: np.concatenate([x, padding.astype(x.dtype)]) for name, x in one.items()}
    labels = np.arange(len(found["ids"]), dtype=np.int32)
    return found | {"labels": labels, "class": np.int32(3)}


def test_dropped_tokens_take_their_labels_along(pieces, example):
    special = np.isin(example["ids"], [pieces.pad, pieces.first, pieces.separator])
    lost = []
    for seed in range(200):
        found = TokenDropout(0.3, pieces)(example, np.random.default_rng(seed))
        places = found["labels"]
        for name in ("ids", "types", "keep"):
            np.testing.assert_array_equal(found[name], example[name][places])
        assert set(np.flatnonzero(special)) <= set(places.tolist()) and found["class"] == 3
        lost.append(len(example["ids"]) - len(places))
    text = int((~special).sum())
    assert abs(np.mean(lost) - 0.3 * text) < 4 * np.sqrt(text * 0.21 / 200)
    assert len(example["ids"]) == 30, "the example itself is as it was"


def test_masked_tokens_stay_in_their_places(pieces, example):
    before = example["ids"].copy()
    hidden = []
    for seed in range(200):
        found = TokenMasking(0.3, pieces)(example, np.random.default_rng(seed))
        changed = found["ids"] != before
        assert (found["ids"][changed] == pieces.mask).all() and found["ids"].dtype == np.int32
        assert not np.isin(before[changed], [pieces.pad, pieces.first, pieces.separator]).any()
        np.testing.assert_array_equal(found["labels"], example["labels"])
        hidden.append(changed.sum())
    assert abs(np.mean(hidden) - 0.3 * 23) < 4 * np.sqrt(23 * 0.21 / 200)
    np.testing.assert_array_equal(example["ids"], before)


def test_one_token_of_text_stays(pieces):
    one = pieces.encode(["a b"], longest=8)[0]
    for seed in range(30):
        draw = np.random.default_rng(seed)
        assert len(TokenDropout(0.999, pieces)(one, draw)["ids"]) == 3
        assert (TokenMasking(0.999, pieces)(one, draw)["ids"] == pieces.mask).sum() == 1


@pytest.mark.parametrize("kind", [TokenDropout, TokenMasking])
def test_mistakes_are_one_line(pieces, kind):
    for rate in (1, -0.5, "a lot", None):
        with pytest.raises(ConfigError, match=f"{kind.__name__}: rate=.*below 1"):
            kind(rate, pieces)
    empty = {"ids": np.array([pieces.first, pieces.separator, pieces.pad], np.int32)}
    with pytest.raises(ConfigError, match="without a token of text; leave it out"):
        kind(0.1, pieces)(empty, np.random.default_rng(0))
    hidden = {"ids": np.array([9, 9], np.int32), "keep": np.zeros(2, bool)}
    with pytest.raises(ConfigError, match="without a token of text"):
        kind(0.1, pieces)(hidden, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="holds labels; give one with ids"):
        kind(0.1, pieces)({"labels": IGNORE}, np.random.default_rng(0))
