"""Bucketed batches: every example once an epoch, few shapes, the same order again."""

import itertools

import numpy as np
import pytest

from mpjax.data.buckets import IGNORE, bucket_batches, eval_batches, pad
from mpjax.errors import ConfigError

DRAW = np.random.default_rng(0)
EXAMPLES = [
    {"ids": DRAW.integers(1, 99, n).astype(np.int32), "labels": np.int32(i)}
    for i, n in enumerate(DRAW.integers(1, 33, 53))
]


def take(count, **changes):
    settings = dict(batch=8, seed=3, lengths=(8, 16, 32)) | changes
    return list(itertools.islice(bucket_batches(EXAMPLES, **settings), count))


def test_an_epoch_is_every_example_once_and_a_few_twice():
    per_epoch = -(-len(EXAMPLES) // 8)
    for epoch in range(3):
        found = take(3 * per_epoch)[epoch * per_epoch : (epoch + 1) * per_epoch]
        rows = np.concatenate([batch["labels"] for batch in found])
        assert set(rows.tolist()) == set(range(53)) and len(rows) == 56
        assert {batch["ids"].shape[1] for batch in found} <= {8, 16, 32}


def test_rows_hold_their_example_and_padding():
    for batch in take(7):
        for ids, label in zip(batch["ids"], batch["labels"], strict=True):
            want = EXAMPLES[label]["ids"]
            assert np.array_equal(ids[: len(want)], want) and not ids[len(want) :].any()
            assert ids.dtype == np.int32


def test_orders_follow_seed_and_epoch():
    first, again, other = take(14), take(14), take(7, seed=4)
    rows = lambda batches: [batch["labels"].tolist() for batch in batches]  # noqa: E731
    assert rows(first) == rows(again) and rows(first[:7]) != rows(first[7:])
    assert rows(first[:7]) != rows(other)


def gone_on(examples, skip, count, **settings):
    """Batches behind a saved place, which are the same when it is gone on from."""
    whole = bucket_batches(examples, **settings)
    [next(whole) for _ in range(skip)]
    state, rest = whole.get_state(), [next(whole) for _ in range(count)]
    resumed = bucket_batches(examples, **settings)
    resumed.set_state(state)
    for batch in rest:
        other = next(resumed)
        assert all(np.array_equal(batch[name], other[name]) for name in batch)
    return rest


def test_a_saved_place_goes_on_with_the_same_changes():
    def noise(batch, draw):
        return batch | {"noise": draw.random(len(batch["labels"]))}

    rest = gone_on(EXAMPLES, 9, 3, batch=8, seed=3, lengths=(32,), change=noise)
    assert not np.array_equal(rest[0]["noise"], rest[1]["noise"])


def test_evaluation_sees_every_example_once():
    found = eval_batches(EXAMPLES, batch=8, lengths=(8, 16, 32))
    rows = np.concatenate([part for part, _ in found])
    assert sorted(rows.tolist()) == list(range(53))
    for part, batch in found:
        assert len(batch["labels"]) == 8 and np.array_equal(batch["labels"][: len(part)], part)
        assert (batch["labels"][len(part) :] == part[0]).all()


def test_padding_is_of_no_target():
    batch = pad([{"ids": np.array([1, 2]), "labels": np.array([5, 6]), "n": 1},
                 {"ids": np.array([3]), "labels": np.array([7]), "n": 2}], 3)  # fmt: skip
    assert batch["labels"].tolist() == [[5, 6, IGNORE], [7, IGNORE, IGNORE]]
    assert batch["ids"].tolist() == [[1, 2, 0], [3, 0, 0]] and batch["n"].tolist() == [1, 2]
    assert pad([{"ids": np.array([1])}], 2, {"ids": 9})["ids"].tolist() == [[1, 9]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": (8, 16)}, "an example has 3[0-9] tokens, the longest is 16; raise it"),
        ({"lengths": ()}, "at least one positive length"),
        ({"lengths": (0, 64)}, "at least one positive length"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_mistakes_are_one_line(changes, said):
    with pytest.raises(ConfigError, match=said):
        take(1, **changes)
    with pytest.raises(ConfigError, match="examples: none"):
        eval_batches([], batch=1, lengths=(8,))
    with pytest.raises(ConfigError, match="ids: 2 tokens do not fit 1"):
        pad([{"ids": np.array([1, 2])}], 1)


# What each field must hold, whatever example comes first: NumPy's stack of the same lists.
MIXED = [
    ("weights", [[1, 1], [0.5, 0.25]], np.float64),
    ("weights", [np.ones(2, np.int32), np.array([0.5], np.float32)], np.float64),
    ("ids", [np.array([5], np.uint8), np.array([300, 70_000], np.int32)], np.int32),
    ("ids", [np.array([5], np.int8), np.array([300], np.uint16)], np.int32),
    ("ids", [[True, False], [3, 300]], np.int64),
    ("weights", [[], [0.5]], np.float64),
    ("ids", [[], np.array([7], np.int32)], np.int32),
    ("score", [1, 0.5], np.float64),
    ("labels", [np.array([200], np.uint8), np.array([1, 2], np.uint8)], np.int16),
    ("labels", [np.array([True]), np.array([False, True])], np.int8),
    ("keep", [np.ones(2, bool), np.ones(1, bool)], np.bool_),
]


@pytest.mark.parametrize(("name", "values", "dtype"), MIXED)
@pytest.mark.parametrize("way", ["pad", "train", "eval"])
def test_a_field_has_the_dtype_that_holds_all_examples(name, values, dtype, way):
    examples = [{name: v, "row": i, "size": np.zeros(2)} for i, v in enumerate(values)]
    batches = {
        "pad": lambda: [pad(examples, 2)],
        "train": lambda: itertools.islice(
            bucket_batches(examples, batch=1, seed=0, lengths=(2,)), 2
        ),
        "eval": lambda: [b for _, b in eval_batches(examples, batch=1, lengths=(2,))],
    }[way]()
    rows = {}
    for batch in batches:
        assert batch[name].dtype == dtype, "in every batch"
        rows |= dict(zip(batch["row"].tolist(), batch[name].tolist(), strict=True))
    fill = IGNORE if name == "labels" else 0
    for i, value in enumerate(values):
        want = np.asarray(value).tolist()
        if isinstance(want, list):
            want = want + [fill] * (2 - len(want))
        assert rows[i] == want


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([{"ids": [1]}, {"ids": [2], "weights": [1]}], r"examples\[1\]: has the field 'weights'"),
        ([{"ids": [1], "weights": [1]}, {"ids": [2]}], r"examples\[1\]: lacks the field 'weights'"),
        ([{"ids": [1]}, {"ids": 2}], "ids has 0 axes, in examples.0. 1"),
        ([{"ids": ["a"]}], r"examples\[0\]: ids is \['a'\]; give a number"),
        ([{"ids": [[1, 2]]}], "ids is"),
        ([{"ids": [1, [2]]}], "ids is"),
        ([{"ids": None}], "ids is None"),
        ([[1, 2]], r"examples\[0\] is \[1, 2\]; give a dict"),
        ([{}], "give a dict"),
        ([], "examples: none"),
    ],
)
def test_examples_that_do_not_go_together_are_one_line(examples, said):
    for use in (
        lambda: pad(examples, 4),
        lambda: eval_batches(examples, batch=1, lengths=(4,)),
        lambda: bucket_batches(examples, batch=1, seed=0, lengths=(4,)),
    ):
        with pytest.raises(ConfigError, match=said):
            use()


class InTurn:
    """Balanced draws as one would write them down: endless classes, each a pile shuffled anew."""

    def __init__(self, seed, classes):
        self.seed, self.piles = seed, [[] for _ in sorted(set(classes))]
        self.members = [np.flatnonzero(np.array(classes) == one) for one in sorted(set(classes))]
        self.shuffled, self.turn = [0] * len(self.piles), 0

    def draw(self):
        one = self.turn
        self.turn = (one + 1) % len(self.piles)
        if not self.piles[one]:
            draw = np.random.default_rng((self.seed, one, self.shuffled[one], 3))
            self.piles[one] = draw.permutation(self.members[one]).tolist()
            self.shuffled[one] += 1
        return self.piles[one].pop(0)


CLASSES = [0] * 30 + [1] * 5 + [2] * 18  # of EXAMPLES, by place
OF_CLASS = [e | {"class": c} for e, c in zip(EXAMPLES, CLASSES, strict=True)]


@pytest.mark.parametrize("size", [2, 8])  # fewer rows than classes, and more
def test_balanced_batches_take_classes_in_turn_and_use_each_up(size):
    settings = dict(batch=size, seed=3, lengths=(8, 16, 32))
    data = bucket_batches(OF_CLASS, balanced="class", **settings)
    pile, taken, rows = InTurn(3, CLASSES), np.zeros(len(CLASSES), int), []
    for batch in itertools.islice(data, 60):
        places = batch["labels"].tolist()  # the place of each example
        assert places == [pile.draw() for _ in places]
        counts = np.bincount(batch["class"], minlength=3)
        assert counts.max() - counts.min() <= 1
        longest = max(len(EXAMPLES[i]["ids"]) for i in places)
        assert batch["ids"].shape == (size, min(n for n in (8, 16, 32) if n >= longest))
        for place in places:
            taken[place] += 1
            own = taken[np.array(CLASSES) == CLASSES[place]]
            assert own.max() - own.min() <= 1  # no example twice before all others once
        rows += batch["class"].tolist()
    assert np.ptp(np.bincount(rows)) <= 1
    plain = itertools.islice(bucket_batches(OF_CLASS, **settings), 60)
    assert np.ptp(np.bincount(np.concatenate([b["class"] for b in plain]))) > 30  # the control


def test_balanced_batches_go_on_from_a_saved_place():
    def again(place, draw):
        return OF_CLASS[place] | {"drawn": draw.random()}

    examples = [e | {"drawn": 0.0} for e in OF_CLASS]
    settings = dict(batch=7, seed=1, lengths=(8, 32), balanced="class", augment=again)
    rest = gone_on(examples, 11, 4, **settings)
    drawn = np.concatenate([batch["drawn"] for batch in rest])
    assert len(set(drawn.tolist())) == 28  # a rare example is changed anew in each round


@pytest.mark.parametrize(
    ("examples", "field", "said"),
    [
        (OF_CLASS, "klass", "balanced='klass': examples have no such field; known: ids labels"),
        (OF_CLASS, "ids", r"balanced='ids': is an array .* in examples\[0\]; one whole number"),
        ([{"ids": [1], "y": 0.5}] * 2, "y", r"balanced='y': is 0.5 in examples\[0\]; one whole"),
        ([{"ids": [1], "y": 4}] * 2, "y", "all examples are of class 4; expected two classes"),
        ([{"ids": [1], "y": y} for y in (1, IGNORE)], "y", r"examples\[1\] has no class \(-100\)"),
        (OF_CLASS, True, "balanced=True: examples have no such field"),
    ],
)
def test_what_has_no_classes_is_not_balanced(examples, field, said):
    with pytest.raises(ConfigError, match=said):
        bucket_batches(examples, batch=2, seed=0, lengths=(32,), balanced=field)
