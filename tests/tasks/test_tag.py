"""Token classification: one tag a word, whatever the pieces."""

import itertools

import numpy as np
import optax
import pytest

from mpjax.data.buckets import IGNORE, bucket_batches
from mpjax.data.tagged import TaggedSentences
from mpjax.data.tokenizers.wordpiece import train_wordpiece
from mpjax.errors import ConfigError
from mpjax.tasks import TokenClassification
from mpjax.train import build
from tests.tasks.bag import Bag

for name in ("sklearn", "seqeval"):
    pytest.importorskip(name, reason="the extra `tasks` is not installed")
pytestmark = pytest.mark.usefixtures("fast_compile")
NAMES = ("B-city", "I-city", "O")
DRAW = np.random.default_rng(0)


def draw_sentences(count):
    words, tags = [], []
    for _ in range(count):
        city = int(DRAW.integers(0, 4))
        sentence = [*DRAW.choice(["go", "to", "see"], city), "newtown", "york", "now"]
        words.append(tuple(map(str, sentence)))
        tags.append(np.array([2] * city + [0, 1, 2], np.int32))
    return TaggedSentences(tuple(words), tuple(tags), NAMES)


@pytest.fixture(scope="module")
def pieces():
    return train_wordpiece(["go to see new xtown york now"] * 3, 60)


def test_labels_are_at_first_pieces_and_predictions_a_word(pieces):
    task, sentences = TokenClassification(NAMES), draw_sentences(60)
    examples = task.examples(pieces, sentences, longest=32)
    for example, tags in zip(examples, sentences.tags, strict=True):
        assert example["labels"][example["labels"] != IGNORE].tolist() == tags.tolist()
        assert len(example["ids"]) > len(tags) + 2, "a word has several pieces"
    model = Bag(pieces.vocab_size, {"token": 3})
    state, step = build(model, optax.adam(0.03), objective=task.objective)
    for batch in itertools.islice(bucket_batches(examples, batch=12, seed=0, lengths=(32,)), 30):
        state, _ = step(state, batch)
    held_out = draw_sentences(21)
    encoded = task.examples(pieces, held_out, longest=32)
    logits = task.predictor(model, batch=8, lengths=(16, 32))(state.params, encoded)
    assert [len(x) for x in logits] == [len(e["ids"]) for e in encoded]
    predicted = task.tags(logits, encoded)
    assert [len(t) for t in predicted] == [len(w) for w in held_out.words]
    scores = task.evaluate(predicted, held_out, entities=True)
    assert scores["accuracy"] > 0.95 and scores["entity f1"] > 0.9
    common = [np.full(len(t), 2) for t in held_out.tags]
    assert task.evaluate(common, held_out, entities=True)["entity f1"] == 0


def test_mistakes_are_one_line(pieces):
    with pytest.raises(ConfigError, match="at least two"):
        TokenClassification(("O",))
    with pytest.raises(
        ConfigError, match="tags: the data names .*, which is none of .'A', 'B'.; rename"
    ):
        TokenClassification(("A", "B")).examples(pieces, draw_sentences(2), longest=32)


def test_tags_are_integers(pieces):
    sentences = TaggedSentences((("go",),), (np.array([0.5]),), NAMES)
    with pytest.raises(ConfigError, match="tags: float64; give integers"):
        TokenClassification(NAMES).examples(pieces, sentences, longest=16)
