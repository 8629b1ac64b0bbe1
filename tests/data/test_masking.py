"""Masking: the shares of BERT; pairs: half of them strangers."""

import numpy as np
import pytest

from mpjax.data.buckets import IGNORE
from mpjax.data.masking import masking, segment_pairs
from mpjax.data.tokenizers.wordpiece import train_wordpiece
from mpjax.errors import ConfigError

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def pieces():
    return train_wordpiece([" ".join(WORDS)] * 3, 400)


def test_the_shares_are_those_of_bert(pieces):
    draw = np.random.default_rng(0)
    ids = draw.integers(5, pieces.vocab_size, (400, 100)).astype(np.int32)
    ids[:, 0], ids[:, 50] = pieces.first, pieces.separator
    keep = np.ones(ids.shape, bool)
    keep[:, 90:] = False
    batch = masking(pieces)({"ids": ids, "keep": keep}, draw)
    chosen = batch["labels"] != IGNORE
    assert not chosen[:, 90:].any() and not chosen[:, [0, 50]].any()
    assert np.array_equal(batch["labels"][chosen], ids[chosen])
    assert np.array_equal(batch["ids"][~chosen], ids[~chosen])
    count, changed = chosen.sum(), batch["ids"][chosen]
    # three standard deviations of a binomial
    near = lambda share, p, n: abs(share - p) < 3 * (p * (1 - p) / n) ** 0.5  # noqa: E731
    assert near(count / (400 * 88), 0.15, 400 * 88)
    assert near((changed == pieces.mask).mean(), 0.8, count)
    same = (changed == ids[chosen]).mean()
    assert near(same - 0.1 / pieces.vocab_size, 0.1, count)
    assert batch["ids"].dtype == batch["labels"].dtype == np.int32
    with pytest.raises(ConfigError, match="mask_rate=1"):
        masking(pieces, 1.0)


def test_half_of_the_second_segments_are_of_another_document(pieces):
    documents = [[f"w{d} w{d} w{d}" for _ in range(12)] for d in range(60)]
    examples = segment_pairs(documents, pieces, longest=19, seed=0)
    strange = np.array([e["next"] for e in examples])
    assert 0.35 < strange.mean() < 0.65 and len(examples) > 60
    for example in examples:
        first, second = (example["ids"][example["types"] == kind][:-1] for kind in (0, 1))
        assert (set(first[1:].tolist()) == set(second.tolist())) == (example["next"] == 0)
        assert len(example["ids"]) <= 19 and example["ids"][0] == pieces.first
    again = segment_pairs(documents, pieces, longest=19, seed=0)
    other = segment_pairs(documents, pieces, longest=19, seed=1)
    assert [e["next"] for e in again] == strange.tolist() != [e["next"] for e in other]
    with pytest.raises(ConfigError, match="1 of 1 have two segments of 8 tokens"):
        segment_pairs(documents[:1], pieces, longest=19, seed=0)
    with pytest.raises(ConfigError, match="longest=4"):
        segment_pairs(documents, pieces, longest=4, seed=0)


def test_padding_may_be_called_attention_mask(pieces):
    ids = np.full((4, 6), pieces.unknown, np.int32)
    keep = np.tile(np.arange(6) < 4, (4, 1))
    change = masking(pieces, 0.9)
    ours = change({"ids": ids, "keep": keep}, np.random.default_rng(0))
    other = {"ids": ids, "attention_mask": keep.astype(np.int64)}
    theirs = change(other, np.random.default_rng(0))
    assert np.array_equal(ours["labels"], theirs["labels"])
    assert (ours["labels"][~keep] == IGNORE).all() and (ours["labels"] != IGNORE).any()
    for odd in ({"ids": ids}, other | {"keep": keep}, {"keep": keep}):
        with pytest.raises(ConfigError, match="masking: the batch holds"):
            change(odd, np.random.default_rng(0))
