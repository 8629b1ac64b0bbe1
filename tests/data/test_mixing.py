"""Rows of several tasks in the proportions that were asked for, and nothing of one in another's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mpjax.data import mixed_batches, mixing_weights
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError


def examples(task: int, count: int, words: bool = False) -> list[dict[str, Any]]:
    """Texts of 1 to 4 tokens; all ids of one are its number, of which tasks share none."""
    found = []
    for i in range(count):
        ids = np.full(1 + i % 4, 1 + 1000 * task + i, np.int32)
        labels = ids % 3 if words else np.int32(i % 2)
        found.append({"ids": ids, "keep": np.ones(len(ids), bool), "labels": labels})
    return found


def scores(task: int, count: int) -> list[dict[str, Any]]:
    texts = examples(task, count)
    return [{"ids": e["ids"], "keep": e["keep"], "values": np.float32(0.5)} for e in texts]


DATA = {"mood": examples(0, 30), "tags": examples(1, 90, words=True), "score": scores(2, 7)}
WAYS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "proportional": ({}, {"mood": 30 / 127, "tags": 90 / 127, "score": 7 / 127}),
    "temperature": (
        {"temperature": 2.0},
        {n: len(e) ** 0.5 / sum(len(x) ** 0.5 for x in DATA.values()) for n, e in DATA.items()},
    ),
    "fixed": (
        {"weights": {"score": 5, "tags": 1, "mood": 2.0}},
        {"mood": 0.25, "tags": 0.125, "score": 0.625},
    ),
}


def drawn(**options: Any) -> Any:
    return mixed_batches(DATA, **(dict(batch=16, seed=3, lengths=(2, 4)) | options))


@pytest.mark.parametrize("way", WAYS)
def test_rows_come_in_the_proportions_that_were_asked_for(way: str) -> None:
    options, shares = WAYS[way]
    sizes = {name: len(part) for name, part in DATA.items()}
    assert mixing_weights(sizes, **options) == pytest.approx(shares, rel=1e-12)
    data = drawn(**options)
    tasks = np.concatenate([next(data)["task"] for _ in range(100)])
    for number, (name, share) in enumerate(shares.items()):
        assert np.mean(tasks == number) == pytest.approx(share, rel=0.01), name
    # evenly spread: no batch lies further off than rounding
    for part in tasks.reshape(100, 16):
        counts = Counter(part.tolist())
        assert all(abs(counts[i] - 16 * p) < 2 for i, p in enumerate(shares.values()))


def test_every_epoch_of_a_task_takes_each_of_its_examples_once() -> None:
    data = drawn(weights={"mood": 1, "tags": 1, "score": 2})
    rows = [(t, int(i)) for _ in range(16) for b in [next(data)]
            for t, i in zip(b["task"].tolist(), b["ids"][:, 0], strict=True)]  # fmt: skip
    seen = [[i for t, i in rows if t == task] for task in range(3)]
    orders = [seen[0][:30], seen[0][30:60], seen[2][:7], seen[2][7:14]]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, 31))
    assert sorted(orders[2]) == sorted(orders[3]) == list(range(2001, 2008))
    assert orders[0] != orders[1] and orders[2] != orders[3], "the order is a new one"


def test_a_row_has_targets_of_its_own_task_alone() -> None:
    data = drawn()
    lengths = set()
    for _ in range(40):
        batch = next(data)
        length = batch["ids"].shape[1]
        lengths.add(length)
        assert set(batch) == {
            *("ids", "keep", "task", "mood/labels", "tags/labels", "score/values", "score/weights")
        }
        np.testing.assert_array_equal(batch["keep"], batch["ids"] > 0)
        mine = [batch["task"] == i for i in range(3)]
        np.testing.assert_array_equal(batch["mood/labels"] != IGNORE, mine[0])
        tags = batch["tags/labels"]
        np.testing.assert_array_equal(tags != IGNORE, mine[1][:, None] & batch["keep"])
        np.testing.assert_array_equal(tags[tags != IGNORE], (batch["ids"] % 3)[tags != IGNORE])
        np.testing.assert_array_equal(batch["score/weights"], mine[2].astype(np.float32))
        assert (batch["ids"][mine[1]][:, 0] // 1000 == 1).all()
        assert batch["keep"].sum(1).max() > length - 2, "no longer than the longest row needs"
    assert lengths == {4}


def test_an_array_a_token_keeps_its_shape() -> None:
    """Such as a teacher's answers, of one task alone."""
    wide = [e | {"answers": np.repeat(e["ids"][:, None], 3, 1)} for e in examples(1, 9, words=True)]
    data = {"mood": examples(0, 9), "tags": wide}
    batch = next(mixed_batches(data, batch=8, seed=0, lengths=(4,)))
    assert batch["tags/answers"].shape == (8, 4, 3)
    own = batch["task"] == 1
    assert (batch["tags/answers"][own] == batch["ids"][own][..., None]).all()
    assert (batch["tags/answers"][~own] == IGNORE).all() and own.any() and not own.all()


