"""Interactions: the split by time leaks nothing, histories are earlier, candidates are as said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpjax.data import Interactions, candidates, histories, leave_one_out, load_interactions
from mpjax.errors import ConfigError


def drawn(seed: int = 0) -> Interactions:
    """30 users with 1 to 12 interactions each, many at the same moment."""
    draw = np.random.default_rng(seed)
    rows = [
        (str(user), f"item {item}", float(draw.integers(0, 8)))
        for user in range(30)
        for item in draw.permutation(20)[: draw.integers(1, 13)]
    ]
    order = draw.permutation(len(rows))
    return load_interactions("made", sources={"made": lambda: [rows[i] for i in order]})


def leaks(train: Interactions, history: list[np.ndarray], last: Interactions) -> int:
    """Training histories and targets that hold a last item, or one of its moment or later."""
    when = {(u, i): t for u, i, t in zip(train.users, train.items, train.times, strict=True)}
    ends = dict(zip(last.users.tolist(), zip(last.items, last.times, strict=True), strict=True))
    count = 0
    for user, target, items in zip(train.users.tolist(), train.items, history, strict=True):
        if user in ends:
            item, end = ends[user]
            count += any(i == item or when[user, i] >= end for i in [*items, target])
    return count


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_a_test_is_in_training(seed: int) -> None:
    data = drawn(seed)
    train, validation, test = leave_one_out(data)
    history = histories(train, train, 5)
    assert leaks(train, history, test) == leaks(train, history, validation) == 0
    assert np.array_equal(validation.users, test.users) and len(set(test.users)) == len(test)
    assert (validation.times < test.times).all()
    for user, item, time in zip(test.users, test.items, test.times, strict=True):
        own = data.users == user
        assert time == data.times[own].max() and item in data.items[own]
    # A user without three moments is for training only.
    few = [u for u in range(30) if len(set(data.times[data.users == u])) < 3]
    assert few and set(few) == set(range(30)) - set(test.users.tolist())
    assert all((train.users == u).sum() == (data.users == u).sum() for u in few)
    # Control: the last row of each user, whatever its moment, leaves rows of that moment behind.
    last = np.append(np.flatnonzero(np.diff(data.users)), len(data) - 1)
    rest = data.take(~np.isin(np.arange(len(data)), last))
    assert leaks(rest, histories(rest, rest, 5), data.take(np.isin(np.arange(len(data)), last)))


def test_a_history_is_what_was_strictly_earlier() -> None:
    data = drawn()
    found = histories(data, data, 3)
    for row, items in enumerate(found):
        own = (data.users == data.users[row]) & (data.times < data.times[row])
        assert items.tolist() == data.items[own].tolist()[-3:]
    assert {len(items) for items in found} == {0, 1, 2, 3}


def test_a_pair_is_kept_once_at_its_first_time(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("user\ttext\ttime\nb\tx\t5\na\ty\t2\nb\tx\t3\nb\ty\t4\n")
    data = load_interactions(str(path))
    assert data.texts == ("x", "y") and data.users.tolist() == [0, 1, 1]
    assert data.items.tolist() == [1, 0, 1] and data.times.tolist() == [2, 3, 4]
    assert data.counts().tolist() == [1, 2]
    assert data.matrix(2).tolist() == [[False, True], [True, True]]


def test_candidates_are_the_target_and_others() -> None:
    counts = np.array([8, 1, 1, 0, 0])
    items = [{"ids": np.full(1 + i % 2, i), "types": np.ones(1 + i % 2, np.int32),
              "keep": np.ones(1 + i % 2, bool)} for i in range(5)]  # fmt: skip
    change = candidates(items, counts, 3, length=2)
    targets = np.random.default_rng(0).choice(5, 4000, p=counts / 10).astype(np.int32)
    first, again, other = (
        change({"ids": np.ones((4000, 1)), "target": targets}, np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert "target" not in first and np.array_equal(first["items"], again["items"])
    assert not np.array_equal(first["items"], other["items"])
    assert (first["items"][:, 0] == targets).all()
    assert (first["items"][:, 1:] != targets[:, None]).all()
    assert set(first["items"][:, 1:].ravel().tolist()) == set(range(5))
    assert (first["item_ids"][..., 0] == first["items"]).all()
    assert (first["item_keep"].sum(-1) == 1 + first["items"] % 2).all()
    # What `log_q` says is how often an item is a candidate, but for the target's own absence.
    often = np.bincount(first["items"].ravel(), minlength=5) / 4000
    said = np.array([np.exp(first["log_q"][first["items"] == i][0]) for i in range(5)])
    expected = counts / 10 + 3 / 4 * (1 - counts / 10)
    assert said == pytest.approx(counts / 10 + 3 / 5, rel=1e-6)
    assert often == pytest.approx(expected, abs=0.03)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    one = [{"ids": np.ones(1), "types": np.ones(1), "keep": np.ones(1)}] * 2
    data = drawn()
    cases = [
        ("a\tx\tnoon\n", lambda: load_interactions(str(path)), "time 'noon' is no number"),
        ("a\tx\tnan\n", lambda: load_interactions(str(path)), "time 'nan' is no number"),
        ("a\tx\n", lambda: load_interactions(str(path)), "expected user<TAB>text<TAB>time"),
        ("a\tx\t1\nb\tx\t2\n", lambda: load_interactions(str(path)), "1 item.s.; expected at"),
        ("", lambda: load_interactions("movies"), "no such source or file; expected a file of"),
        ("", lambda: histories(data, data, 0), "0 items; expected at least 1"),
        ("", lambda: candidates(one, [1], 1, length=2), "give a count for each"),
        ("", lambda: candidates(one, [0, 0], 1, length=2), "give a count for each"),
        ("", lambda: candidates(one, [1, 1], 0, length=2), "negatives: 0; expected at least 1"),
        ("", lambda: Interactions(*np.array([[0, 0], [0, 1], [2, 1]]), ("a", "b")), "sort them by"),
        ("", lambda: Interactions(*np.array([[0, 0], [0, 2], [1, 2]]), ("a", "b")), "0 to 2 of 2"),
        ("", lambda: Interactions(*np.ones((2, 2)), np.ones(3), ("a",)), "give one axis each"),
        (
            "",
            lambda: leave_one_out(data.take(data.times < 2)),
            "no user has three moments, one each",
        ),
    ]
    for text, call, message in cases:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
