"""Examples anew in each epoch: by seed, epoch and record alone, and never held-out ones."""

import copy
import functools
import itertools
import pickle

import numpy as np
import pytest

from mpjax.data import LabelledTexts, bucket_batches, eval_batches, image_batches, train_wordpiece
from mpjax.data.augment import (
    RandomDeletion,
    RandomInsertion,
    RandomSwap,
    TokenDropout,
    TokenMasking,
    augmented_examples,
    augmented_sentences,
    augmented_texts,
)
from mpjax.data.tagged import TaggedSentences
from mpjax.errors import ConfigError
from mpjax.tasks import TextClassification, TokenClassification

COUNT, LENGTHS = 11, (8, 16, 32)
WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "xyz"]


def text_of(number, side="first"):
    draw = np.random.default_rng((number, len(side)))
    return " ".join(draw.choice(WORDS, draw.integers(4, 25)))


@pytest.fixture(scope="module")
def texts():
    return LabelledTexts(
        tuple(map(text_of, range(COUNT))), np.arange(COUNT, dtype=np.int32) % 2, ("bad", "good")
    )


@pytest.fixture(scope="module")
def pieces():
    return train_wordpiece([" ".join(WORDS)], 90)


@pytest.fixture(scope="module")
def examples(texts, pieces):
    found = TextClassification(texts.classes).examples(pieces, texts, longest=32)
    return [e | {"record": np.int32(i)} for i, e in enumerate(found)]


@pytest.fixture(scope="module")
def augment(texts, examples, pieces):
    changes = [RandomSwap(0.2), RandomDeletion(0.2)]
    return augmented_texts(texts, examples, changes, pieces, longest=32)


def stream(examples, augment, **changes):
    return bucket_batches(
        examples, **dict(batch=4, seed=1, lengths=LENGTHS, augment=augment) | changes
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)
        for a, b in zip(first, second, strict=True)
    )


