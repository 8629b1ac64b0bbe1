"""Translation: batches are pairs, loss and texts are those of each pair alone, without a cache."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.data.buckets import bucket_batches
from mpjax.data.tokenizers.characters import Characters
from mpjax.errors import ConfigError
from mpjax.models import seq2seq
from mpjax.tasks import Translation
from mpjax.train import build

pytestmark = pytest.mark.usefixtures("fast_compile")
DRAW = np.random.default_rng(0)
LENGTHS = (9,)
SPELLED = {"a": "X", "b": "YXY", "c": "ZZYZZ"}


def draw_pairs(count):
    """A letter, one to seven times, becomes a word: soon learnt, with sources that need padding."""
    letters = DRAW.choice(list("abc"), count)
    return [(c * DRAW.integers(1, 8), SPELLED[c]) for c in letters.tolist()]


@pytest.fixture(scope="module")
def trained(fast_compile):
    """A model that has begun to learn, so that its translations differ and end."""
    pairs = draw_pairs(128)
    task = Translation(Characters([text for pair in pairs for text in pair]))
    model = seq2seq(
        "seq2seq-tiny", layers=1, width=32, heads=2, vocabulary=task.vocabulary, norm_first=True
    )
    state, step = build(model, optax.adam(0.01), objective=task.objective)
    losses = []
    batches = bucket_batches(task.examples(pairs), batch=32, seed=0, lengths=LENGTHS)
    for batch in itertools.islice(batches, 60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    return task, model, state.params


def test_a_target_is_moved_by_one_and_begins_and_ends():
    task = Translation(Characters(["ab"]))
    one = task.examples([("ab", "ba")])[0]
    assert task.vocabulary == 5 and one["source"].tolist() == [1, 2]
    assert one["inputs"].tolist() == [task.begin, 2, 1]
    assert one["targets"].tolist() == [2, 1, task.end] and one["weights"].tolist() == [1, 1, 1]


def test_the_loss_is_that_of_each_pair_alone(trained):
    task, model, params = trained
    examples = task.examples([*zip("a bb ccc".split(), ("Y", "XZ", "ZZYZ"), strict=True)])
    total = count = 0.0
    apply = jax.jit(lambda params, batch: model.apply(params, batch)[0])
    for e in examples:
        logits = apply(params, {"source": e["source"][None], "inputs": e["inputs"][None]})[0]
        logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
        total -= logp[np.arange(len(e["targets"])), e["targets"]].sum()
        count += len(e["targets"])
    judge = task.judge(model, batch=2, lengths=LENGTHS)  # 3 examples: a row that only fills up
    assert judge(params, examples)["loss"] == pytest.approx(total / count, rel=1e-5)
    assert judge(params, examples[:2])["loss"] != pytest.approx(total / count, rel=1e-3)


def alone(task, model, params, text):
    """The likeliest token each time, of one source without padding, and without a cache."""
    source = jnp.asarray(task.tokens.encode_batch([text])[0])[None]
    ids = [task.begin]
    apply = jax.jit(lambda inputs: model.apply(params, {"source": source, "inputs": inputs})[0])
    for n in range(9):
        padded = np.zeros((1, 9), np.int32)  # one compilation; what is behind cannot be seen
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(apply(jnp.asarray(padded))[0, n])))
        if ids[-1] == task.end:
            break
    return task.tokens.decode([i for i in ids[1:] if i < task.begin])


def test_translations_are_those_of_each_text_alone_without_a_cache(trained):
    task, model, params = trained
    texts = ["bbbb", "c", "bbacabc", "aa", "ab"]
    found = task.translator(model, batch=4, lengths=LENGTHS)(params, texts)
    assert len(set(found)) > 2, "they differ, or the test shows nothing"
    for at in (1, 2):
        assert found[at] == alone(task, model, params, texts[at])


def test_beams_find_likelier_texts_and_a_cache_of_int8_the_same(trained):
    task, model, params = trained
    texts = [source for source, _ in draw_pairs(4)]
    how = dict(batch=4, lengths=LENGTHS)
    judge = task.judge(model, batch=1, lengths=(10,))  # nine tokens may have no end

    def worth(found):
        pairs = zip(texts, found, strict=True)
        return -np.mean([judge(params, task.examples([pair]))["loss"] for pair in pairs])

    greedy = task.translator(model, **how)(params, texts)
    wide = task.translator(model, **how, beams=2)(params, texts)
    assert worth(wide) >= worth(greedy) - 1e-6 > worth(["XYZ"] * 4)
    low = task.translator(model, **how, cache="int8")(params, texts)
    assert np.mean([a == b for a, b in zip(low, greedy, strict=True)]) > 0.5


def test_a_translation_may_fill_all_learned_positions():
    task = Translation(Characters(["ab"]))
    model = seq2seq(
        "seq2seq-tiny", layers=1, width=16, heads=2, vocabulary=task.vocabulary, context=4,
        position="learned",
    )  # fmt: skip
    params = model.init(jax.random.key(0))
    for beams in (1, 2):
        translate = task.translator(model, batch=2, lengths=(4,), beams=beams)
        assert all(len(text) <= 4 for text in translate(params, ["ab", "baab"]))


def test_what_does_not_fit_is_said(trained, caplog):
    task, model, _ = trained
    with caplog.at_level(logging.WARNING, "mpjax.tasks"):
        assert task.fitting([("ab", "XY"), ("abc", "X")], longest=3) == [("ab", "XY"), ("abc", "X")]
        assert not caplog.records
        assert task.fitting([("ab", "XYZ"), ("abc", "X")], longest=3) == [("abc", "X")]
    assert "1 of 2 pairs are longer than 3 tokens a side" in caplog.text
    with pytest.raises(ConfigError, match="none of 1 fits 2 tokens a side; raise the lengths"):
        task.fitting([("abc", "X")], longest=2)
    with pytest.raises(ConfigError, match="longest=1: no room"):
        task.fitting([("abc", "X")], longest=1)
    with pytest.raises(ConfigError, match="none of 0 fits"):
        task.fitting([], longest=8)
    with pytest.raises(ConfigError, match="beams: 0 must be at least 1"):
        task.translator(model, batch=2, lengths=LENGTHS, beams=0)
    with pytest.raises(ConfigError, match="cache: "):
        task.translator(model, batch=2, lengths=LENGTHS, cache="int9")