def test_a_run_that_is_resumed_draws_the_same_rows() -> None:
    data, again = drawn(), drawn()
    for _ in range(5):
        next(data)
    again.set_state(data.get_state())
    first, second = next(data), next(again)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    other = next(drawn(seed=4))
    assert not np.array_equal(next(drawn())["ids"], other["ids"])


def test_a_change_meets_the_rows_of_its_task_alone() -> None:
    def mask(batch: Any, draw: np.random.Generator) -> Any:
        labels = np.where(draw.random(batch["ids"].shape) < 0.5, batch["ids"], IGNORE)
        rest = {name: x for name, x in batch.items() if name != "labels"}
        return rest | {"ids": np.where(labels == IGNORE, batch["ids"], 7), "hidden": labels}

    data = drawn(change={"mood": mask}, weights={"mood": 1, "tags": 14, "score": 1})
    parts = [next(data) for _ in range(6)]
    for batch in parts:  # the field is there in batches without the task too
        others = batch["task"] != 0
        assert "mood/labels" not in batch and (batch["mood/hidden"][others] == IGNORE).all()
        assert not (batch["ids"][others] == 7).any()
    assert any((batch["ids"] == 7).any() for batch in parts)
    again = drawn(change={"mood": mask}, weights={"mood": 1, "tags": 14, "score": 1})
    assert all(np.array_equal(b["ids"], next(again)["ids"]) for b in parts)


MOOD, TAGS = DATA["mood"], DATA["tags"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"examples": {}}, "no task"),
        ({"examples": [MOOD]}, "give a dict of task"),
        ({"examples": {"mood": MOOD, "tags": []}}, "'tags' has no examples"),
        ({"temperature": 0.0}, "temperature=0.0 is not positive"),
        ({"temperature": -1}, "temperature=-1 is not positive"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 2.0, "weights": {"mood": 1, "tags": 1}}, "exclude each other"),
        ({"weights": {"mood": 1}}, "weights lack 'tags'"),
        ({"weights": {"mood": 1, "tags": -0.5}}, "the weight of 'tags' is -0.5"),
        ({"weights": {"mood": 1, "tags": 0}}, "the weight of 'tags' is 0"),
        ({"weights": {"mood": 1, "tags": True}}, "the weight of 'tags' is True"),
        ({"weights": {"mood": 1, "tags": 1, "x": 1}}, "weights name 'x', which is no task"),
        ({"weights": [1, 2]}, r"weights=\[1, 2\]"),
        ({"examples": {"mood": MOOD, "ids": TAGS}}, "the task 'ids'"),
        ({"examples": {"a/b": MOOD}}, "the task 'a/b'"),
        ({"examples": {"mood": [{"ids": np.array([1]), "task": 1}]}}, "a field 'task'"),
        ({"examples": {"mood": [{"ids": np.array([1]), "tags/labels": 1}]}}, "'tags/labels'"),
        (
            {"examples": {"mood": MOOD, "tags": [{"ids": np.array([1]), "labels": 1}]}},
            "'mood' have 'keep' and those of 'tags' have not",
        ),
        ({"change": {"moot": lambda b, d: b}}, "change names 'moot'"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"lengths": (2,)}, "4 tokens, the longest is 2"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], said: str) -> None:
    settings = dict(examples={"mood": MOOD, "tags": TAGS}, batch=4, seed=0, lengths=(4,)) | options
    with pytest.raises(ConfigError, match=said) as found:
        mixed_batches(settings.pop("examples"), **settings)
    assert "\n" not in str(found.value)
