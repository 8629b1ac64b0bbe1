"""What is left under attack, against a float64 account; edits that keep their promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from mpjax.data import LabelledTexts, train_wordpiece
from mpjax.errors import ConfigError
from mpjax.tasks import TextClassification, TokenClassification
from mpjax.tasks.adversarial import FGM, PGD, attacker, evaluate_robust
from mpjax.tasks.adversarial.edits import edit_characters, edit_words
from tests.tasks.adversarial.mean import Exact, batch_of, climbed, mean_encoder

pytestmark = pytest.mark.usefixtures("fast_compile")
TASK = TextClassification(tuple("abc"))
TEXTS = [
    " ".join(w)
    for w in zip(*[iter("aaab baaa abba bbbb abab baba aabb bbaa bbab".split())] * 3, strict=True)
]


def test_the_attack_is_pgd_on_each_example() -> None:
    model, batch = mean_encoder(), batch_of(24, seed=1)
    params = model.init(jax.random.key(0))
    exact = Exact(params, batch)
    batch = {name: np.asarray(x) for name, x in batch.items()}
    batch["labels"] = exact.log_p().argmax(-1).astype(np.int32)  # so that all are right at first
    exact.labels = batch["labels"]
    examples = [{n: x[i] for n, x in batch.items()} for i in range(24)]
    run = attacker(TASK, model, PGD(0.5, 0.2, 4), (2,), batch=8, lengths=(5,))
    right, lost = run(params, examples)
    last = climbed(exact, 0.0, 0.5, 0.2, 4)[-1]
    want = exact.log_p(last).argmax(-1) == exact.labels
    np.testing.assert_array_equal(right, want)
    assert lost == 0 and 4 <= want.sum() <= 20, "the attack decides"


def test_accuracy_falls_with_the_radius() -> None:
    pieces = train_wordpiece(TEXTS, 38)
    model = mean_encoder()
    params = model.init(jax.random.key(0))
    texts = LabelledTexts(tuple(TEXTS), np.array([0, 1, 2], np.int32), tuple("abc"))
    logits = TASK.predictor(model, batch=4, lengths=(16,))(
        params, TASK.examples(pieces, texts, longest=16)
    )
    labels = np.argmax(np.stack(logits), -1).astype(np.int32)
    texts = LabelledTexts(tuple(TEXTS), labels, tuple("abc"))

    def scores(attack: PGD, **options: Any) -> dict[str, float]:
        return evaluate_robust(
            TASK, model, params, texts, pieces, attack=attack, batch=4, lengths=(16,), **options
        )

    none, all_of_it = scores(PGD(1e-6, 1e-6, 1)), scores(PGD(50.0, 10.0, 8))
    assert none["accuracy"] == none["pgd accuracy"] == 1.0 and none["pgd nonfinite"] == 0
    assert all_of_it["pgd accuracy"] == 0.0
    for kind in ("character accuracy", "word accuracy"):
        assert none[kind] == all_of_it[kind] <= 1.0  # drawn by the seed alone


def test_edits_are_small() -> None:
    text, draw = "the taste of it was lovely and the price fair", np.random.default_rng(0)
    typed = {edit_characters(text, 1, draw) for _ in range(60)}
    assert len(typed) > 10
    for one in typed:
        words = list(zip(text.split(), one.split(), strict=True))
        changed = [(a, b) for a, b in words if a != b]
        assert len(changed) <= 1  # two equal letters may be swapped
        for a, b in changed:
            assert a[0] == b[0] and a[-1] == b[-1] and abs(len(a) - len(b)) <= 1
            assert sum(((Counter(a) - Counter(b)) + (Counter(b) - Counter(a))).values()) <= 1
    for _ in range(60):
        moved = edit_words(text, 1, draw).split()
        assert abs(len(moved) - 10) <= 1 and set(moved) <= set(text.split())
    # nothing is emptied
    assert edit_words("one two", 9, draw) and edit_characters("a b", 3, draw) == "a b"
    assert edit_words("one", 9, draw) == "one" and edit_characters("", 1, draw) == ""


def test_mistakes_are_one_line() -> None:
    pieces, model = train_wordpiece(TEXTS, 38), mean_encoder()
    texts = LabelledTexts(tuple(TEXTS), np.array([0, 1, -100], np.int32), tuple("abc"))
    common: Any = (model, {}, texts, pieces)
    tagger: Any = TokenClassification(tuple("abc"))
    for call, message in (
        (lambda: evaluate_robust(tagger, *common), "robust: the task is .*; give TextClass"),
        (lambda: evaluate_robust(TASK, *common, attack=FGM()), r"the attack is .*; give PGD"),  # type: ignore[arg-type]
        (lambda: evaluate_robust(TASK, *common, edits=0), "edits=0 is no number of 1 or above"),
        (lambda: evaluate_robust(TASK, *common, copies=-1), "copies=-1 is no number of 1"),
        (lambda: evaluate_robust(TASK, *common), "a text has no label; leave it out"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
