"""Rewritten data: what a masked-language model draws, and texts there and back."""

import numpy as np
import pytest

from mpjax.data import train_wordpiece
from mpjax.data.augment import back_translation, contextual_replacement
from mpjax.errors import ConfigError

WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "xyz"]
PIECES = train_wordpiece([" ".join(WORDS)], 70)
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 9)) for i in range(7)]
EXAMPLES = [e | {"labels": np.int32(i)} for i, e in enumerate(PIECES.encode(TEXTS, longest=32))]
SPECIAL = [PIECES.pad, PIECES.unknown, PIECES.first, PIECES.separator, PIECES.mask]


class Model:
    """Logits of a fixed distribution; it remembers what it was asked."""

    def __init__(self, logits):
        self.logits, self.asked = np.asarray(logits, np.float32), []

    def __call__(self, examples):
        self.asked += examples
        return [np.broadcast_to(self.logits, (len(e["ids"]), len(self.logits))) for e in examples]


def test_a_share_is_masked_and_drawn_and_the_rest_stays():
    model = Model(np.zeros(PIECES.vocab_size))
    new = contextual_replacement(EXAMPLES, model, PIECES, rate=0.3, batch=3)
    assert len(new) == len(model.asked) == len(EXAMPLES)
    for old, asked, found in zip(EXAMPLES, model.asked, new, strict=True):
        masked = asked["ids"] == PIECES.mask
        text = ~np.isin(old["ids"], SPECIAL)
        assert masked.sum() == int(0.3 * text.sum()) and not (masked & ~text).any()
        np.testing.assert_array_equal(found["ids"][~masked], old["ids"][~masked])
        assert not np.isin(found["ids"][masked], SPECIAL).any()
        assert found["labels"] == old["labels"] and found["ids"].dtype == np.int32
    again = contextual_replacement(EXAMPLES, model, PIECES, rate=0.3, batch=7)
    other = contextual_replacement(EXAMPLES, model, PIECES, rate=0.3, seed=1)
    ids = lambda found: [e["ids"].tolist() for e in found]  # noqa: E731
    assert ids(new) == ids(again) != ids(other), "whatever the batch"


def test_tokens_are_drawn_from_the_models_distribution():
    strange = set(range(PIECES.vocab_size)) - set(EXAMPLES[0]["ids"].tolist()) - set(SPECIAL)
    three = sorted(strange)[:3]
    logits = np.full(PIECES.vocab_size, -30.0)
    logits[three] = np.log([0.6, 0.3, 0.1])
    logits[SPECIAL] = 50  # which are never drawn
    many = [EXAMPLES[0]] * 600
    for temperature in (1.0, 0.5):
        new = contextual_replacement(
            many, Model(logits), PIECES, rate=0.3, temperature=temperature, batch=600
        )
        drawn = np.concatenate([e["ids"][e["ids"] != EXAMPLES[0]["ids"]] for e in new])
        want = np.array([0.6, 0.3, 0.1]) ** (1 / temperature)
        share = np.array([(drawn == i).mean() for i in three])
        assert np.abs(share - want / want.sum()).max() < 4 * np.sqrt(0.25 / len(drawn))


def test_a_rate_of_zero_changes_nothing():
    new = contextual_replacement(EXAMPLES, Model(np.zeros(PIECES.vocab_size)), PIECES, rate=0)
    assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(new, EXAMPLES, strict=True))


def test_texts_go_there_and_back_and_stay_where_a_translation_is_empty(caplog):
    there = lambda texts: ["" if t == "b" else t.upper() for t in texts]  # noqa: E731
    back = lambda texts: [" " if t == "C" else f"{t.lower()}!" for t in texts]  # noqa: E731
    assert back_translation(["a", "b", "c", "d"], there, back) == ["a!", "b", "c", "d!"]
    assert "2 of 4 texts have no translation and stay" in caplog.text
    assert back_translation([], there, back) == []


def test_mistakes_are_one_line():
    model = Model(np.zeros(PIECES.vocab_size))
    none = Model(np.full(PIECES.vocab_size, np.nan))
    for settings, said in (
        (dict(rate=1.0), "rate=1.0; expected a share"),
        (dict(temperature=0.0), "temperature=0.0; give a number above 0"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(batch=0), "batch=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(predict=Model(np.zeros(9))), "expected logits of (11, 43)"),
        (dict(predict=lambda examples: [np.zeros(2)] * len(examples)), "expected logits of"),
        (dict(predict=lambda examples: []), "gives 0 for 7 examples"),
        (dict(predict=none), "not finite; give a model that has been trained"),
    ):
        with pytest.raises(ConfigError) as error:
            contextual_replacement(EXAMPLES, **{"predict": model, "pieces": PIECES} | settings)
        assert said in str(error.value), str(error.value)
    for bad in (lambda texts: texts[1:], lambda texts: [None] * len(texts)):
        with pytest.raises(ConfigError, match=r"there gives .* for 2 texts; expected a text"):
            back_translation(["a", "b"], bad, lambda texts: texts)
