"""Pipelines: every window once an epoch, the same rows on any number of processes, exact resume."""

import itertools
import json
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mpjax.data import batches, validation_batches
from mpjax.errors import ConfigError

TOKENS = np.arange(1000, dtype=np.uint16)  # a token is its position
SETTINGS = {"batch": 4, "seq": 8, "seed": 3}
WINDOWS = 124  # (1000 - 1) // 8


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def starts(found):
    return np.concatenate([batch["inputs"][:, 0] for batch in found])


def equal(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x | y
    )


def test_rows_are_windows_of_the_stream():
    for batch in take(batches(TOKENS, **SETTINGS), 5) + list(
        validation_batches(TOKENS, batch=4, seq=8)
    ):
        assert {key: (a.shape, a.dtype) for key, a in batch.items()} == {
            "inputs": ((4, 8), np.int32),
            "targets": ((4, 8), np.int32),
        }
        assert all(a.flags.c_contiguous for a in batch.values())
        assert np.array_equal(batch["inputs"], batch["inputs"][:, :1] + np.arange(8))
        assert np.array_equal(batch["targets"], batch["inputs"] + 1)


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    per_epoch = WINDOWS // 4
    order = starts(take(batches(TOKENS, **SETTINGS), 3 * per_epoch)).reshape(3, WINDOWS)
    for epoch in order:
        assert np.array_equal(np.sort(epoch), np.arange(WINDOWS) * 8)
        assert not np.array_equal(epoch, np.sort(epoch))
    assert not np.array_equal(order[0], order[1]) and not np.array_equal(order[1], order[2])


def test_epochs_may_end_inside_a_batch():
    order = starts(take(batches(TOKENS, batch=5, seq=8, seed=0), 50))
    assert np.array_equal(np.sort(order[:WINDOWS]), np.arange(WINDOWS) * 8)
    assert np.array_equal(np.sort(order[WINDOWS : 2 * WINDOWS]), np.arange(WINDOWS) * 8)


def test_seeds_fix_the_order_and_neighbours_share_no_epoch():
    def epochs(seed):
        found = starts(take(batches(TOKENS, batch=4, seq=8, seed=seed), 3 * WINDOWS // 4))
        return {tuple(epoch) for epoch in found.reshape(3, WINDOWS)}

    assert epochs(3) == epochs(3)
    assert len(epochs(0) | epochs(1) | epochs(2) | epochs(2**40)) == 12


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_global_batch_is_the_same_on_any_number_of_processes(count):
    settings = {"batch": 8, "seq": 8}
    for make in (
        lambda **shard: take(batches(TOKENS, **settings, seed=3, **shard), 40),
        lambda **shard: list(validation_batches(TOKENS, **settings, **shard)),
    ):
        shards = [make(process_index=i, process_count=count) for i in range(count)]
        joined = [
            {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            for parts in zip(*shards, strict=True)
        ]
        assert shards[0][0]["inputs"].shape == (8 // count, 8)
        assert equal(joined, make())
        if count > 1:
            assert not equal(shards[0], shards[1])


@pytest.mark.parametrize("handed_out", [0, 1, 7, 31, 70])
def test_a_restored_state_continues_exactly(handed_out):
    iterator = batches(TOKENS, **SETTINGS)
    take(iterator, handed_out)
    time.sleep(0.05)  # let it prefetch: the state must not count that
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 20)
    assert equal(expected, take(batches(TOKENS, **SETTINGS), handed_out + 20)[handed_out:])

    fresh = batches(TOKENS, **SETTINGS)
    fresh.set_state(state)
    assert equal(take(fresh, 20), expected)

    used = batches(TOKENS, **SETTINGS)
    take(used, 3)  # its buffer is full of other batches
    used.set_state(state)
    assert equal(take(used, 20), expected)
    assert not equal(take(batches(TOKENS, **SETTINGS | {"seed": 4}), 20), expected)


@hypothesis.given(
    st.integers(2, 400), st.integers(1, 9), st.integers(1, 5), st.none() | st.integers(1, 60)
)
def test_validation_takes_each_window_at_most_once_evenly(length, seq, batch, limit):
    windows = (length - 1) // seq
    hypothesis.assume(windows >= batch)
    found = validation_batches(np.arange(length), batch=batch, seq=seq, limit=limit)
    assert len(found) == min(windows // batch, limit or windows)
    order = starts(found)
    assert equal(list(found), list(found))
    assert np.all(order % seq == 0)
    gaps = np.diff(order // seq)
    assert gaps.size == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    assert order[0] == 0 and order[-1] // seq >= windows - windows / order.size - 1


def test_indexing_past_the_end_stops():
    found = validation_batches(TOKENS, batch=4, seq=8, limit=3)
    assert equal([found[-1]], list(found)[2:])
    with pytest.raises(IndexError):
        found[3]


BAD = [
    ({"seq": 1000}, "seq=1000: longer than the text, which has 1000 tokens"),
    ({"seq": 0}, "seq=0"),
    ({"batch": 0}, "batch=0"),
    ({"batch": 4, "process_count": 3}, "batch=4: does not divide by process_count=3; use 3"),
    ({"batch": 2, "process_count": 8}, "batch=2: does not divide by process_count=8; use 8"),
    ({"process_index": 2, "process_count": 2}, "process_index=2: expected 0 to 1"),
    ({"process_index": -1}, "process_index=-1"),
]


@pytest.mark.parametrize(("change", "message"), BAD + [({"seed": -1}, "seed=-1")])
def test_bad_training_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        batches(TOKENS, **SETTINGS | change)


@pytest.mark.parametrize(
    ("change", "message"),
    BAD + [({"batch": 125}, "batch=125: .*only 124 windows"), ({"limit": 0}, "limit=0")],
)
def test_bad_validation_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        validation_batches(TOKENS, **{"batch": 4, "seq": 8} | change)


def test_the_longest_sequence_that_fits_is_taken():
    first = next(batches(TOKENS, batch=1, seq=999, seed=0))
    assert first["targets"][0, -1] == 999


@pytest.mark.parametrize(
    "tokens", [np.linspace(0, 9, 40), np.ones(40, bool), np.array(list("ab" * 20)),
               np.arange(40).reshape(2, 20), list(range(40))],
)  # fmt: skip
def test_a_stream_is_of_token_ids(tokens):
    for make in (lambda: batches(tokens, batch=1, seq=4, seed=0),
                 lambda: validation_batches(tokens, batch=1, seq=4)):  # fmt: skip
        with pytest.raises(ConfigError, match="tokens: .*give an array of token ids"):
            make()