def records(batches, per_epoch):
    """(epoch, record) -> what is in the batches of it, without padding."""
    found = {}
    for index, batch in enumerate(batches):
        for ids, keep, label, record in zip(
            *(batch[name] for name in ("ids", "keep", "labels", "record")), strict=True
        ):
            found[index // per_epoch, int(record)] = (*ids[keep].tolist(), int(label))
    return found


def test_a_record_is_one_of_seed_and_epoch_whatever_the_batch(examples, augment):
    fours = records(take(stream(examples, augment), 9), 3)
    threes = records(take(stream(examples, augment, batch=3), 12), 4)
    assert len(fours) == 3 * COUNT and fours == threes
    assert all(fours[epoch, r][-1] == r % 2 for epoch, r in fours), "labels stay"
    changed = [fours[0, r] != fours[1, r] for r in range(COUNT)]
    assert sum(changed) > COUNT / 2, "another change in another epoch"
    assert records(take(stream(examples, augment, seed=2), 3), 3) != {
        key: value for key, value in fours.items() if key[0] == 0
    }
    plain = records(take(stream(examples, None), 3), 3)
    assert plain[0, 3] == (*examples[3]["ids"].tolist(), 1) and plain[0, 3] != fours[0, 3]


def test_the_order_is_that_without_augmentation(examples, augment):
    own, plain = (take(stream(examples, a), 9) for a in (augment, None))
    assert [b["record"].tolist() for b in own] == [b["record"].tolist() for b in plain]


def test_a_resumed_stream_goes_on_and_workers_change_nothing(examples, augment):
    whole = take(stream(examples, augment), 7)
    first = stream(examples, augment)
    take(first, 3)
    resumed = stream(examples, augment)
    resumed.set_state(first.get_state())
    assert same(take(resumed, 4), whole[3:])
    for workers in (1, 2, 4):
        ahead = stream(examples, augment, workers=workers)
        try:
            start = 0 if workers == 1 else 3  # where another number of workers stopped
            ahead.set_state({"next_index": start})
            assert same(take(ahead, 7 - start), whole[start:])
            assert ahead.get_state() == {"next_index": 7}
        finally:
            ahead.close()
    assert not same(take(stream(examples, None), 7), whole), "the control"


def test_what_is_held_out_stays_as_it_is(texts, examples, augment, pieces):
    before = copy.deepcopy((texts, examples))
    judged = eval_batches(examples, batch=4, lengths=LENGTHS)
    noise = augmented_examples(examples, [TokenDropout(0.3, pieces), TokenMasking(0.3, pieces)])
    for one in (augment, noise):
        take(stream(examples, one), 6)
    again = eval_batches(examples, batch=4, lengths=LENGTHS)
    assert same([batch for _, batch in judged], [batch for _, batch in again])
    assert pickle.dumps((texts, examples)) == pickle.dumps(before), "in place neither"
    with pytest.raises(ConfigError, match="unknown argument 'augment'"):
        eval_batches(examples, batch=4, lengths=LENGTHS, augment=augment)


def test_both_texts_of_a_pair_change(texts, pieces):
    seconds = tuple(text_of(i, "second") for i in range(COUNT))
    pairs = LabelledTexts(texts.texts, texts.labels, texts.classes, seconds)
    encoded = TextClassification(texts.classes).examples(pieces, pairs, longest=80)
    augment = augmented_texts(pairs, encoded, RandomSwap(0.5), pieces, longest=80)
    new = augment(0, np.random.default_rng(0))
    for side in (0, 1):
        old_ids, new_ids = (e["ids"][e["types"] == side] for e in (encoded[0], new))
        assert sorted(old_ids) == sorted(new_ids) and not np.array_equal(old_ids, new_ids)
    assert new["labels"] == encoded[0]["labels"]


def test_longer_examples_go_to_the_next_length(examples, caplog):
    def longer(row, draw):
        new = {name: np.resize(examples[row][name], 20) for name in ("ids", "types", "keep")}
        return examples[row] | new

    assert {b["ids"].shape[1] for b in take(stream(examples, longer), 3)} == {32}
    with pytest.raises(ConfigError, match="20 tokens, the longest is 16; raise it"):
        next(stream([e for e in examples if len(e["ids"]) <= 16], longer, lengths=(16,)))


def test_texts_that_are_cut_again_and_again_are_not_logged(texts, examples, pieces, caplog):
    cut = augmented_texts(texts, examples, RandomSwap(0.1), pieces, longest=6)
    assert len(cut(0, np.random.default_rng(0))["ids"]) == 6 and not caplog.records
    pieces.encode(texts.texts, longest=6)
    assert "are cut to 6 tokens" in caplog.text, "the control"


NAMES = ("B-x", "I-x", "O")
SENTENCES = TaggedSentences(
    (tuple(WORDS[:6]), tuple(WORDS[6:9])),
    (np.array([2, 0, 1, 1, 2, 0], np.int32), np.array([0, 0, 1], np.int32)), NAMES,
)  # fmt: skip


def test_tags_follow_their_words_into_the_labels(pieces):
    encode = functools.partial(TokenClassification(NAMES).examples, pieces, longest=40)
    plain = encode(SENTENCES)
    augment = augmented_sentences(SENTENCES, RandomDeletion(0.4), encode)
    word = {tuple(pieces.pieces(w).tolist()): w for w in WORDS}
    for seed in range(40):
        example = augment(0, np.random.default_rng(seed))
        tags = example["labels"][example["labels"] >= 0]
        firsts = np.flatnonzero(example["labels"] >= 0)
        ends = [*firsts[1:], len(example["ids"]) - 1]
        found = [
            word[tuple(example["ids"][a:b].tolist())] for a, b in zip(firsts, ends, strict=True)
        ]
        assert len(found) == len(tags) and set(found) <= set(SENTENCES.words[0])
        inside = [w for w, tag in zip(found, tags, strict=True) if NAMES[tag] != "O"]
        assert inside == [w for w in found if w not in (WORDS[0], WORDS[4])]
        assert all(tags[i - 1] < 2 for i in np.flatnonzero(tags == 1) if i) and tags[0] != 1
    assert plain[0]["labels"][plain[0]["labels"] >= 0].tolist() == SENTENCES.tags[0].tolist()


def test_mistakes_are_one_line(texts, examples, pieces):
    insert = RandomInsertion(0.1, {"ax": ["ay"]})
    encode = functools.partial(TokenClassification(NAMES).examples, pieces, longest=40)
    pos = TaggedSentences(SENTENCES.words, SENTENCES.tags, ("DT", "NN", "VB"))
    mixed = TaggedSentences(SENTENCES.words, SENTENCES.tags, ("B-x", "E-x", "O"))
    blank = LabelledTexts(("a b", " "), np.array([0, 1], np.int32), texts.classes)
    renamed = lambda record, draw: tuple((w, "new") for w, _ in record)  # noqa: E731
    for make, said in (
        (lambda: augmented_texts(texts, examples[1:], insert, pieces, longest=9), "and 10 ex"),
        (lambda: augmented_texts(texts, examples, [], pieces, longest=9), "no transform"),
        (lambda: augmented_texts(blank, examples[:2], insert, pieces, longest=9), "text 1 has no"),
        (lambda: augmented_sentences(pos, [insert], encode), "gets the tag O, which these tags"),
        (lambda: augmented_sentences(mixed, RandomSwap(0.1), encode), "'E-x' are not of one kind"),
        (lambda: augmented_sentences(SENTENCES, renamed, encode)(0, None), "tag 'new' is none of"),
        (lambda: augmented_examples([], TokenDropout(0.1, pieces)), "is empty"),
        (lambda: augmented_examples(examples, "swap"), "'swap' is no transform"),
        (lambda: next(stream(examples, lambda row, draw: {"ids": [1]})), "augment: example"),
        (lambda: next(stream(examples, lambda row, draw: None)), "becomes None; give a dict"),
        (lambda: stream(examples, None, workers=-1), "workers=-1: expected a whole number"),
        (lambda: stream(examples, None, workers=1.5), "workers=1.5"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            make()
        assert said in str(error.value), str(error.value)


def test_images_are_by_seed_epoch_and_image_too():
    inputs = np.broadcast_to(np.arange(7, dtype=np.float32)[:, None, None, None], (7, 2, 2, 1))
    data = {"inputs": inputs, "targets": np.arange(7)}
    noise = lambda image, draw: image + draw.random(dtype=np.float32)  # noqa: E731
    by_image = []
    for batch in (1, 7):
        found = take(image_batches(data, batch=batch, seed=1, transforms=[noise]), 14 // batch)
        rows = [
            r for b in found for r in zip(b["targets"].tolist(), b["inputs"].tolist(), strict=True)
        ]
        by_image.append([dict(rows[:7]), dict(rows[7:])])
    assert by_image[0] == by_image[1] and by_image[0][0] != by_image[0][1]
    whole = take(image_batches(data, batch=3, seed=1, transforms=[noise]), 5)
    resumed = image_batches(data, batch=3, seed=1, transforms=[noise])
    resumed.set_state({"next_index": 2})
    assert same(take(resumed, 3), whole[2:])
    assert data["inputs"].max() == 6, "not in place"
